//! What the Rust tests share: numbers from a seed, memory for rows that is counted and poisoned, random schemes.
#![allow(dead_code, reason = "each test file uses a part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nqkv_rs::cache::LayerCache;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::tensor::{Dtype, View};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Number `c` of token `id`, roughly normal.
pub fn number(id: u64, c: usize) -> f32 {
    let x = Random((id << 16 | c as u64).wrapping_mul(0x2545_f491_4f6c_dd1d)).next();
    (0..4).map(|i| (x >> (16 * i) & 0xffff) as f32 / 32768.0 - 1.0).sum()
}

/// A contiguous fp32 view; the caller keeps `x` alive and unwritten while it is used.
pub fn view(x: &[f32], shape: [usize; 4]) -> View {
    assert_eq!(x.len(), shape.iter().product::<usize>());
    let [_, h, t, d] = shape.map(|s| s as isize);
    // SAFETY: contiguous, alive by the contract above.
    unsafe { View::new(x.as_ptr().cast(), Dtype::F32, shape, [h * t * d, t * d, d, 1]) }
}

/// Counts pieces of memory that are alive.
#[derive(Default, Clone)]
pub struct Alive(Arc<AtomicUsize>);

struct Memory {
    _bytes: Box<[u8]>,
    alive: Alive,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.alive.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Alive {
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// `bytes`, counted, and their address.
    pub fn keep(&self, mut bytes: Box<[u8]>) -> (*mut u8, Box<dyn std::any::Any + Send + Sync>) {
        self.0.fetch_add(1, Ordering::Relaxed);
        let data = bytes.as_mut_ptr();
        (data, Box::new(Memory { _bytes: bytes, alive: self.clone() }))
    }

    /// Gives `cache` rows full of NaN.
    pub fn grow(&self, cache: &mut LayerCache, rows: usize) {
        let (data, keep) = self.keep(vec![0xff; rows * cache.codec().row_bytes()].into_boxed_slice());
        // SAFETY: `keep` owns as many bytes at `data`.
        unsafe { cache.add_rows(data, rows, keep) };
    }
}

/// Any scheme that the core runs, presets and mixtures.
pub fn any_scheme(random: &mut Random) -> Scheme {
    let mut scheme = Scheme::preset(random.pick::<&str>(Scheme::presets())).unwrap();
    let window = *random.pick(&[0usize, 1, 7, 32, 40]);
    if !scheme.writes_single_slots() || random.one_in(3) {
        scheme.residual_length = window;
    }
    scheme.sink_tokens = *random.pick(&[0usize, 1, 4, 9]);
    if random.one_in(3) {
        scheme.exact_dtype = Some(*random.pick(&[Dtype::F16, Dtype::Bf16, Dtype::F32]));
    }
    let book = random.pick(&["nf4", "nf3", "nf2", "int8", "uniform4", "l2absmax4-64"]);
    if random.one_in(2) {
        let mut json: serde_json::Value = serde_json::from_str(&scheme.to_json()).unwrap();
        json[random.pick::<&str>(&["key", "value"])]["codebook"] = serde_json::json!(book);
        if let Ok(other) = Scheme::from_json(&json.to_string()) {
            scheme = other;
        }
    }
    scheme
}
