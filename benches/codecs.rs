//! Codecs and the cache's write paths: quantize, dequantize, seal a row, append one token, prefill.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nqkv_rs::cache::LayerCache;
use nqkv_rs::codebook::Codebook;
use nqkv_rs::codec::{ScaleDtype, ScaleKind};
use nqkv_rs::flat::{FlatSpec, NibbleOrder, dequantize_bytes, quantize_bytes};
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::{Dtype, View};

const HEADS: usize = 8;
const DIM: usize = 128;

/// The presets that differ in how pages are written.
const PRESETS: [&str; 5] = ["nqkv4", "nqkv", "nqkv4-signed", "kivi4", "kivi2"];

/// Sums of four uniform numbers: near enough to normal.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed | 1;
    let mut uniform = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..4).map(|_| uniform()).sum()).collect()
}

/// The caller keeps `x` alive.
fn view(x: &[f32], tokens: usize) -> View {
    assert_eq!(x.len(), HEADS * tokens * DIM);
    let (t, d) = (tokens as isize, DIM as isize);
    // SAFETY: a contiguous slice of this shape.
    unsafe { View::new(x.as_ptr().cast(), Dtype::F32, [1, HEADS, tokens, DIM], [HEADS as isize * t * d, t * d, d, 1]) }
}

/// `x` in a dtype, as bytes.
fn stored(x: &[f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes = vec![0; x.len() * dtype.bytes()];
    dtype.write_f32(&mut bytes, x);
    bytes
}

fn flat(c: &mut Criterion) {
    let n = 1 << 22;
    let x = noise(n, 1);
    let specs = [
        ("nf4-bnb", ScaleKind::Absmax, ScaleDtype::Fp32, NibbleOrder::HighFirst),
        ("nf4", ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::LowFirst),
        ("l2signed4-64", ScaleKind::SignedAbsmax, ScaleDtype::Fp16, NibbleOrder::LowFirst),
        ("lloyd4", ScaleKind::Rms, ScaleDtype::Fp16, NibbleOrder::LowFirst),
        ("uniform4", ScaleKind::Minmax, ScaleDtype::Fp16, NibbleOrder::LowFirst),
        ("nf3", ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::LowFirst),
        ("uniform2", ScaleKind::Minmax, ScaleDtype::Fp16, NibbleOrder::LowFirst),
    ];
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let bytes = stored(&x, dtype);
        let mut group = c.benchmark_group(format!("flat/{}", dtype.name()));
        group.throughput(Throughput::Elements(n as u64));
        for (name, kind, scale_dtype, order) in specs {
            let spec = FlatSpec { book: Codebook::parse(name).unwrap(), block: 64, kind, scale_dtype, order };
            let (mut codes, mut fields) = (vec![0; spec.codes_len(n)], vec![0; spec.fields_len(n, n)]);
            let mut out = vec![0; bytes.len()];
            group.bench_function(BenchmarkId::new("quantize", name), |b| {
                b.iter(|| quantize_bytes(black_box(&bytes), dtype, n, &spec, &mut codes, &mut fields).unwrap());
            });
            group.bench_function(BenchmarkId::new("dequantize", name), |b| {
                b.iter(|| dequantize_bytes(&codes, &fields, n, &spec, dtype, black_box(&mut out)).unwrap());
            });
        }
        group.finish();
    }
}

fn cache(c: &mut Criterion) {
    let (k, v) = (noise(HEADS * 1024 * DIM, 2), noise(HEADS * 1024 * DIM, 3));
    for name in PRESETS {
        let codec = Arc::new(PageCodec::new(&Scheme::preset(name).unwrap(), HEADS, DIM, DIM).unwrap());
        let mut row = vec![0u8; codec.row_bytes()];
        let token_major = noise(64 * HEADS * DIM, 4);
        let mut group = c.benchmark_group("pages");
        group.throughput(Throughput::Elements((2 * 64 * HEADS * DIM) as u64));
        group.bench_function(BenchmarkId::new("seal_row", name), |b| {
            b.iter(|| codec.write(&mut row, 0, 64, black_box(&token_major), &token_major));
        });
        group.throughput(Throughput::Elements((2 * 1024 * HEADS * DIM) as u64));
        let mut pool = vec![0u8; 1024 * codec.row_bytes()];
        let mut fresh = || {
            let mut cache = LayerCache::new(codec.clone(), Dtype::F32, 1);
            // SAFETY: the pool outlives every cache of this function, and one at a time writes to it.
            unsafe { cache.add_rows(pool.as_mut_ptr(), 1024, Box::new(())) };
            cache
        };
        group.bench_function(BenchmarkId::new("prefill_1024", name), |b| {
            b.iter_batched_ref(&mut fresh, |cache| cache.append(&view(&k, 1024), &view(&v, 1024)), BatchSize::PerIteration);
        });
        let mut cache = fresh();
        let (k1, v1) = (&k[..HEADS * DIM], &v[..HEADS * DIM]);
        group.throughput(Throughput::Elements((2 * HEADS * DIM) as u64));
        group.bench_function(BenchmarkId::new("append_one", name), |b| {
            b.iter(|| {
                if cache.tokens(0) > 60_000 {
                    cache.reset();
                }
                cache.append(&view(k1, 1), &view(v1, 1)).unwrap();
            });
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    targets = flat, cache
}
criterion_main!(benches);
