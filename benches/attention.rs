//! Attention on codes, per scheme: one query token at 4,096 and 16,384 tokens, and a chunk of 32 queries. 32 query heads, 8 KV
//! heads, head size 128, bf16 sinks and tail.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nqkv_rs::attention::{Queries, attend};
use nqkv_rs::cache::LayerCache;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::{Dtype, View};

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

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let (k, v) = (noise(HEADS * 1024 * DIM, 1), noise(HEADS * 1024 * DIM, 2));
    let q = noise(32 * 32 * DIM, 3);
    for name in Scheme::presets() {
        for (tokens, q_heads, count) in [(4096, 32, 1), (16384, 32, 1), (16384, 8, 1), (4096, 32, 32)] {
            let codec = Arc::new(PageCodec::new(&Scheme::preset(name).unwrap(), HEADS, DIM, DIM).unwrap());
            let mut pool = vec![0u8; tokens / 64 * codec.row_bytes()];
            let bytes = pool.len() as u64;
            let mut cache = LayerCache::new(codec, Dtype::Bf16, 1);
            // SAFETY: the pool outlives the cache.
            unsafe { cache.add_rows(pool.as_mut_ptr(), tokens / 64, Box::new(())) };
            for _ in 0..tokens / 1024 {
                let shape = [1, HEADS, 1024, DIM];
                cache.append(&view(&k, shape), &view(&v, shape)).unwrap();
            }
            let q = &q[..q_heads * count * DIM];
            let q = view(q, [1, q_heads, count, DIM]);
            let scale = 1.0 / (DIM as f64).sqrt();
            let queries = Queries { q, scale, starts: None, fresh: None, window: None, soft_cap: None };
            let mut out = vec![0f32; q_heads * count * DIM];
            group.throughput(Throughput::Bytes(bytes));
            let id = BenchmarkId::new(*name, format!("{q_heads} heads, {count} queries, {tokens} tokens"));
            group.bench_function(id, |b| b.iter(|| attend(&cache, black_box(&queries), &mut out, None).unwrap()));
        }
    }
    group.finish();
}

criterion_group!(benches, attention);
criterion_main!(benches);
