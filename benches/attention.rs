//! Decode attention on codes: one query token, 8 KV heads, head size 128, 16384 tokens, bf16 sinks and tail.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nqkv_rs::attention::{Queries, attend};
use nqkv_rs::cache::LayerCache;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::{Dtype, View};

const TOKENS: usize = 16384;
const HEADS: usize = 8;
const DIM: usize = 128;

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed | 1;
    let mut next = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((s >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 3.46
    };
    (0..n).map(|_| next()).collect()
}

/// The caller keeps `x` alive.
fn view(x: &[f32], shape: [usize; 4]) -> View {
    let [_, h, t, d] = shape.map(|s| s as isize);
    assert_eq!(x.len(), shape.iter().product::<usize>());
    // SAFETY: a contiguous slice of this shape.
    unsafe { View::new(x.as_ptr().cast(), Dtype::F32, shape, [h * t * d, t * d, d, 1]) }
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode_attention_16k");
    for (name, q_heads) in [("nqkv4", 32), ("nqkv4", 8), ("nqkv4", 56), ("nqkv", 32), ("kivi4", 32), ("kivi2", 32)] {
        let codec = Arc::new(PageCodec::new(&Scheme::preset(name).unwrap(), HEADS, DIM, DIM).unwrap());
        let mut pool = vec![0u8; TOKENS / 64 * codec.row_bytes()];
        let bytes = pool.len() as u64;
        let mut cache = LayerCache::new(codec, Dtype::Bf16, 1);
        // SAFETY: the pool outlives the cache.
        unsafe { cache.add_rows(pool.as_mut_ptr(), TOKENS / 64, Box::new(())) };
        let (k, v) = (noise(HEADS * 1024 * DIM, 1), noise(HEADS * 1024 * DIM, 2));
        for _ in 0..TOKENS / 1024 {
            let shape = [1, HEADS, 1024, DIM];
            cache.append(&view(&k, shape), &view(&v, shape)).unwrap();
        }
        let q = noise(q_heads * DIM, 3);
        let scale = 1.0 / (DIM as f64).sqrt();
        let queries =
            Queries { q: view(&q, [1, q_heads, 1, DIM]), scale, starts: None, fresh: None, window: None, soft_cap: None };
        let mut out = vec![0f32; q_heads * DIM];
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::new(name, format!("{q_heads}/{HEADS}/{DIM}")), |b| {
            b.iter(|| attend(&cache, black_box(&queries), &mut out, None).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
