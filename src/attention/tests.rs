//! Fast path against oracle, oracle against the plain formula on decoded tokens.

use std::sync::Arc;

use super::math::Simd;
use super::*;
use crate::scheme::{BookSpec, Scheme};
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// Noise of about unit variance.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (s >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum()).collect()
}

/// A cache over memory of its own, every byte 0xff (NaN fields) before it is written.
struct Owned {
    cache: LayerCache,
    _pool: Vec<u8>,
}

fn owned(scheme: &Scheme, batch: usize, heads: usize, kd: usize, vd: usize, exact: Dtype) -> Owned {
    let codec = Arc::new(PageCodec::new(scheme, heads, kd, vd).unwrap());
    let rows = 40;
    let mut pool = vec![0xffu8; rows * codec.row_bytes()];
    let mut cache = LayerCache::new(codec, exact, batch);
    // SAFETY: the pool lives beside the cache and nobody else touches it.
    unsafe { cache.add_rows(pool.as_mut_ptr(), rows, Box::new(())) };
    Owned { cache, _pool: pool }
}

impl Owned {
    /// Appends `tokens` of noise around an offset per channel.
    fn append(&mut self, tokens: usize, seed: u64) {
        let (batch, c) = (self.cache.batch(), self.cache.codec());
        let (heads, kd, vd) = (c.heads, c.key.layout.dim, c.value.layout.dim);
        let (mut k, v) = (noise(batch * heads * tokens * kd, seed), noise(batch * heads * tokens * vd, seed + 1));
        let offset = noise(kd, 99);
        k.chunks_exact_mut(kd).for_each(|row| row.iter_mut().zip(&offset).for_each(|(x, o)| *x += 3.0 * o));
        self.cache.append(&View::of(&k, [batch, heads, tokens, kd]), &View::of(&v, [batch, heads, tokens, vd])).unwrap();
    }

    /// Pages with partial counts in several rows, and a tail.
    fn ragged(scheme: &Scheme, batch: usize, heads: usize, kd: usize, vd: usize) -> Self {
        let mut o = owned(scheme, batch, heads, kd, vd, Dtype::F32);
        let window = scheme.residual_length + scheme.sink_tokens;
        for (i, (add, remove)) in
            [(130 + window, 9 + window), (70 + window, 30), (150, 3 + window), (100 + window, 0)].into_iter().enumerate()
        {
            o.append(add, 7 + i as u64);
            o.cache.remove_newest(remove).unwrap();
        }
        o
    }
}

/// Relative error in the Frobenius norm.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let (mut d, mut s) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        d += (f64::from(*g) - w).powi(2);
        s += w * w;
    }
    if s == 0.0 { d.sqrt() } else { (d / s).sqrt() }
}

/// Runs oracle and fast paths and compares.
fn check(cache: &LayerCache, q: &Queries, note: &str) {
    let [batch, heads, count, _] = q.q.shape();
    let rows = batch * heads * count;
    let vd = cache.codec().value.layout.dim;
    let (mut want, mut want_lse) = (vec![f64::NAN; rows * vd], vec![f64::NAN; rows]);
    let reads = attend_f64(cache, q, &mut want, Some(&mut want_lse)).unwrap();
    let mut before: Option<(Simd, Vec<f32>, Vec<f32>)> = None;
    for simd in Simd::all() {
        let (mut out, mut lse) = (vec![f32::NAN; rows * vd], vec![f32::NAN; rows]);
        let plan = Plan::new(cache, q, out.len(), Some(lse.len())).unwrap();
        fast::attend(&plan, simd, &mut out, Some(&mut lse));
        assert_eq!(plan.count(), reads);
        let e = error(&out, &want);
        // Few columns and 4 bits meet 16-bit integers where there are any.
        let bound = if simd == Simd::Portable { 1e-5 } else { 1e-4 };
        assert!(e <= bound, "{note} {simd:?}: relative error {e}");
        for (g, w) in lse.iter().zip(&want_lse) {
            let near = (f64::from(*g) - w).abs() <= bound * w.abs().max(1.0);
            assert!(f64::from(*g) == *w || near, "{note} {simd:?}: {g} for {w}");
        }
        // Sums of integers are exact: AVX-512 gives the bits of AVX2.
        if let Some((other, x, y)) = before.replace((simd, out, lse)).filter(|b| b.0 != Simd::Portable) {
            let (_, out, lse) = before.as_ref().unwrap();
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&x) == bits(out) && bits(&y) == bits(lse), "{note}: {simd:?} and {other:?} differ");
        }
    }
}

/// Plain queries of unit noise, with scores of a few units.
fn queries<'a>(q: &[f32], shape: [usize; 4]) -> Queries<'a> {
    let scale = 1.0 / (shape[3] as f64).sqrt();
    Queries { q: View::of(q, shape), scale, starts: None, fresh: None, window: None, soft_cap: None }
}

#[test]
fn presets_shapes_and_groups_match_the_oracle() {
    for (i, name) in Scheme::presets().iter().enumerate() {
        let scheme = Scheme::preset(name).unwrap();
        for (heads, kd, vd) in [(1, 16, 16), (2, 64, 128), (3, 80, 80), (2, 128, 128), (1, 256, 64), (2, 20, 33)] {
            let o = Owned::ragged(&scheme, 2, heads, kd, vd);
            for (group, count) in [(1, 1), (3, 1), (7, 1), (3, 5), (1, 33)] {
                if (kd == 16 || kd == 128 || kd == 80) || (group, count) == (3, 1) {
                    let q = noise(2 * heads * group * count * kd, 50 + i as u64);
                    let shape = [2, heads * group, count, kd];
                    check(&o.cache, &queries(&q, shape), &format!("{name} {heads} {kd} {vd} {group} {count}"));
                }
            }
        }
    }
}

#[test]
fn starts_window_cap_and_fresh_match_the_oracle() {
    for name in Scheme::presets() {
        let o = Owned::ragged(&Scheme::preset(name).unwrap(), 2, 2, 64, 48);
        let tokens = o.cache.tokens(0);
        for count in [1, 5, 33] {
            let q = noise(2 * 6 * count * 64, 3);
            let plain = queries(&q, [2, 6, count, 64]);
            let starts = [3usize, tokens - count + 2];
            let (k, v) = (noise(2 * 2 * count * 64, 4), noise(2 * 2 * count * 48, 5));
            let fresh = Some((View::of(&k, [2, 2, count, 64]), View::of(&v, [2, 2, count, 48])));
            let note = format!("{name} {count}");
            check(&o.cache, &Queries { starts: Some(&starts), ..plain.clone() }, &note);
            for window in [1, 7, 64, 100] {
                check(&o.cache, &Queries { window: Some(window), ..plain.clone() }, &format!("{note} window {window}"));
            }
            check(&o.cache, &Queries { soft_cap: Some(5.0), ..plain.clone() }, &format!("{note} cap"));
            check(&o.cache, &Queries { fresh, ..plain.clone() }, &format!("{note} fresh"));
            let all = Queries { fresh, starts: Some(&starts), window: Some(90), soft_cap: Some(2.0), ..plain };
            check(&o.cache, &all, &format!("{note} all"));
        }
    }
}

#[test]
fn widths_orders_and_fields_match_the_oracle() {
    let with = |change: &dyn Fn(&mut Scheme)| {
        let mut s = Scheme::preset("nqkv4").unwrap();
        change(&mut s);
        s
    };
    use crate::codec::{ScaleDtype, ScaleKind};
    let schemes = [
        with(&|s| (s.key.codebook, s.value.codebook) = (BookSpec::Name("nf8".into()), BookSpec::Name("lloyd3".into()))),
        with(&|s| s.key.widths = Some(vec![4, 4, 2, 0])),
        with(&|s| (s.key.codebook, s.key.widths) = (BookSpec::Name("nf5".into()), Some(vec![8, 6, 5, 3]))),
        with(&|s| s.key.channel_order = Some(vec![(0..64).rev().collect(), (0..64).map(|c| (c * 5 + 3) % 64).collect()])),
        with(&|s| (s.key.block, s.value.block, s.value.scale) = (16, 16, ScaleKind::Minmax)),
        with(&|s| (s.key.scale, s.value.scale_dtype) = (ScaleKind::Absmax, ScaleDtype::E4m3)),
        with(&|s| (s.key.scale_dtype, s.value.scale_dtype) = (ScaleDtype::Fp32, ScaleDtype::Bf16)),
        with(&|s| s.key = crate::scheme::SideSpec { scale: ScaleKind::Minmax, ..s.value.clone() }),
        with(&|s| (s.key.codebook, s.value.codebook) = (BookSpec::Name("e2m1".into()), BookSpec::Name("e2m1".into()))),
    ];
    for (i, scheme) in schemes.iter().enumerate() {
        let o = Owned::ragged(scheme, 1, 2, 64, 64);
        let q = noise(6 * 17 * 64, 8);
        check(&o.cache, &queries(&q[..6 * 64], [1, 6, 1, 64]), &format!("scheme {i}"));
        check(&o.cache, &queries(&q, [1, 6, 17, 64]), &format!("scheme {i}, many"));
    }
}

#[test]
fn large_scores_many_runs_and_threads_agree() {
    for name in ["nqkv4", "kivi2", "nqkv"] {
        let mut o = owned(&Scheme::preset(name).unwrap(), 1, 1, 64, 64, Dtype::F16);
        o.append(2300, 1);
        let q = noise(4 * 64, 2);
        let queries = Queries { scale: 1.0, ..queries(&q, [1, 4, 1, 64]) };
        check(&o.cache, &queries, name);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0f32; 256];
            pool.install(|| attend(&o.cache, &queries, &mut out, None)).unwrap();
            out
        };
        let one = run(1);
        assert!((1..6).all(|t| run(t) == one), "{name}: bits depend on threads");
    }
}

#[test]
fn empty_caches_and_empty_reaches_give_zeros() {
    let mut o = owned(&Scheme::preset("nqkv4").unwrap(), 1, 1, 16, 16, Dtype::Bf16);
    let q = noise(32, 1);
    let none = attend(&o.cache, &queries(&[], [1, 2, 0, 16]), &mut [], None).unwrap();
    assert_eq!(none, ReadCount::default());
    o.append(3, 1);
    let (mut out, mut lse) = ([f32::NAN; 32], [f32::NAN; 2]);
    let starts = [9usize];
    let far = Queries { starts: Some(&starts), ..queries(&q, [1, 2, 1, 16]) };
    assert_eq!(attend(&o.cache, &far, &mut out, Some(&mut lse)).unwrap(), ReadCount::default());
    assert!(out.iter().all(|&x| x == 0.0) && lse == [f32::NEG_INFINITY; 2]);
    let (mut out, mut lse) = ([f64::NAN; 32], [f64::NAN; 2]);
    attend_f64(&o.cache, &far, &mut out, Some(&mut lse)).unwrap();
    assert!(out.iter().all(|&x| x == 0.0) && lse == [f64::NEG_INFINITY; 2]);
}

#[test]
fn the_oracle_is_the_plain_formula_on_decoded_tokens() {
    for name in Scheme::presets() {
        let o = Owned::ragged(&Scheme::preset(name).unwrap(), 2, 2, 32, 48);
        let (tokens, heads, group, count) = (o.cache.tokens(0), 2, 3, 4);
        let q = noise(2 * 6 * count * 32, 21);
        let mut out = vec![0f64; 2 * count * 6 * 48];
        let window = 100;
        let queries = Queries { window: Some(window), soft_cap: Some(6.0), ..queries(&q, [2, 6, count, 32]) };
        let reads = attend_f64(&o.cache, &queries, &mut out, None).unwrap();
        assert_eq!(reads.attended as usize, 2 * count * window);
        for b in 0..2 {
            let (mut k, mut v) = (vec![0f32; heads * tokens * 32], vec![0f32; heads * tokens * 48]);
            o.cache.read(b, 0, tokens, &mut k, &mut v).unwrap();
            for (j, i) in (0..heads * group).flat_map(|j| (0..count).map(move |i| (j, i))) {
                let at = tokens - count + i;
                let row = &q[((b * 6 + j) * count + i) * 32..][..32];
                let weights: Vec<f64> = (at + 1 - window..=at)
                    .map(|t| {
                        let key = &k[(j / group * tokens + t) * 32..][..32];
                        let dot: f64 = row.iter().zip(key).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                        (6.0 * (dot * queries.scale / 6.0).tanh()).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for c in 0..48 {
                    let column = weights.iter().zip(at + 1 - window..);
                    let want: f64 = column.map(|(w, t)| w * f64::from(v[(j / group * tokens + t) * 48 + c])).sum();
                    let got = out[((b * count + i) * 6 + j) * 48 + c];
                    assert!((got - want / sum).abs() < 1e-12, "{name}: {got} for {}", want / sum);
                }
            }
        }
    }
}

#[test]
fn refusals_name_the_argument() {
    let mut o = owned(&Scheme::preset("nqkv4").unwrap(), 1, 2, 16, 16, Dtype::F32);
    o.append(3, 1);
    let q = noise(6 * 4 * 16, 1);
    let message = |q: Queries, n: usize| attend(&o.cache, &q, &mut vec![0.0; n], None).unwrap_err().to_string();
    let good = || queries(&q[..64], [1, 4, 1, 16]);
    assert!(message(queries(&q[..64], [2, 2, 1, 16]), 64).contains("q: expected shape [1, q_heads, queries, 16]"));
    assert!(message(queries(&q[..48], [1, 3, 1, 16]), 48).contains("a multiple of 2 KV heads, got 3"));
    assert!(message(queries(&q[..128], [1, 2, 4, 16]), 128).contains("at most 3"));
    assert!(message(good(), 63).contains("out: expected shape [1, 1, 4, 16]"));
    assert!(message(Queries { window: Some(0), ..good() }, 64).contains("window"));
    assert!(message(Queries { soft_cap: Some(0.0), ..good() }, 64).contains("soft_cap"));
    assert!(message(Queries { starts: Some(&[0, 0]), ..good() }, 64).contains("starts: expected shape [1], got [2]"));
}

/// The error of the fast path of this machine.
fn fast_error(cache: &LayerCache, q: &Queries) -> f64 {
    let n = q.q.shape()[..3].iter().product::<usize>() * cache.codec().value.layout.dim;
    let (mut want, mut out) = (vec![0f64; n], vec![0f32; n]);
    attend_f64(cache, q, &mut want, None).unwrap();
    attend(cache, q, &mut out, None).unwrap();
    error(&out, &want)
}

#[test]
fn integers_match_the_oracle_over_awkward_shapes() {
    for name in Scheme::presets() {
        let scheme = Scheme::preset(name).unwrap();
        for dim in [64, 80, 96, 128, 256] {
            let o = Owned::ragged(&scheme, 1, 2, dim, dim);
            for group in [1, 2, 3, 4, 7, 8, 16] {
                let q = noise(2 * group * dim, group as u64);
                check(&o.cache, &queries(&q, [1, 2 * group, 1, dim]), &format!("{name} {dim} {group}"));
            }
        }
    }
}

#[test]
fn every_valid_count_matches_the_oracle() {
    let q = noise(8 * 64, 5);
    for name in ["nqkv4", "kivi4", "nqkv"] {
        let scheme = Scheme::preset(name).unwrap();
        let window = scheme.residual_length + scheme.sink_tokens;
        for count in 1..=64 {
            let mut o = owned(&scheme, 1, 2, 64, 64, Dtype::F32);
            // Unwritten slots hold NaN, or what was cut off.
            if name == "nqkv" {
                o.append(64 + count, count as u64);
            } else {
                o.append(160 + window, count as u64);
                let pages = o.cache.tokens(0) - scheme.sink_tokens - o.cache.view(0).packed();
                o.cache.remove_newest(pages + o.cache.view(0).packed() - 64 - count).unwrap();
            }
            assert_eq!(o.cache.view(0).pages.iter().map(|p| p.1).collect::<Vec<_>>(), [64, count], "{name}");
            check(&o.cache, &queries(&q, [1, 8, 1, 64]), &format!("{name}, {count} valid"));
        }
    }
}

/// 700 tokens of keys `size` times as large, and one of them `peak` times the first query.
fn peaked(scheme: &Scheme, size: f32, peak: f32, q: &[f32]) -> Owned {
    let (heads, dim, tokens) = (2, 128, 700);
    let mut o = owned(scheme, 1, heads, dim, dim, Dtype::F32);
    let (mut k, v) = (noise(heads * tokens * dim, 31), noise(heads * tokens * dim, 32));
    k[77 * dim..78 * dim].iter_mut().zip(q).for_each(|(k, q)| *k += peak * q);
    k.iter_mut().for_each(|k| *k *= size);
    let shape = [1, heads, tokens, dim];
    o.cache.append(&View::of(&k, shape), &View::of(&v, shape)).unwrap();
    o
}

#[test]
fn scales_large_scores_and_peaks_match_the_oracle() {
    let q = noise(8 * 128, 6);
    for name in Scheme::presets() {
        let scheme = Scheme::preset(name).unwrap();
        for size in [1e-6, 1e-3, 1.0, 30.0, 1e4] {
            let o = peaked(&scheme, size, 0.0, &q);
            let plain = queries(&q, [1, 8, 1, 128]);
            check(&o.cache, &plain, &format!("{name}, keys of {size}"));
            // Scores of about one unit, then of tens, whatever the keys' size.
            for spread in [1.0, 2.0, 4.0, 12.0] {
                let scale = spread * plain.scale / f64::from(size);
                check(&o.cache, &Queries { scale, ..plain.clone() }, &format!("{name}, keys of {size}, scores of {spread}"));
            }
        }
        for peak in [0.3, 0.5, 0.7, 1.0, 3.0] {
            let o = peaked(&scheme, 1.0, peak, &q);
            check(&o.cache, &queries(&q, [1, 8, 1, 128]), &format!("{name}, a token of {peak}"));
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn integers_are_used_where_they_are_close_enough() {
    if Simd::detect() == Simd::Portable {
        return;
    }
    let q = noise(8 * 128, 6);
    for name in ["nqkv4", "nqkv", "nqkv4-signed", "kivi4", "kivi2"] {
        let o = peaked(&Scheme::preset(name).unwrap(), 1.0, 0.0, &q);
        let plain = queries(&q, [1, 8, 1, 128]);
        let e = fast_error(&o.cache, &plain);
        assert!((2e-6..1e-4).contains(&e), "{name}: error {e} of integers");
        // Equal weights leave only the levels of values, in 16 bits; keys are exact beyond their limit.
        let e = fast_error(&o.cache, &Queries { scale: 1e3 * plain.scale, ..plain.clone() });
        assert!(e < 1e-4, "{name}: error {e} of large scores");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn integer_levels_are_near_the_levels() {
    use super::integers::Levels;
    for book in ["nf4", "l2signed4-64", "uniform4", "uniform2", "e2m1", "lloyd3"] {
        let book = BookSpec::Name(book.into()).build().unwrap().to_fp16().unwrap();
        let mut levels = [0f32; 16];
        levels.iter_mut().zip(book.levels()).for_each(|(to, l)| *to = *l);
        let found = Levels::of(&levels);
        assert_eq!(found, Levels::of(&levels));
        assert!(found.top <= 18_000.0 && found.error < 0.3 && found.error < 1e-4 * found.rms, "{found:?}");
        for (code, level) in levels.iter().enumerate() {
            assert!((found.word(code) * found.step - level).abs() <= 0.51 * found.step, "{level}: {found:?}");
        }
    }
}

/// Not a check: `cargo test --release --lib paths -- --ignored --nocapture` prints how long each path of this machine takes for
/// 32 query heads, 8 KV heads, head size 128 and 16,384 tokens: the shortest of many calls in turns, and the median of calls before
/// each of which something larger than most caches was read.
#[test]
#[ignore = "prints times"]
fn times_of_all_paths() {
    let (heads, tokens) = (8, 16_384);
    let large = vec![1u64; 1 << 25];
    for name in ["nqkv4", "nqkv"] {
        let codec = Arc::new(PageCodec::new(&Scheme::preset(name).unwrap(), heads, 128, 128).unwrap());
        let mut pool = vec![0u8; (tokens / 64 + 1) * codec.row_bytes()];
        let mut cache = LayerCache::new(codec, Dtype::Bf16, 1);
        // SAFETY: the pool outlives the cache.
        unsafe { cache.add_rows(pool.as_mut_ptr(), tokens / 64 + 1, Box::new(())) };
        let x = noise(heads * 1024 * 128, 1);
        for _ in 0..tokens / 1024 {
            let view = View::of(&x, [1, heads, 1024, 128]);
            cache.append(&view, &view).unwrap();
        }
        let q = noise(32 * 128, 2);
        let queries = queries(&q, [1, 32, 1, 128]);
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0f32; 32 * 128];
            let paths = Simd::all().into_iter().filter(|simd| *simd != Simd::Portable);
            let mut times: Vec<_> = paths.map(|simd| (simd, [Vec::new(), Vec::new()])).collect();
            for i in 0..240 {
                for (simd, times) in &mut times {
                    let cold = i % 6 == 0;
                    if cold {
                        pool.broadcast(|_| std::hint::black_box(large.iter().fold(0, |a, b| a ^ b)));
                    }
                    let start = std::time::Instant::now();
                    let plan = Plan::new(&cache, &queries, out.len(), None).unwrap();
                    pool.install(|| fast::attend(&plan, *simd, &mut out, None));
                    times[usize::from(cold)].push(start.elapsed().as_secs_f64() * 1e6);
                }
            }
            for (simd, mut times) in times {
                times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
                let [warm, cold] = [times[0][0], times[1][times[1].len() / 2]];
                eprintln!("{name} {threads} threads {simd:?}: {warm:.0} us, cold {cold:.0} us");
            }
        }
    }
}
