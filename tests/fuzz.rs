//! Hostile input for everything that parses bytes or takes foreign memory: saved files, pages, scheme JSON, DLPack tensors.
//!
//! `NQKV_FUZZ_INPUTS` (default 10,000) inputs for each target, from `NQKV_FUZZ_SEED`. An input is right or refused with an
//! [`Error`]: a panic fails the test and names the seed that repeats it. Enough inputs must get past the header, or the test
//! tests nothing. Run it under a sanitizer to see reads and writes out of bounds (`make fuzz-asan`).

mod common;
#[path = "fuzz/dlpack.rs"]
mod dlpack;
#[path = "fuzz/saved.rs"]
mod saved;
#[path = "fuzz/scheme.rs"]
mod scheme;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use common::Random;
use nqkv_rs::page::PAGE_TOKENS;
use nqkv_rs::seal::PageCodec;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("{name}: expected a number, got {n}")))
}

/// Runs `input` for every seed. It returns whether it got past the header; at least `percent` of all must.
fn fuzz(target: &str, percent: usize, mut input: impl FnMut(&mut Random) -> bool) {
    let (inputs, first) = (setting("NQKV_FUZZ_INPUTS", 10_000), setting("NQKV_FUZZ_SEED", 1) as u64);
    let (mut past, mut said) = (0, Instant::now());
    for i in 0..inputs as u64 {
        // Seeds that lie close together must not give streams that overlap.
        let mut random = Random(Random(first + i).next());
        match catch_unwind(AssertUnwindSafe(|| input(&mut random))) {
            Ok(yes) => past += usize::from(yes),
            Err(_) => panic!("{target}: NQKV_FUZZ_SEED={} NQKV_FUZZ_INPUTS=1 panics", first + i),
        }
        if said.elapsed().as_secs() >= 5 {
            eprintln!("fuzz {target}: {} of {inputs}", i + 1);
            said = Instant::now();
        }
    }
    eprintln!("fuzz {target}: {inputs} inputs, {past} past the header");
    assert!(inputs < 100 || past * 100 >= percent * inputs, "{target}: only {past} of {inputs} got past the header");
}

#[test]
fn saved_files() {
    let valid = saved::valid_files();
    fuzz("saved files", 30, |random| saved::input(random, &valid));
}

#[test]
fn scheme_json() {
    fuzz("scheme JSON", 30, scheme::input);
}

#[test]
fn dlpack_tensors() {
    fuzz("DLPack", 30, dlpack::input);
}

/// Any bytes are a page: codes and fields are numbers, whatever they say.
#[test]
fn page_bytes() {
    fuzz("pages", 30, |random| {
        let scheme = common::any_scheme(random);
        let (heads, kd, vd) = (1 + random.below(3), 1 + random.below(70), 1 + random.below(70));
        let Ok(codec) = PageCodec::new(&scheme, heads, kd, vd) else { return false };
        let row: Vec<u8> = (0..codec.row_bytes()).map(|_| random.next() as u8).collect();
        let (mut k, mut v) = (vec![0.0; kd], vec![0.0; vd]);
        for h in 0..heads {
            let halves = codec.halves(&row, h);
            for n in [0, random.below(PAGE_TOKENS), PAGE_TOKENS - 1] {
                codec.key.read(halves.0, h, n, &mut k);
                codec.value.read(halves.1, h, n, &mut v);
            }
        }
        true
    });
}

/// What fuzzing has found, kept.
#[test]
fn found_before() {
    // A saved header whose head size overflowed when it was rounded up to whole slabs.
    let scheme = nqkv_rs::scheme::Scheme::preset("nqkv4").unwrap();
    for dim in [usize::MAX, usize::MAX - 14, 257, 0] {
        assert!(PageCodec::new(&scheme, 1, dim, 64).is_err() && PageCodec::new(&scheme, 1, 64, dim).is_err());
    }
}
