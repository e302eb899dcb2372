//! Softmax weights times value scales.

use std::arch::x86_64::*;

use super::{MOST, floats, magnitude};
use crate::attention::codes::Lane;
use crate::attention::integers::{Levels, RANGE, Words};
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

/// Squared distance of `x` times `factor` from integers.
#[target_feature(enable = "avx2,fma,f16c")]
fn distance(x: &[f32], factor: f32) -> f32 {
    let mut sum = _mm256_setzero_ps();
    for x in x.chunks_exact(8) {
        // SAFETY: eight elements.
        let x = unsafe { _mm256_mul_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_set1_ps(factor)) };
        let off = _mm256_sub_ps(x, _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x)));
        sum = _mm256_fmadd_ps(off, off, sum);
    }
    floats(sum).iter().sum()
}

/// Weights of the values of a group of pages.
#[derive(Default)]
pub(in crate::attention) struct Weights {
    products: Vec<f32>,
    words: Vec<Words>,
    /// `[pair][column]`.
    factors: Vec<[f32; 4]>,
    exact: Vec<Lane>,
    /// Squared error and squared norm of this run so far, `[column][pair]`: what earlier pages did not need, later ones may.
    spent: Vec<[f32; 2]>,
    /// The same with the pages that are being laid out.
    tried: Vec<[f32; 2]>,
}

impl Weights {
    /// Begins a run.
    pub(in crate::attention) fn begin(&mut self, columns: usize, pairs: usize) {
        self.spent.clear();
        self.spent.resize(columns * pairs, [0.0; 2]);
    }

    /// Lays out the columns from `first` on for integers, `[pair][page][half][n%2][share]`; false if they are not close enough.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::attention) fn lay<'a>(
        &mut self,
        first: usize,
        share: usize,
        pairs: &[[usize; 2]],
        scales: &Scales,
        levels: &Levels,
        weights: &impl Fn(usize, usize) -> &'a [f32],
    ) -> bool {
        let pages = scales.pages;
        self.products.resize(pages * PAGE_TOKENS, 0.0);
        self.words.resize(pairs.len() * pages * 4 * share, Words::default());
        self.factors.clear();
        self.factors.resize(pairs.len(), [0.0; SHARED]);
        self.tried.clone_from(&self.spent);
        for (n, pair) in pairs.iter().enumerate() {
            for i in 0..share {
                // Rows of eight places that meet in one 32-bit sum: 0, 1, 4, 5 and the others.
                let mut sums = [_mm256_setzero_ps(); 2];
                let (mut top, mut energy) = (_mm256_setzero_ps(), _mm256_setzero_ps());
                for page in 0..pages {
                    let from = weights(i, page).chunks_exact(8).zip(scales.of(page, pair[0]).chunks_exact(8));
                    let to = self.products[page * PAGE_TOKENS..][..PAGE_TOKENS].chunks_exact_mut(8);
                    for (row, (to, (p, scale))) in to.zip(from).enumerate() {
                        // SAFETY: eight elements each.
                        unsafe {
                            let x = _mm256_mul_ps(_mm256_loadu_ps(p.as_ptr()), _mm256_loadu_ps(scale.as_ptr()));
                            _mm256_storeu_ps(to.as_mut_ptr(), x);
                            let size = magnitude(x);
                            sums[row / 2 % 2] = _mm256_add_ps(sums[row / 2 % 2], size);
                            // In this order a NaN passes.
                            top = _mm256_max_ps(top, size);
                            energy = _mm256_fmadd_ps(x, x, energy);
                        }
                    }
                }
                let larger = |a: f32, b: f32| if a > b { a } else { b };
                let sum = floats(_mm256_hadd_ps(sums[0], sums[1])).into_iter().fold(0.0, larger);
                let top = floats(top).into_iter().fold(0.0, larger);
                let energy = floats(energy).iter().sum::<f32>();
                let factor = (RANGE / (levels.top * sum)).min(32767.0 / top).min(MOST);
                let inverse = 1.0 / factor;
                let [spent, norm] = &mut self.tried[(first + i) * pairs.len() + n];
                *norm += energy;
                let limit = WEIGHT_ERROR * WEIGHT_ERROR * *norm - *spent;
                let mut error = (pages * PAGE_TOKENS) as f32 / 12.0 * inverse * inverse;
                // Where few weights dominate, most of the others round to nothing: the estimate is too high.
                // A NaN is beyond it, too.
                let beyond = |error: f32| error > limit || error.is_nan() || limit.is_nan();
                if beyond(error) {
                    error = distance(&self.products, factor) * inverse * inverse;
                    if beyond(error) {
                        return false;
                    }
                }
                *spent += error;
                self.factors[n][i] = inverse * levels.step;
                self.round(n, i, pages, share, factor);
            }
        }
        std::mem::swap(&mut self.spent, &mut self.tried);
        true
    }

    /// Rounds the products of column `i` and puts them where the integers want them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round(&mut self, n: usize, i: usize, pages: usize, share: usize, factor: f32) {
        let factor = _mm256_set1_ps(factor);
        let words = &mut self.words[n * pages * 4 * share..][..pages * 4 * share];
        for (page, rows) in self.products.chunks_exact(PAGE_TOKENS).enumerate() {
            let row = |r: usize| {
                // SAFETY: eight elements.
                let x = unsafe { _mm256_loadu_ps(rows[8 * r..][..8].as_ptr()) };
                _mm256_cvtps_epi32(_mm256_mul_ps(x, factor))
            };
            for (at, r) in [0, 1, 4, 5].into_iter().enumerate() {
                // Halves of a register are two rows: this one and the one two further.
                let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(row(r), row(r + 2)));
                let to = &mut words[(page * 4 + at) * share + i];
                // SAFETY: 16 aligned words.
                unsafe { _mm256_store_si256(to.0.as_mut_ptr().cast(), x) };
            }
        }
    }

    /// Words and factors (times the levels' step) of all blocks.
    pub(in crate::attention) fn integers(&self) -> (*const Words, &[[f32; 4]]) {
        (self.words.as_ptr(), &self.factors)
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
