//! Random operations on random schemes, against a dense model of what every cache must hold.
//!
//! `NQKV_SOAK_OPS` (default 10,000) is the number of operations, `NQKV_SOAK_SEED` where they start. The model knows which
//! tokens were sealed together and what a page of exactly these tokens gives; it has no tables, rows or counts. After each
//! operation the touched cache is compared with it bit for bit, now and then every other cache too, and attention with
//! attention in f64 on the model's numbers. Rows must add up: none leaked, none lost, no memory outlives its caches.

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use common::{Alive, Random, any_scheme, number, view};
use nqkv_rs::attention::{Queries, attend, attend_f64};
use nqkv_rs::cache::LayerCache;
use nqkv_rs::file::{self, Layer};
use nqkv_rs::page::PAGE_TOKENS;
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::Dtype;

/// Keys and values of all heads, as they must be read.
type Numbers = Arc<(Vec<f32>, Vec<f32>)>;

/// One token of the model: what came in (rounded to the exact dtype), and what its page gives once it was sealed.
#[derive(Clone)]
struct Token {
    exact: Numbers,
    sealed: Option<Numbers>,
}

struct Model {
    sequences: Vec<Vec<Token>>,
}

/// What all caches of a run have in common.
struct Shape {
    codec: Arc<PageCodec>,
    exact: Dtype,
    alive: Alive,
}

struct Pair {
    cache: LayerCache,
    model: Model,
}

impl Shape {
    fn dims(&self) -> (usize, usize, usize) {
        (self.codec.heads, self.codec.key.layout.dim, self.codec.value.layout.dim)
    }

    fn token(&self, id: u64) -> Token {
        let (heads, kd, vd) = self.dims();
        let rounded = |x: f32| {
            let mut bytes = [0; 8];
            self.exact.write(&mut bytes, f64::from(x));
            self.exact.read(&bytes) as f32
        };
        let side = |dim: usize, first: usize| (0..heads * dim).map(|c| rounded(number(id, first + c))).collect();
        Token { exact: Arc::new((side(kd, 0), side(vd, 5000))), sealed: None }
    }

    /// Seals tokens that share a page, from slot `slot` on.
    fn seal(&self, tokens: &mut [Token], slot: usize) {
        let (heads, kd, vd) = self.dims();
        let mut row = vec![0; self.codec.row_bytes()];
        let gather =
            |key: bool| tokens.iter().flat_map(|t| if key { &t.exact.0 } else { &t.exact.1 }.clone()).collect::<Vec<_>>();
        self.codec.write(&mut row, slot, tokens.len(), &gather(true), &gather(false));
        for (i, token) in tokens.iter_mut().enumerate() {
            let (mut k, mut v) = (vec![0.0; heads * kd], vec![0.0; heads * vd]);
            for h in 0..heads {
                let halves = self.codec.halves(&row, h);
                self.codec.key.read(halves.0, h, slot + i, &mut k[h * kd..][..kd]);
                self.codec.value.read(halves.1, h, slot + i, &mut v[h * vd..][..vd]);
            }
            token.sealed = Some(Arc::new((k, v)));
        }
    }

    /// Seals what an append has made due.
    fn settle(&self, sequence: &mut [Token]) {
        let scheme = &self.codec.scheme;
        let sinks = scheme.sink_tokens.min(sequence.len());
        let exact: Vec<usize> = (sinks..sequence.len()).filter(|&t| sequence[t].sealed.is_none()).collect();
        let Some(&first) = exact.first() else { return };
        if scheme.writes_single_slots() {
            exact.iter().for_each(|&t| self.seal(&mut sequence[t..=t], 0));
            return;
        }
        let mut first = first;
        while sequence.len() - first >= scheme.residual_length + PAGE_TOKENS {
            self.seal(&mut sequence[first..first + PAGE_TOKENS], 0);
            first += PAGE_TOKENS;
        }
    }

    fn append(&self, pair: &mut Pair, ids: &[Vec<u64>]) {
        let (heads, kd, vd) = self.dims();
        let tokens = ids.first().map_or(0, Vec::len);
        let tensor = |dim: usize, first: usize| -> Vec<f32> {
            let head = |ids: &Vec<u64>, h: usize| {
                ids.iter().flat_map(|&id| (0..dim).map(move |c| number(id, first + h * dim + c))).collect::<Vec<f32>>()
            };
            ids.iter().flat_map(|ids| (0..heads).flat_map(|h| head(ids, h)).collect::<Vec<_>>()).collect()
        };
        let (k, v) = (tensor(kd, 0), tensor(vd, 5000));
        let missing = pair.cache.rows_missing(tokens);
        if missing > 0 {
            self.alive.grow(&mut pair.cache, missing);
        }
        pair.cache.append(&view(&k, [ids.len(), heads, tokens, kd]), &view(&v, [ids.len(), heads, tokens, vd])).unwrap();
        for (sequence, ids) in pair.model.sequences.iter_mut().zip(ids) {
            sequence.extend(ids.iter().map(|&id| self.token(id)));
            self.settle(sequence);
        }
    }

    /// The cache holds what the model holds, bit for bit, and its pages are full but where something was cut.
    fn check(&self, pair: &Pair, what: &str) {
        let (heads, kd, vd) = self.dims();
        assert_eq!(pair.cache.batch(), pair.model.sequences.len(), "{what}: sequences");
        for (b, sequence) in pair.model.sequences.iter().enumerate() {
            assert_eq!(pair.cache.tokens(b), sequence.len(), "{what}: tokens of sequence {b}");
            assert_eq!(pair.cache.packed(b), sequence.iter().filter(|t| t.sealed.is_some()).count(), "{what}: packed of {b}");
            let n = sequence.len();
            let (mut k, mut v) = (vec![0.0; heads * n * kd], vec![0.0; heads * n * vd]);
            pair.cache.read(b, 0, n, &mut k, &mut v).unwrap();
            for (t, token) in sequence.iter().enumerate() {
                let expected = token.sealed.as_ref().unwrap_or(&token.exact);
                for h in 0..heads {
                    let same = k[(h * n + t) * kd..][..kd] == expected.0[h * kd..][..kd]
                        && v[(h * n + t) * vd..][..vd] == expected.1[h * vd..][..vd];
                    assert!(same, "{what}: token {t} of sequence {b}, head {h} (of {n} tokens)");
                }
            }
        }
    }

    /// Attention on pages against the plain formula on the model's numbers.
    fn check_attention(&self, pair: &Pair, random: &mut Random, what: &str) {
        let (heads, kd, vd) = self.dims();
        let batch = pair.model.sequences.len();
        let shortest = pair.model.sequences.iter().map(Vec::len).min().unwrap_or(0);
        let queries = 1 + random.below(shortest.min(3));
        if batch == 0 || shortest == 0 {
            return;
        }
        let group = 1 + random.below(5);
        let seed = random.next() >> 20;
        let q: Vec<f32> = (0..batch * heads * group * queries * kd).map(|i| number(seed, i)).collect();
        let starts: Vec<usize> = pair.model.sequences.iter().map(|s| random.below(s.len() + 1)).collect();
        let args = Queries {
            q: view(&q, [batch, heads * group, queries, kd]),
            scale: 0.5 / (kd as f64).sqrt(),
            starts: random.one_in(2).then_some(&starts),
            fresh: None,
            window: random.one_in(3).then(|| 1 + random.below(100)),
            soft_cap: random.one_in(3).then_some(5.0),
        };
        let rows = batch * queries * heads * group;
        let (mut wide, mut wide_lse) = (vec![0.0; rows * vd], vec![0.0; rows]);
        let (mut out, mut lse) = (vec![0.0; rows * vd], vec![0.0; rows]);
        let a = attend_f64(&pair.cache, &args, &mut wide, Some(&mut wide_lse)).unwrap();
        let b = attend(&pair.cache, &args, &mut out, Some(&mut lse)).unwrap();
        assert_eq!(a, b, "{what}: positions read");
        let (mut error, mut energy) = (0.0, 1e-12);
        for row in 0..rows {
            let (b, i, h) = (row / (queries * heads * group), row / (heads * group) % queries, row % (heads * group));
            let tokens = &pair.model.sequences[b];
            let at = tokens.len() - queries + i;
            let from = args.starts.map_or(0, |s| s[b]).max(args.window.map_or(0, |w| (at + 1).saturating_sub(w)));
            let q = &q[((b * heads * group + h) * queries + i) * kd..][..kd];
            let numbers = |t: usize| tokens[t].sealed.as_ref().unwrap_or(&tokens[t].exact);
            let scores: Vec<f64> = (from..=at)
                .map(|t| {
                    let k = &numbers(t).0[h / group * kd..][..kd];
                    let s = args.scale * q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
                    args.soft_cap.map_or(s, |cap| cap * (s / cap).tanh())
                })
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let expected_lse = if scores.is_empty() { f64::NEG_INFINITY } else { max + sum.ln() };
            for (got, tolerance) in [(wide_lse[row], 1e-9), (f64::from(lse[row]), 2e-3)] {
                assert!(got == expected_lse || (got - expected_lse).abs() < tolerance, "{what}: lse {got} {expected_lse}");
            }
            for c in 0..vd {
                let value = |(t, s): (usize, &f64)| (s - max).exp() * f64::from(numbers(from + t).1[h / group * vd + c]);
                let expected = if scores.is_empty() { 0.0 } else { scores.iter().enumerate().map(value).sum::<f64>() / sum };
                assert!((wide[row * vd + c] - expected).abs() < 1e-9, "{what}: f64 attention");
                error += (f64::from(out[row * vd + c]) - expected).powi(2);
                energy += expected.powi(2);
            }
        }
        assert!((error / energy).sqrt() < 1e-3, "{what}: attention is off by {}", (error / energy).sqrt());
    }
}

/// Own rows that are in use must be those that somebody's table names.
fn check_rows(world: &[Pair], what: &str) {
    // A row is known by the address of its bytes.
    let mut named = HashSet::new();
    for pair in world {
        for b in 0..pair.cache.batch() {
            named.extend(pair.cache.view(b).pages.iter().map(|p| p.0.as_ptr()));
        }
    }
    let used: usize = world.iter().map(|p| p.cache.rows() - p.cache.free_rows()).sum();
    // Rows of caches that are gone are named but nobody's own.
    assert!(used <= named.len(), "{what}: {used} rows in use, {} named: leaked", named.len());
}

fn saved_and_restored(shape: &Shape, pair: &Pair) -> LayerCache {
    let mut bytes = Vec::new();
    file::write(&mut bytes, &serde_json::Value::Null, &[Layer::Packed(&pair.cache)]).unwrap();
    let saved = file::open(&bytes).unwrap();
    let (data, keep) = shape.alive.keep(bytes[saved.pages(0).unwrap().range.clone()].into());
    // SAFETY: `keep` owns the copy of the pages at `data`.
    unsafe { saved.layer(0, &bytes, data, keep) }.unwrap()
}

/// One run: a scheme, a few caches, `ops` operations.
fn run(seed: u64, ops: usize) {
    let mut random = Random(seed);
    let scheme = any_scheme(&mut random);
    let (heads, kd, vd) = (1 + random.below(2), *random.pick(&[16, 20, 32]), *random.pick(&[16, 24]));
    let codec = Arc::new(PageCodec::new(&scheme, heads, kd, vd).unwrap());
    let exact = scheme.exact_dtype.unwrap_or(*random.pick(&[Dtype::F32, Dtype::F16, Dtype::Bf16]));
    let shape = Shape { codec, exact, alive: Alive::default() };
    let fresh = |batch: usize| Pair {
        cache: LayerCache::new(Arc::clone(&shape.codec), shape.exact, batch),
        model: Model { sequences: vec![Vec::new(); batch] },
    };
    let mut world = vec![fresh(1 + random.below(3))];
    let mut next_id = seed << 24;
    for op in 0..ops {
        let at = random.below(world.len());
        let pair = &mut world[at];
        let longest = pair.model.sequences.iter().map(Vec::len).max().unwrap_or(0);
        let name = match random.below(100) {
            0..45 => {
                let n = match random.below(8) {
                    0 => random.below(200),
                    1 => 64,
                    _ => random.below(9),
                };
                let n = if longest > 500 { 1 } else { n };
                let ids: Vec<Vec<u64>> = (0..pair.model.sequences.len())
                    .map(|_| {
                        next_id += n as u64;
                        (next_id - n as u64..next_id).collect()
                    })
                    .collect();
                shape.append(pair, &ids);
                "append"
            }
            45..55 => {
                let shortest = pair.model.sequences.iter().map(Vec::len).min().unwrap_or(0);
                let n = if random.one_in(2) { random.below(8) } else { random.below(150) }.min(shortest);
                pair.cache.remove_newest(n).unwrap();
                pair.model.sequences.iter_mut().for_each(|s| s.truncate(s.len() - n));
                "remove"
            }
            55..62 => {
                let lengths: Vec<usize> = pair.model.sequences.iter().map(|s| s.len() - random.below(100).min(s.len())).collect();
                pair.cache.crop(&lengths).unwrap();
                pair.model.sequences.iter_mut().zip(&lengths).for_each(|(s, &n)| s.truncate(n));
                "crop"
            }
            62..70 => {
                let batch = pair.model.sequences.len();
                let chosen: Vec<usize> = (0..random.below(4).max(1)).map(|_| random.below(batch)).collect();
                let chosen = if batch == 0 { Vec::new() } else { chosen };
                pair.cache.select(&chosen).unwrap();
                pair.model.sequences = chosen.iter().map(|&i| pair.model.sequences[i].clone()).collect();
                "select"
            }
            70..78 => {
                let copy = Pair { cache: pair.cache.fork(), model: Model { sequences: pair.model.sequences.clone() } };
                world.push(copy);
                "fork"
            }
            78..84 => {
                let other = random.below(world.len());
                let caches = [&world[at].cache, &world[other].cache];
                let cache = LayerCache::join(&caches).unwrap();
                let sequences = [at, other].iter().flat_map(|&i| world[i].model.sequences.clone()).collect();
                world.push(Pair { cache, model: Model { sequences } });
                let last = world.last_mut().unwrap();
                if last.model.sequences.len() > 4 {
                    last.cache.select(&[4, 0]).unwrap();
                    last.model.sequences = vec![last.model.sequences[4].clone(), last.model.sequences[0].clone()];
                }
                "join"
            }
            84..90 => {
                pair.cache = saved_and_restored(&shape, pair);
                "save, load"
            }
            90..92 => {
                pair.cache.reset();
                pair.model.sequences.iter_mut().for_each(Vec::clear);
                "reset"
            }
            _ => {
                world.swap_remove(at);
                "drop"
            }
        };
        while world.len() > 4 {
            let at = random.below(world.len());
            world.swap_remove(at);
        }
        if world.is_empty() {
            assert_eq!(shape.alive.count(), 0, "memory outlives its caches");
            world.push(fresh(1 + random.below(3)));
        }
        let what = format!("seed {seed}, operation {op} ({name}), scheme {}", scheme.to_json());
        shape.check(&world[at.min(world.len() - 1)], &what);
        shape.check(world.last().unwrap(), &what);
        if op % 16 == 0 {
            world.iter().for_each(|pair| shape.check(pair, &what));
        }
        if op % 8 == 0 {
            check_rows(&world, &what);
            let pair = random.below(world.len());
            shape.check_attention(&world[pair], &mut random, &what);
        }
    }
    world.clear();
    assert_eq!(shape.alive.count(), 0, "seed {seed}: memory outlives its caches");
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("{name}: expected a number, got {n}")))
}

#[test]
fn random_operations_hold_what_the_dense_model_holds() {
    const OPS: usize = 500;
    let (ops, first) = (setting("NQKV_SOAK_OPS", 10_000), setting("NQKV_SOAK_SEED", 1));
    let runs = ops.div_ceil(OPS);
    let mut said = Instant::now();
    for i in 0..runs {
        run((first + i) as u64, OPS);
        if said.elapsed().as_secs() >= 5 {
            eprintln!("soak: {} of {} operations", (i + 1) * OPS, runs * OPS);
            said = Instant::now();
        }
    }
}
