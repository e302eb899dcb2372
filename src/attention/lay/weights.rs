//! Softmax weights times value scales.

use std::arch::x86_64::*;

use super::{MOST, floats, halves, magnitude, total};
use crate::attention::codes::Lane;
use crate::attention::integers::{GROUP, Levels, RANGE, Words};
use crate::attention::lanes::SHARED;
use crate::page::PAGE_TOKENS;

/// Largest error of all weights (times scales) of a run so far, against their Euclidean norm.
const WEIGHT_ERROR: f32 = 7e-5;

/// Scales of the values of some pages: `[page][block][64]`, in places.
pub(in crate::attention) struct Scales<'a> {
    pub(in crate::attention) fields: &'a [f32],
    pub(in crate::attention) blocks: usize,
    pub(in crate::attention) pages: usize,
}

impl Scales<'_> {
    fn of(&self, page: usize, block: usize) -> &[f32] {
        &self.fields[(page * self.blocks + block) * PAGE_TOKENS..][..PAGE_TOKENS]
    }
}

/// [`Sizes`] of the products of what `of` gives for each page.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sizes<'a>(pages: usize, of: impl Fn(usize) -> (&'a [f32], &'a [f32])) -> Sizes {
    let (mut maxima, mut squares) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
    for page in 0..pages {
        let (p, scale) = of(page);
        let (p, scale): (&[f32; PAGE_TOKENS], &[f32; PAGE_TOKENS]) =
            (p.try_into().expect("64 weights"), scale.try_into().expect("64 scales"));
        // Rows of eight places that meet in one 32-bit sum: 0, 1, 4, 5 and the others.
        let mut sums = [_mm256_setzero_ps(); 2];
        let (mut top, mut square) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for row in 0..8 {
            // SAFETY: eight of 64 elements each.
            let x =
                unsafe { _mm256_mul_ps(_mm256_loadu_ps(p.as_ptr().add(8 * row)), _mm256_loadu_ps(scale.as_ptr().add(8 * row))) };
            let size = magnitude(x);
            sums[row / 2 % 2] = _mm256_add_ps(sums[row / 2 % 2], size);
            top = _mm256_max_ps(top, size);
            square = _mm256_fmadd_ps(x, x, square);
        }
        (maxima[page], maxima[GROUP + page], squares[page]) = (_mm256_hadd_ps(sums[0], sums[1]), top, square);
    }
    let [low, high] =
        halves(maxima, |a, b| _mm256_max_ps(_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b)));
    let maxima = floats(_mm256_max_ps(low, high));
    let [low, high] = halves(squares, |a, b| _mm256_hadd_ps(a, b));
    let squares = floats(_mm256_add_ps(low, high));
    let four = |x: &[f32]| [x[0], x[1], x[2], x[3]];
    Sizes { sums: four(&maxima), tops: four(&maxima[GROUP..]), squares: four(&squares) }
}

/// Squared distance of `a` times `b` times `factor` from integers.
#[target_feature(enable = "avx2,fma,f16c")]
fn distance(a: &[f32], b: &[f32], factor: f32) -> f32 {
    let mut sum = _mm256_setzero_ps();
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        // SAFETY: eight elements each.
        let x = unsafe { _mm256_mul_ps(_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(b.as_ptr())) };
        let x = _mm256_mul_ps(x, _mm256_set1_ps(factor));
        let off = _mm256_sub_ps(x, _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x)));
        sum = _mm256_fmadd_ps(off, off, sum);
    }
    total(sum)
}

/// How a group of pages can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::attention) enum Reading {
    /// By integers with common factors.
    Together,
    /// Each page by itself: by integers with factors of its own, or in fp32 (false).
    Apart([bool; GROUP]),
}

/// Weights of the values of a group of pages.
#[derive(Default)]
pub(in crate::attention) struct Weights {
    /// `[page][pair][n%2][column]`.
    words: Vec<Words>,
    /// What a step of the integers is worth, `[page][pair][column]`.
    steps: Vec<[f32; SHARED]>,
    factors: Vec<[f32; SHARED]>,
    exact: Vec<Lane>,
    /// `[pair][column]`.
    sizes: Vec<Sizes>,
    /// Squared error and squared norm of this run so far, `[column][pair]`: what earlier pages did not need, later ones may.
    spent: Vec<[f32; 2]>,
    /// The same with the pages that are being laid out.
    tried: Vec<[f32; 2]>,
}

/// Of the weights (times scales) of each page: the largest sum of magnitudes that meets in one 32-bit sum, the largest
/// magnitude, the sum of squares.
#[derive(Debug, Clone, Copy, Default)]
struct Sizes {
    sums: [f32; GROUP],
    tops: [f32; GROUP],
    squares: [f32; GROUP],
}

/// What a step of integers is worth so that nothing overflows.
fn step(sum: f32, top: f32, levels: &Levels) -> f32 {
    (1.0 / MOST).max(sum * (levels.top / RANGE)).max(top * (1.0 / 32767.0))
}

/// Squared error from rounding, or infinity if it is no number.
fn rounding(pages: usize, step: f32) -> f32 {
    let error = (pages * PAGE_TOKENS) as f32 / 12.0 * step * step;
    if error.is_nan() { f32::INFINITY } else { error }
}

/// Whether a squared error is within the limit beside what was spent.
fn within(error: f32, [spent, norm]: [f32; 2]) -> bool {
    spent + error <= WEIGHT_ERROR * WEIGHT_ERROR * norm
}

impl Weights {
    /// Begins a run.
    pub(in crate::attention) fn begin(&mut self, columns: usize, pairs: usize) {
        self.spent.clear();
        self.spent.resize(columns * pairs, [0.0; 2]);
    }

    /// Lays out `C` columns from `first` on for integers, `[page][pair][n%2][C]`, as far as they are close enough.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::attention) fn lay<'a, const C: usize>(
        &mut self,
        first: usize,
        pairs: &[[usize; 2]],
        scales: &Scales,
        levels: &Levels,
        weights: &impl Fn(usize, usize) -> &'a [f32],
    ) -> Reading {
        let (pages, count) = (scales.pages, pairs.len());
        self.sizes.clear();
        for pair in pairs {
            for i in 0..C {
                self.sizes.push(sizes(pages, |page| (weights(i, page), scales.of(page, pair[0]))));
            }
        }
        self.steps.resize(pages * count, [0.0; SHARED]);
        self.factors.resize(pages * count, [0.0; SHARED]);
        self.words.resize(pages * count * 2 * C, Words::default());
        self.tried.clone_from(&self.spent);
        let mut together = true;
        for (at, sizes) in self.sizes.iter().enumerate() {
            let (n, i) = (at / C, at % C);
            let larger = |a: f32, b: &f32| if *b > a { *b } else { a };
            let step = step(sizes.sums.iter().sum(), sizes.tops.iter().fold(0.0, larger), levels);
            let budget = &mut self.tried[(first + i) * count + n];
            budget[1] += sizes.squares.iter().sum::<f32>();
            let error = rounding(pages, step);
            if !within(error, *budget) {
                together = false;
                break;
            }
            budget[0] += error;
            for page in 0..pages {
                (self.steps[page * count + n][i], self.factors[page * count + n][i]) = (step * levels.step, 1.0 / step);
            }
        }
        if together {
            std::mem::swap(&mut self.spent, &mut self.tried);
            (0..pages).for_each(|page| self.round::<C>(page, pairs, scales, weights));
            return Reading::Together;
        }
        let mut close = [false; GROUP];
        for (page, close) in close.iter_mut().enumerate().take(pages) {
            self.tried.clone_from(&self.spent);
            *close = true;
            for (at, sizes) in self.sizes.iter().enumerate() {
                let (n, i) = (at / C, at % C);
                let step = step(sizes.sums[page], sizes.tops[page], levels);
                let budget = &mut self.tried[(first + i) * count + n];
                budget[1] += sizes.squares[page];
                let mut error = rounding(1, step);
                if !within(error, *budget) {
                    // Where few weights dominate, most of the others round to nothing: the estimate is too high.
                    error = distance(weights(i, page), scales.of(page, pairs[n][0]), 1.0 / step) * step * step;
                }
                budget[0] += error;
                *close &= within(0.0, *budget);
                (self.steps[page * count + n][i], self.factors[page * count + n][i]) = (step * levels.step, 1.0 / step);
            }
            if *close {
                std::mem::swap(&mut self.spent, &mut self.tried);
                self.round::<C>(page, pairs, scales, weights);
            }
        }
        Reading::Apart(close)
    }

    /// Rounds the products of a page and puts them where the integers want them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round<'a, const C: usize>(
        &mut self,
        page: usize,
        pairs: &[[usize; 2]],
        scales: &Scales,
        weights: &impl Fn(usize, usize) -> &'a [f32],
    ) {
        let words = &mut self.words[page * pairs.len() * 2 * C..][..pairs.len() * 2 * C];
        for ((pair, words), factors) in pairs.iter().zip(words.chunks_exact_mut(2 * C)).zip(&self.factors[page * pairs.len()..]) {
            let scale: &[f32; PAGE_TOKENS] = scales.of(page, pair[0]).try_into().expect("64 scales");
            for i in 0..C {
                let p: &[f32; PAGE_TOKENS] = weights(i, page).try_into().expect("64 weights");
                let factor = _mm256_set1_ps(factors[i]);
                let row = |r: usize| {
                    // SAFETY: eight of 64 elements each.
                    let x = unsafe {
                        _mm256_mul_ps(_mm256_loadu_ps(p.as_ptr().add(8 * r)), _mm256_loadu_ps(scale.as_ptr().add(8 * r)))
                    };
                    _mm256_cvtps_epi32(_mm256_mul_ps(x, factor))
                };
                for (at, r) in [0, 1, 4, 5].into_iter().enumerate() {
                    // Halves of a register are two rows: this one and the one two further.
                    let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(row(r), row(r + 2)));
                    // SAFETY: 16 aligned words.
                    unsafe { _mm256_store_si256(words[at % 2 * C + i].0[at / 2 * 16..].as_mut_ptr().cast(), x) };
                }
            }
        }
    }

    /// Words and steps (times the levels' step) of a page and those after it.
    pub(in crate::attention) fn integers(&self, page: usize, pairs: usize, share: usize) -> (*const Words, &[[f32; 4]]) {
        (self.words[page * pairs * 2 * share..].as_ptr(), &self.steps[page * pairs..][..pairs])
    }

    /// Lays out `share` columns of one page in fp32: `[pair][n/16][half][n%2][share]`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::attention) fn lay_exact<'a>(
        &mut self,
        share: usize,
        pairs: &[[usize; 2]],
        scales: &Scales,
        page: usize,
        weights: &impl Fn(usize, usize) -> &'a [f32],
    ) -> *const Lane {
        self.exact.resize(pairs.len() * 16 * share, Lane::default());
        for (pair, lanes) in pairs.iter().zip(self.exact.chunks_exact_mut(16 * share)) {
            let scale = pair.map(|b| scales.of(page, b));
            for i in 0..share {
                let p = weights(i, page);
                // Both channels' weights of a row, side by side: tokens 8 k of 0, 1 and 4, 5, then of 2, 3 and 6, 7.
                let row = |r: usize| {
                    // SAFETY: eight elements each.
                    unsafe {
                        let p = _mm256_loadu_ps(p[8 * r..][..8].as_ptr());
                        let x = scale.map(|s| _mm256_mul_ps(p, _mm256_loadu_ps(s[8 * r..][..8].as_ptr())));
                        [_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1])]
                    }
                };
                for (at, r) in [0, 1, 4, 5].into_iter().enumerate() {
                    let (x, y) = (row(r), row(r + 2));
                    for k in 0..2 {
                        let both = [_mm256_permute2f128_ps::<0x20>(x[k], y[k]), _mm256_permute2f128_ps::<0x31>(x[k], y[k])];
                        for (high, both) in both.into_iter().enumerate() {
                            let to = &mut lanes[((2 * high + k) * 4 + at) * share + i];
                            // SAFETY: eight aligned elements.
                            unsafe { _mm256_store_ps(to.0.as_mut_ptr(), both) };
                        }
                    }
                }
            }
        }
        self.exact.as_ptr()
    }
}
