//! Queries times key scales.

use std::arch::x86_64::*;
use std::sync::Arc;

use super::{MOST, floats, halves, magnitude, total};
use crate::attention::codes::Lane;
use crate::attention::integers::{FLUSH, Levels, RANGE, Words};
use crate::attention::lanes::SHARED;
use crate::page::{MAX_HEAD_DIM, PAGE_TOKENS, SLAB_CHANNELS};

/// Largest expected error of a score from rounding: that much of the weight of its token.
const SCORE_ERROR: f32 = 7e-5;

/// Byte orders that pick channels `c, c + 8`, then `c + 1, c + 9`, from words `c, c + 1, c + 8, c + 9`, four times.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn picks() -> [__m256i; 2] {
    [0u8, 2].map(|odd| _mm256_set1_epi32(i32::from_le_bytes([odd, odd + 1, odd + 4, odd + 5])))
}

/// Eight numbers times `scale` and `factor` as words, each half twice.
///
/// # Safety
/// `from` must have eight numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn word(from: *const f32, scale: __m256, factor: f32) -> __m256i {
    // SAFETY: the caller's.
    let x = _mm256_mul_ps(unsafe { _mm256_loadu_ps(from) }, scale);
    let x = _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(factor)));
    _mm256_packs_epi32(x, x)
}

/// Queries of a page, or of all pages if scales are per token.
#[derive(Default)]
pub(in crate::attention) struct Queries {
    stored: usize,
    limits: Limits,
    /// Token groups that have scales of their own.
    groups: usize,
    /// `[group][stored]`.
    scales: Vec<f32>,
    means: Vec<f32>,
    /// First slab and slabs of what shares sums, and where each range begins in them.
    chunks: Vec<(usize, usize)>,
    starts: Vec<(usize, usize)>,
    words: Vec<Words>,
    factors: Vec<f32>,
    /// Expected squared error of a score, and products with means by `n / 8`, for each column.
    errors: Vec<f32>,
    bases: Vec<[f32; 8]>,
    exact: Vec<Lane>,
}

/// What integers can hold of some levels.
#[derive(Clone, Copy, Default)]
struct Limits {
    top: f32,
    rms: f32,
    error: f32,
}

impl Queries {
    /// Begins a head: `ranges` are first slab, slabs and block of what has common scales.
    pub(in crate::attention) fn begin(&mut self, levels: &[Arc<Levels>], ranges: &[(usize, usize, usize)]) {
        self.stored = levels.len() * SLAB_CHANNELS;
        self.chunks.clear();
        self.starts.clear();
        for &(first, slabs, _) in ranges {
            self.starts.push((first, self.chunks.len()));
            self.chunks.extend((0..slabs).step_by(FLUSH).map(|s| (first + s, FLUSH.min(slabs - s))));
        }
        let most = |f: fn(&Levels) -> f32| levels.iter().map(|l| f(l)).fold(0.0, f32::max);
        self.limits = Limits { top: most(|l| l.top), rms: most(|l| l.rms), error: most(|l| l.error) };
    }

    /// Lays out all columns for integers. `q` and `steps` (times the levels' steps) are `[column][stored]`; `scales` are the fields
    /// of a page, how many there are for a channel, and the tokens of a group.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::attention) fn lay(&mut self, q: &[f32], steps: &[f32], scales: Option<(&[f32], usize, usize)>) {
        let (stored, limits) = (self.stored, self.limits);
        let columns = q.len() / stored;
        self.groups = scales.map_or(1, |s| PAGE_TOKENS / s.2);
        self.read_scales(scales);
        self.words.resize(columns * stored / 4 * self.wide(), Words::default());
        self.factors.resize(columns * self.chunks.len(), 0.0);
        self.errors.resize(columns, 0.0);
        self.bases.resize(columns, [0.0; 8]);
        for first in (0..columns).step_by(SHARED) {
            let (q, steps) = (&q[first * stored..], &steps[first * stored..]);
            match columns - first {
                1 => self.part::<1>(first, q, steps, limits),
                2 => self.part::<2>(first, q, steps, limits),
                3 => self.part::<3>(first, q, steps, limits),
                _ => self.part::<4>(first, q, steps, limits),
            }
        }
    }

    /// Words for each eight channels, column and parity: one, or two if tokens differ.
    fn wide(&self) -> usize {
        if self.groups > 1 { 2 } else { 1 }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn read_scales(&mut self, scales: Option<(&[f32], usize, usize)>) {
        let len = self.groups * self.stored;
        self.scales.resize(len, 1.0);
        self.means.resize(len, 0.0);
        match scales {
            Some((fields, 2, _)) => {
                let to = self.scales.chunks_exact_mut(8).zip(self.means.chunks_exact_mut(8));
                for (x, (s, m)) in fields.chunks_exact(16).zip(to) {
                    // SAFETY: 16, 8 and 8 elements: four scales, four means, and again.
                    unsafe {
                        let (x, y) = (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8)));
                        _mm256_storeu_ps(s.as_mut_ptr(), _mm256_permute2f128_ps::<0x20>(x, y));
                        _mm256_storeu_ps(m.as_mut_ptr(), _mm256_permute2f128_ps::<0x31>(x, y));
                    }
                }
                return;
            }
            Some((fields, _, _)) => self.scales.copy_from_slice(&fields[..len]),
            None => self.scales.fill(1.0),
        }
        self.means.fill(0.0);
    }

    /// Lays out `C` columns from `first` on; `q` and `steps` begin there.
    #[allow(clippy::needless_range_loop)] // Columns and groups index everything.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn part<const C: usize>(&mut self, first: usize, q: &[f32], steps: &[f32], limits: Limits) {
        let (stored, groups, all) = (self.stored, self.groups, |x: f32| _mm256_set1_ps(x));
        assert!(q.len() >= C * stored && steps.len() >= C * stored && self.scales.len() == groups * stored);
        assert!(self.means.len() == groups * stored && self.chunks.iter().all(|c| (c.0 + c.1) * SLAB_CHANNELS <= stored));
        let mut bases = [[_mm256_setzero_ps(); 4]; C];
        let mut factors = [[0.0; C]; MAX_HEAD_DIM / SLAB_CHANNELS];
        self.errors[first..first + C].fill(0.0);
        // Eight sums at a time: four columns of two chunks.
        for n in (0..self.chunks.len()).step_by(2) {
            let (mut sums, mut squares) = ([_mm256_setzero_ps(); 8], [_mm256_setzero_ps(); 8]);
            let mut lens = Lane::default();
            for (k, &(slab, slabs)) in self.chunks[n..].iter().take(2).enumerate() {
                for g in 0..groups {
                    let (mut sum, mut square) = ([_mm256_setzero_ps(); C], [_mm256_setzero_ps(); C]);
                    for at in (slab * SLAB_CHANNELS..(slab + slabs) * SLAB_CHANNELS).step_by(8) {
                        // SAFETY: eight channels of columns and groups, as asserted.
                        unsafe {
                            let scale = _mm256_loadu_ps(self.scales.as_ptr().add(g * stored + at));
                            let mean = _mm256_loadu_ps(self.means.as_ptr().add(g * stored + at));
                            for c in 0..C {
                                let x = _mm256_mul_ps(_mm256_loadu_ps(steps.as_ptr().add(c * stored + at)), scale);
                                sum[c] = _mm256_add_ps(sum[c], magnitude(x));
                                square[c] = _mm256_fmadd_ps(x, x, square[c]);
                                let q = _mm256_loadu_ps(q.as_ptr().add(c * stored + at));
                                bases[c][g] = _mm256_fmadd_ps(q, mean, bases[c][g]);
                            }
                        }
                    }
                    for c in 0..C {
                        // The larger of each part bounds what any token group has.
                        sums[4 * k + c] = _mm256_max_ps(sums[4 * k + c], sum[c]);
                        squares[4 * k + c] = _mm256_max_ps(squares[4 * k + c], square[c]);
                    }
                }
                lens.0[4 * k..][..C].fill((slabs * SLAB_CHANNELS) as f32 / 12.0);
            }
            // Halves of a register meet in different sums.
            let [low, high] = halves(sums, |a, b| _mm256_hadd_ps(a, b));
            let sum = _mm256_max_ps(low, high);
            let [low, high] = halves(squares, |a, b| {
                _mm256_max_ps(_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b))
            });
            // What shares a lane bounds the largest.
            let top = _mm256_sqrt_ps(_mm256_max_ps(low, high));
            let inverse = _mm256_max_ps(_mm256_mul_ps(top, all(1.0 / 32767.0)), _mm256_mul_ps(sum, all(limits.top / RANGE)));
            let inverse = _mm256_max_ps(all(1.0 / MOST), inverse);
            let factor = _mm256_div_ps(all(1.0), inverse);
            let [low, high] = halves(squares, |a, b| _mm256_hadd_ps(a, b));
            let rounding = _mm256_mul_ps(all(limits.rms), inverse);
            let levels = _mm256_mul_ps(_mm256_add_ps(low, high), all(limits.error * limits.error));
            // SAFETY: eight aligned elements.
            let lens = unsafe { _mm256_load_ps(lens.0.as_ptr()) };
            let error = floats(_mm256_fmadd_ps(_mm256_mul_ps(rounding, rounding), lens, levels));
            let (factor, inverse) = (floats(factor), floats(inverse));
            for k in 0..2.min(self.chunks.len() - n) {
                self.factors[first * self.chunks.len() + (n + k) * C..][..C].copy_from_slice(&inverse[4 * k..][..C]);
                for c in 0..C {
                    self.errors[first + c] += error[4 * k + c];
                }
                factors[n + k] = std::array::from_fn(|c| factor[4 * k + c]);
            }
        }
        // Apart from the above, so that nothing waits for the divisions.
        for (n, factors) in factors.into_iter().enumerate().take(self.chunks.len()) {
            if groups == 1 {
                self.round::<C>(first, self.chunks[n], steps, factors);
            } else {
                self.round_split::<C>(first, self.chunks[n], steps, factors);
            }
        }
        for (to, base) in self.bases[first..].iter_mut().zip(bases) {
            for (g, base) in base.into_iter().enumerate().take(groups) {
                to[g * 8 / groups..(g + 1) * 8 / groups].fill(total(base));
            }
        }
    }

    /// Rounds products of some slabs and puts them where the integers want them.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round<const C: usize>(&mut self, first: usize, (slab, slabs): (usize, usize), steps: &[f32], factors: [f32; C]) {
        let (pick, stored) = (picks(), self.stored);
        let words = &mut self.words[first * stored / 4 + slab * 4 * C..][..slabs * 4 * C];
        let scales = &self.scales[slab * SLAB_CHANNELS..][..slabs * SLAB_CHANNELS];
        let steps = &steps[slab * SLAB_CHANNELS..][..(C - 1) * stored + slabs * SLAB_CHANNELS];
        for (eight, (scale, words)) in scales.chunks_exact(8).zip(words.chunks_exact_mut(2 * C)).enumerate() {
            // SAFETY: eight channels of each column, and 2 C words.
            unsafe {
                let (scale, to) = (_mm256_loadu_ps(scale.as_ptr()), words.as_mut_ptr().cast::<__m256i>());
                for (c, factor) in factors.into_iter().enumerate() {
                    let x = word(steps.as_ptr().add(c * stored + 8 * eight), scale, factor);
                    _mm256_store_si256(to.add(c), _mm256_shuffle_epi8(x, pick[0]));
                    _mm256_store_si256(to.add(C + c), _mm256_shuffle_epi8(x, pick[1]));
                }
            }
        }
    }

    /// As [`Queries::round`], where token groups differ.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round_split<const C: usize>(&mut self, first: usize, (slab, slabs): (usize, usize), steps: &[f32], factors: [f32; C]) {
        let (pick, stored, groups) = (picks(), self.stored, self.groups);
        let words = &mut self.words[2 * (first * stored / 4 + slab * 4 * C)..][..2 * slabs * 4 * C];
        let scales = &self.scales[slab * SLAB_CHANNELS..][..(groups - 1) * stored + slabs * SLAB_CHANNELS];
        let steps = &steps[slab * SLAB_CHANNELS..][..(C - 1) * stored + slabs * SLAB_CHANNELS];
        for (eight, words) in words.chunks_exact_mut(4 * C).enumerate() {
            // SAFETY: eight channels of each column and group, and 4 C words.
            unsafe {
                let to = words.as_mut_ptr().cast::<__m256i>();
                // Four numbers of a half are tokens 8 k.
                let group = |k: usize| _mm256_loadu_ps(scales.as_ptr().add(k * groups / 4 * stored + 8 * eight));
                let scales = [group(0), group(1), group(2), group(3)];
                for (c, factor) in factors.into_iter().enumerate() {
                    let x = scales.map(|s| word(steps.as_ptr().add(c * stored + 8 * eight), s, factor));
                    for (odd, pick) in pick.iter().enumerate() {
                        for which in 0..2 {
                            let y = [x[2 * which], x[2 * which + 1]].map(|x| _mm256_shuffle_epi8(x, *pick));
                            let y = _mm256_blend_epi32::<0b1100_1100>(y[0], y[1]);
                            _mm256_store_si256(to.add(odd * 2 * C + 2 * c + which), y);
                        }
                    }
                }
            }
        }
    }

    /// Whether integers are close enough for these columns, for scales per token of at most `most`.
    pub(in crate::attention) fn close_enough(&self, first: usize, share: usize, most: f32) -> bool {
        self.errors[first..first + share].iter().all(|e| e.sqrt() * most <= SCORE_ERROR)
    }

    /// Whether there are words for each 32 tokens.
    pub(in crate::attention) fn split(&self) -> bool {
        self.groups > 1
    }

    /// Words and factors of a range, for the columns from `first` on.
    pub(in crate::attention) fn integers(&self, first: usize, share: usize, range: usize) -> (*const Words, &[f32]) {
        let (slab, chunk) = self.starts[range];
        let end = self.starts.get(range + 1).map_or(self.chunks.len(), |s| s.1);
        let words = &self.words[(first * self.stored / 4 + slab * 4 * share) * self.wide()..];
        (words.as_ptr(), &self.factors[first * self.chunks.len()..][chunk * share..end * share])
    }

    /// Products of a column's query with the means, by `n / 8`.
    pub(in crate::attention) fn base(&self, column: usize) -> &[f32; 8] {
        &self.bases[column]
    }

    /// Lays out the columns from `first` on in fp32: `[group][slab][half][c%2][share]`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::attention) fn lay_exact(&mut self, first: usize, share: usize, q: &[f32]) {
        let stored = self.stored;
        self.exact.resize(self.groups * share * stored / 4, Lane::default());
        for (scales, lanes) in self.scales.chunks_exact(stored).zip(self.exact.chunks_exact_mut(share * stored / 4)) {
            for (eight, lanes) in lanes.chunks_exact_mut(2 * share).enumerate() {
                for i in 0..share {
                    let (q, s) = (&q[(first + i) * stored + 8 * eight..][..8], &scales[8 * eight..][..8]);
                    // SAFETY: eight elements each.
                    unsafe {
                        let x = _mm256_mul_ps(_mm256_loadu_ps(q.as_ptr()), _mm256_loadu_ps(s.as_ptr()));
                        // Even channels, then odd ones, each for both n/8.
                        _mm256_store_ps(lanes[i].0.as_mut_ptr(), _mm256_moveldup_ps(x));
                        _mm256_store_ps(lanes[share + i].0.as_mut_ptr(), _mm256_movehdup_ps(x));
                    }
                }
            }
        }
    }

    /// What was laid out in fp32 from a slab on, for each `n / 16`.
    pub(in crate::attention) fn exact(&self, share: usize, slab: usize) -> [*const Lane; 4] {
        [0, 1, 2, 3].map(|i| self.exact[(i * self.groups / 4 * self.stored / 4 + slab * 4) * share..].as_ptr())
    }
}
