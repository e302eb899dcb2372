//! Scheme JSON: presets with leaves, keys and bytes changed.

use nqkv_rs::page::PAGE_TOKENS;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use serde_json::{Value, json};

use crate::common::Random;

/// A value that some field may not expect.
pub fn odd_value(random: &mut Random) -> Value {
    let n = random.next();
    match random.below(16) {
        0 => json!(null),
        1 => json!(true),
        2 => json!(-1),
        3 => json!(0),
        4 => json!(1.5),
        5 => json!(1e308),
        6 => json!(u64::MAX),
        7 => json!(i64::MIN),
        8 => json!([]),
        9 => json!({}),
        10 => json!(""),
        11 => json!("\u{0}\u{1f600}"),
        12 => json!(n % 600),
        13 => json!([n % 9, n % 4, 0]),
        14 => json!([0.0, -1.0, 1.0, 1e-30]),
        _ => json!(*random.pick::<&str>(&[
            "nf4",
            "nf2",
            "nf8",
            "nf99",
            "lloyd3",
            "uniform8",
            "int8",
            "e2m1",
            "token",
            "channel",
            "head",
            "heads",
            "absmax",
            "minmax",
            "rms",
            "signed_absmax",
            "mean_absmax",
            "fp16",
            "bf16",
            "fp32",
            "e4m3",
            "float16",
            "bfloat16",
            "l2absmax4-64",
            "custom"
        ])),
    }
}

/// Changes one random leaf, or adds or removes a key, somewhere in `value`.
pub fn change(random: &mut Random, value: &mut Value) {
    match value {
        Value::Object(map) if !map.is_empty() && !random.one_in(12) => {
            let key = map.keys().nth(random.below(map.len())).unwrap().clone();
            match random.below(12) {
                0 => drop(map.remove(&key)),
                1 => drop(map.insert("surprise".into(), odd_value(random))),
                _ => change(random, map.get_mut(&key).unwrap()),
            }
        }
        Value::Array(items) if !items.is_empty() && !random.one_in(6) => {
            let at = random.below(items.len());
            match random.below(6) {
                0 => drop(items.remove(at)),
                1 => items.push(odd_value(random)),
                _ => change(random, &mut items[at]),
            }
        }
        Value::Number(n) if random.one_in(2) => {
            let n = n.as_i64().unwrap_or(0);
            *value = json!(*random.pick(&[n + 1, n - 1, n * 2, n / 2, -n, n << 20]));
        }
        leaf => *leaf = odd_value(random),
    }
}

/// Sets words that a side may have, so that mixtures of good ones are met, too.
fn mix(random: &mut Random, scheme: &mut Value) {
    let side = *random.pick::<&str>(&["key", "value"]);
    let (field, words): (&str, &[&str]) = match random.below(5) {
        0 => ("codebook", &["nf4", "nf3", "nf2", "nf5", "nf8", "int8", "uniform4", "lloyd4", "e2m1", "l2signed4-64", "nf4-bnb"]),
        1 => ("axis", &["token", "channel"]),
        2 => ("scale", &["absmax", "signed_absmax", "minmax", "rms", "mean_absmax"]),
        3 => ("scale_dtype", &["fp32", "fp16", "bf16", "e4m3"]),
        _ => ("span", &["head", "heads"]),
    };
    scheme[side][field] = json!(random.pick::<&str>(words));
    if random.one_in(3) {
        scheme[side]["block"] = json!(random.pick(&[16, 32, 48, 64, 80, 128, 256, 512]));
    }
    if random.one_in(4) {
        scheme["key"]["widths"] = json!((0..1 + random.below(5)).map(|_| random.below(9)).collect::<Vec<_>>());
    }
}

/// One input; true if it was JSON of the right form.
pub fn input(random: &mut Random) -> bool {
    let text = Scheme::preset(random.pick::<&str>(Scheme::presets())).unwrap().to_json();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    for _ in 0..random.below(4) {
        mix(random, &mut value);
    }
    if random.one_in(2) {
        change(random, &mut value);
    }
    let mut text = value.to_string().into_bytes();
    if random.one_in(8) {
        for _ in 0..1 + random.below(3) {
            let at = random.below(text.len());
            if text.is_empty() {
                break;
            }
            match random.below(3) {
                0 => text[at] ^= 1 << random.below(8),
                1 => drop(text.drain(at..(at + random.below(20)).min(text.len()))),
                _ => text.truncate(at.max(1)),
            }
        }
    }
    let Ok(scheme) = Scheme::from_json(&String::from_utf8_lossy(&text)) else { return false };
    // What is accepted works: it prints to what it was read from, and pages of it can be written and read.
    assert_eq!(Scheme::from_json(&scheme.to_json()).as_ref(), Ok(&scheme));
    let (heads, kd, vd) = (1 + random.below(3), 1 + random.below(130), 1 + random.below(130));
    if let Ok(codec) = PageCodec::new(&scheme, heads, kd, vd) {
        let mut row = vec![0u8; codec.row_bytes()];
        let numbers = |n: usize, seed: u64| (0..n).map(|i| crate::common::number(seed, i)).collect::<Vec<_>>();
        let (k, v) =
            (numbers(PAGE_TOKENS * heads * kd, random.next() >> 20), numbers(PAGE_TOKENS * heads * vd, random.next() >> 20));
        codec.write(&mut row, 0, PAGE_TOKENS, &k, &v);
        let (mut k, mut v) = (vec![f32::NAN; kd], vec![f32::NAN; vd]);
        let halves = codec.halves(&row, heads - 1);
        codec.key.read(halves.0, heads - 1, 63, &mut k);
        codec.value.read(halves.1, heads - 1, 63, &mut v);
        assert!(k.iter().chain(&v).all(|x| x.is_finite()), "{}", scheme.to_json());
    }
    true
}
