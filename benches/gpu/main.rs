//! Kernels on a CUDA device, through the Rust API, timed between events: whole tensors to codes and back, prompts to pages and
//! back, appends in a graph. After each figure of criterion a line says what it is in packed bytes per second and in percent
//! of a copy that moves as many bytes. Without a device all is skipped.
#![allow(missing_docs, clippy::print_stdout)]

mod device;

use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use device::Gpu;
use nqkv_rs::codebook::Codebook;
use nqkv_rs::codec::{ScaleDtype, ScaleKind};
use nqkv_rs::cuda::flat::{Flat, FlatCodec, Packed};
use nqkv_rs::cuda::{DeviceCache, DeviceView, Room, codec_bytes};
use nqkv_rs::flat::{FlatSpec, NibbleOrder};
use nqkv_rs::page::PAGE_TOKENS;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::Dtype;

/// Bytes that a piece of work reads and writes, and those of them that are packed.
#[derive(Clone, Copy)]
struct Bytes {
    moved: usize,
    packed: usize,
}

struct Bench<'a> {
    gpu: &'a Gpu,
    group: BenchmarkGroup<'a, WallTime>,
    /// Bytes per microsecond that a copy reads and writes.
    copy: f64,
}

impl Bench<'_> {
    /// Times `work`; `before` each time comes `ready`, untimed.
    fn run(&mut self, name: &str, bytes: Bytes, mut ready: impl FnMut(), mut work: impl FnMut()) -> f64 {
        let gpu = self.gpu;
        self.group.throughput(Throughput::Bytes(bytes.moved as u64));
        self.group.bench_function(name, |b| {
            b.iter_custom(|times| {
                (0..times)
                    .map(|_| {
                        ready();
                        gpu.time(&mut work)
                    })
                    .sum::<Duration>()
            });
        });
        let Some(us) = gpu.median() else { return 0.0 };
        let percent = if self.copy > 0.0 { 100.0 * bytes.moved as f64 / us / self.copy } else { 100.0 };
        println!("{name}: {us:.1} us, {:.0} GB/s of packed bytes, {percent:.1} % of copy\n", bytes.packed as f64 / us / 1e3);
        us
    }
}

/// Sums of four uniform numbers, near enough to normal, as bf16.
fn noise(n: usize) -> Vec<u8> {
    let mut s = 1u64;
    let mut uniform = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let x: Vec<f32> = (0..n).map(|_| (0..4).map(|_| uniform()).sum()).collect();
    let mut bytes = vec![0; 2 * n];
    Dtype::Bf16.write_f32(&mut bytes, &x);
    bytes
}

/// The ceilings: a copy, and reading alone.
fn ceilings(bench: &mut Bench<'_>, noise: &[u8]) {
    let (gpu, bytes) = (bench.gpu, 512 << 20);
    let (from, to) = (gpu.filled(bytes, noise), gpu.zeroed(bytes));
    let moved = Bytes { moved: 2 * bytes, packed: 2 * bytes };
    let us = bench.run("copy", moved, || (), || gpu.copy(to, from, bytes));
    bench.copy = if us > 0.0 { moved.moved as f64 / us } else { 0.0 };
    bench.run("read", Bytes { moved: bytes, packed: bytes }, || (), || gpu.read(from, bytes));
    gpu.free(from);
    gpu.free(to);
}

fn flat(bench: &mut Bench<'_>, noise: &[u8]) {
    let (gpu, n) = (bench.gpu, 1 << 28);
    let x = gpu.filled(2 * n, noise);
    for (book, kind, scale_dtype) in [
        ("nf4-bnb", ScaleKind::Absmax, ScaleDtype::Fp32),
        ("nf4", ScaleKind::Absmax, ScaleDtype::Fp16),
        ("l2signed4-64", ScaleKind::SignedAbsmax, ScaleDtype::Fp16),
        ("uniform4", ScaleKind::Minmax, ScaleDtype::Fp16),
    ] {
        let spec = FlatSpec { book: Codebook::parse(book).unwrap(), block: 64, kind, scale_dtype, order: NibbleOrder::HighFirst };
        let (codes, fields) = (spec.codes_len(n), spec.fields_len(n, n));
        let to = Packed { codes: gpu.zeroed(codes), fields: gpu.zeroed(fields) };
        let bytes = Bytes { moved: 2 * n + codes + fields, packed: codes + fields };
        let codec = FlatCodec::new(spec);
        let tensor = Flat { address: x, dtype: Dtype::Bf16, len: n, row: n };
        // SAFETY: all of these sizes, and used by nobody else.
        let quantize = || unsafe { codec.quantize(gpu.device, gpu.stream(), &tensor, to, 0) }.unwrap();
        bench.run(&format!("flat/quantize/{book}"), bytes, || (), quantize);
        let out = Flat { address: gpu.zeroed(2 * n), ..tensor };
        // SAFETY: as above.
        let dequantize = || unsafe { codec.dequantize(gpu.device, gpu.stream(), to, &out) }.unwrap();
        bench.run(&format!("flat/dequantize/{book}"), bytes, || (), dequantize);
        for address in [out.address, to.codes, to.fields] {
            gpu.free(address);
        }
    }
    gpu.free(x);
}

/// A cache on the device with room for `tokens` of every sequence.
struct Held {
    cache: DeviceCache,
    memory: Vec<u64>,
}

impl Held {
    fn new(gpu: &Gpu, scheme: &str, batch: usize, heads: usize, dim: usize, tokens: usize) -> Self {
        let codec = Arc::new(PageCodec::new(&Scheme::preset(scheme).unwrap(), heads, dim, dim).unwrap());
        let mut cache = DeviceCache::new(Arc::clone(&codec), Dtype::Bf16, batch, 0).unwrap();
        let (sizes, bytes) = (cache.sizes(), codec_bytes(&codec, Dtype::Bf16));
        let (capacity, rows) = (tokens.div_ceil(PAGE_TOKENS) + 1, batch * (tokens.div_ceil(PAGE_TOKENS) + 1));
        let room = Room {
            codec: gpu.filled(bytes.len(), &bytes),
            counts: gpu.zeroed(16 * batch),
            table: gpu.zeroed(8 * batch * capacity),
            arrived: gpu.zeroed(4 * batch),
            sinks: sizes.sinks.map(|n| gpu.zeroed(n * batch)),
            tail: sizes.tail.map(|n| gpu.zeroed(n * batch)),
            capacity,
        };
        let pages = gpu.zeroed(rows * codec.row_bytes());
        let [s0, s1] = room.sinks;
        let [t0, t1] = room.tail;
        let memory = vec![room.codec, room.counts, room.table, room.arrived, s0, s1, t0, t1, pages];
        // SAFETY: memory of this device, of these sizes, freed after the cache.
        unsafe {
            cache.move_to(room, Box::new(()), &vec![0; batch], gpu.stream()).unwrap();
            cache.add_rows(pages, rows, Box::new(()));
        }
        Self { cache, memory }
    }

    fn free(self, gpu: &Gpu) {
        drop(self.cache);
        self.memory.into_iter().for_each(|address| gpu.free(address));
    }
}

fn view(address: u64, shape: [usize; 4]) -> DeviceView {
    let [_, h, t, d] = shape.map(|n| n as isize);
    DeviceView { address, dtype: Dtype::Bf16, shape, strides: [h * t * d, t * d, d, 1] }
}

/// Prompts into pages and back: batch, KV heads, head size, context; 512 MiB of keys, and of values.
const PROMPTS: [(&str, [usize; 4]); 3] =
    [("llama3-8b", [16, 8, 128, 16384]), ("opt-6.7b", [64, 32, 128, 1024]), ("qwen3-small", [64, 8, 64, 8192])];

fn pages(bench: &mut Bench<'_>, noise: &[u8]) {
    let gpu = bench.gpu;
    for (shape, [batch, heads, dim, context]) in PROMPTS {
        let n = batch * heads * dim * context;
        let (k, v) = (gpu.filled(2 * n, noise), gpu.filled(2 * n, noise));
        for scheme in ["nqkv4", "nqkv", "nqkv4-signed", "kivi4"] {
            let held = std::cell::RefCell::new(Held::new(gpu, scheme, batch, heads, dim, context));
            let views = [k, v].map(|x| view(x, [batch, heads, context, dim]));
            let ready = || {
                let cache = &mut held.borrow_mut().cache;
                cache.crop(&vec![0; batch]).unwrap();
                cache.reserve(context, gpu.stream()).unwrap();
            };
            // SAFETY: the views are alive, and nobody writes to them.
            let append = || unsafe { held.borrow_mut().cache.append(&views[0], &views[1], gpu.stream()) }.unwrap();
            ready();
            append();
            let (packed, page, exact) = {
                let cache = &held.borrow().cache;
                (cache.packed(0), cache.codec().layout.page_bytes(), context - cache.packed(0))
            };
            // Tokens that stay exact are written as they are read.
            let packed_bytes = batch * heads * packed / PAGE_TOKENS * page;
            let bytes = Bytes { moved: 4 * n + packed_bytes + 4 * batch * heads * dim * exact, packed: packed_bytes };
            bench.run(&format!("pages/quantize/{scheme}/{shape}"), bytes, ready, append);
            let sinks = held.borrow().cache.codec().scheme.sink_tokens;
            let bytes = Bytes { moved: packed_bytes + 4 * batch * heads * dim * packed, packed: packed_bytes };
            let out = [(); 2].map(|()| gpu.zeroed(2 * batch * heads * dim * packed));
            let read = || {
                // SAFETY: memory of this size that nobody else uses.
                unsafe { held.borrow_mut().cache.read(sinks, packed, Dtype::Bf16, out, gpu.stream()) }.unwrap();
            };
            bench.run(&format!("pages/dequantize/{scheme}/{shape}"), bytes, || (), read);
            for address in out {
                gpu.free(address);
            }
            held.into_inner().free(gpu);
        }
        gpu.free(k);
        gpu.free(v);
    }
}

/// One token for every sequence, seals included: 64 steps of 8 layers in a graph, per layer and step.
fn append(bench: &mut Bench<'_>, noise: &[u8]) {
    const LAYERS: usize = 8;
    const STEPS: usize = 64;
    /// Replays for which rows are there.
    const REPLAYS: usize = 40;
    let gpu = bench.gpu;
    for (scheme, batch, heads, dim) in [("nqkv4", 128, 8, 128), ("nqkv", 128, 8, 128), ("nqkv4", 8, 8, 128)] {
        let first = 128;
        let x = gpu.filled(2 * batch * heads * first * dim, noise);
        let room = first + STEPS * REPLAYS;
        let mut layers: Vec<Held> = (0..LAYERS).map(|_| Held::new(gpu, scheme, batch, heads, dim, room)).collect();
        let prompt = view(x, [batch, heads, first, dim]);
        let token = view(x, [batch, heads, 1, dim]);
        let restart = |layers: &mut Vec<Held>| {
            for held in layers {
                held.cache.crop(&vec![0; batch]).unwrap();
                // SAFETY: as in `pages`.
                unsafe { held.cache.append(&prompt, &prompt, gpu.stream()) }.unwrap();
                held.cache.reserve(STEPS * (REPLAYS - 2), gpu.stream()).unwrap();
            }
        };
        restart(&mut layers);
        let graph = gpu.graph(|| {
            for _ in 0..STEPS {
                for held in &mut layers {
                    // SAFETY: as in `pages`.
                    unsafe { held.cache.append(&token, &token, gpu.stream()) }.unwrap();
                }
            }
        });
        let page = layers[0].cache.codec().layout.page_bytes();
        // Read and written as they are, read again, and a share of a page.
        let each = batch * heads * (3 * 4 * dim + page / PAGE_TOKENS);
        let all = STEPS * LAYERS;
        let bytes = Bytes { moved: all * each, packed: all * batch * heads * page / PAGE_TOKENS };
        let mut left = 0;
        let ready = || {
            if left == 0 {
                restart(&mut layers);
                left = REPLAYS - 3;
            }
            left -= 1;
        };
        let us = bench.run(&format!("append/{scheme}/batch {batch}"), bytes, ready, || gpu.replay(graph));
        println!("append/{scheme}/batch {batch}: {:.2} us per layer and step\n", us / all as f64);
        layers.into_iter().for_each(|held| held.free(gpu));
        gpu.free(x);
    }
}

fn main() {
    let gpu = match Gpu::new() {
        Ok(gpu) => gpu,
        Err(why) => return println!("skipped: {why}"),
    };
    println!("{}", gpu.device.name().unwrap_or_default());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300))
        .without_plots()
        .configure_from_args();
    let noise = noise(1 << 22);
    {
        let mut bench = Bench { gpu: &gpu, group: criterion.benchmark_group("cuda"), copy: 0.0 };
        ceilings(&mut bench, &noise);
        flat(&mut bench, &noise);
        pages(&mut bench, &noise);
        append(&mut bench, &noise);
        bench.group.finish();
    }
    criterion.final_summary();
}
