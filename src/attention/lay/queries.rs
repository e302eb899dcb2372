//! Queries times key scales.

use std::arch::x86_64::*;
use std::sync::Arc;

use super::{MOST, floats, halves, magnitude, total};
use crate::attention::codes::Lane;
use crate::attention::integers::{FLUSH, Levels, RANGE, Words};
use crate::attention::lanes::SHARED;
use crate::codec::ScaleDtype;
use crate::page::{MAX_HEAD_DIM, PAGE_TOKENS, SLAB_CHANNELS};

/// Largest expected error of a score from rounding: that much of the weight of its token.
const SCORE_ERROR: f32 = 7e-5;

/// Byte orders that pick channels `c, c + 8`, then `c + 1, c + 9`, from words `c, c + 1, c + 8, c + 9`, four times; then the same
/// from four words further.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn picks() -> [__m256i; 4] {
    [0u8, 2, 8, 10].map(|at| _mm256_set1_epi32(i32::from_le_bytes([at, at + 1, at + 4, at + 5])))
}

/// Eight channels times steps, `scale` and `factor`, rounded.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rounded(eight: &Eight, scale: __m256, factor: f32) -> __m256i {
    // SAFETY: eight aligned numbers.
    let x = _mm256_mul_ps(unsafe { _mm256_load_ps(eight.steps.0.as_ptr()) }, scale);
    _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(factor)))
}

/// Fields per channel of a page: their bytes, how many there are for a channel, and the tokens of a group.
#[derive(Clone, Copy)]
pub(in crate::attention) struct KeyFields<'a> {
    pub(in crate::attention) bytes: &'a [u8],
    pub(in crate::attention) dtype: ScaleDtype,
    pub(in crate::attention) fields: usize,
    pub(in crate::attention) group: usize,
}

/// Queries of a page, or of all pages if scales are per token.
#[derive(Default)]
pub(in crate::attention) struct Queries {
    stored: usize,
    limits: Limits,
    /// Queries, `[stored / 8][column]` for each [`SHARED`] columns: one pointer goes through all.
    eights: Vec<Eight>,
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

/// Eight channels of a query: as they are, times the levels' steps, and magnitudes and squares of the latter.
#[derive(Clone, Copy, Default)]
struct Eight {
    q: Lane,
    steps: Lane,
    sizes: Lane,
    squares: Lane,
}

/// What integers can hold of some levels.
#[derive(Clone, Copy, Default)]
struct Limits {
    top: f32,
    rms: f32,
    error: f32,
}

impl Queries {
    /// Begins a head: `q` is `[column][stored]`, `ranges` are first slab, slabs and block of what has common scales.
    pub(in crate::attention) fn begin(&mut self, q: &[f32], levels: &[Arc<Levels>], ranges: &[(usize, usize, usize)]) {
        self.stored = levels.len() * SLAB_CHANNELS;
        self.eights.clear();
        for part in q.chunks(SHARED * self.stored) {
            for at in (0..self.stored).step_by(8) {
                for row in part.chunks_exact(self.stored) {
                    let q = Lane(row[at..at + 8].try_into().expect("eight channels"));
                    let steps = q.0.map(|x| x * levels[at / SLAB_CHANNELS].step);
                    let (sizes, squares) = (Lane(steps.map(f32::abs)), Lane(steps.map(|x| x * x)));
                    self.eights.push(Eight { q, steps: Lane(steps), sizes, squares });
                }
            }
        }
        self.chunks.clear();
        self.starts.clear();
        for &(first, slabs, _) in ranges {
            self.starts.push((first, self.chunks.len()));
            self.chunks.extend((0..slabs).step_by(FLUSH).map(|s| (first + s, FLUSH.min(slabs - s))));
        }
        let most = |f: fn(&Levels) -> f32| levels.iter().map(|l| f(l)).fold(0.0, f32::max);
        self.limits = Limits { top: most(|l| l.top), rms: most(|l| l.rms), error: most(|l| l.error) };
    }

    /// Lays out all columns for integers.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::attention) fn lay(&mut self, fields: Option<KeyFields>) {
        let stored = self.stored;
        let columns = 8 * self.eights.len() / stored;
        self.groups = fields.map_or(1, |f| PAGE_TOKENS / f.group);
        self.read(fields);
        self.words.resize(columns * stored / 8 * self.wide(), Words::default());
        self.factors.resize(columns * self.chunks.len(), 0.0);
        self.errors.resize(columns, 0.0);
        self.bases.resize(columns, [0.0; 8]);
        for first in (0..columns).step_by(SHARED) {
            match columns - first {
                1 => self.part::<1>(first),
                2 => self.part::<2>(first),
                3 => self.part::<3>(first),
                _ => self.part::<4>(first),
            }
        }
    }

    /// Words for each slab, column and parity: one, or two if tokens differ.
    fn wide(&self) -> usize {
        if self.groups > 1 { 2 } else { 1 }
    }

    /// Scales and means of a page.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn read(&mut self, fields: Option<KeyFields>) {
        let len = self.groups * self.stored;
        self.scales.resize(len, 1.0);
        self.means.resize(len, 0.0);
        let Some(KeyFields { bytes, dtype, fields, .. }) = fields else {
            self.scales.fill(1.0);
            self.means.fill(0.0);
            return;
        };
        let z = dtype.bytes();
        assert!(bytes.len() >= len * fields * z);
        if (dtype, fields) == (ScaleDtype::Fp16, 2) {
            let to = self.scales.chunks_exact_mut(8).zip(self.means.chunks_exact_mut(8));
            for (x, (s, m)) in bytes.chunks_exact(32).zip(to) {
                // SAFETY: 32 bytes: four scales, four means, and again; eight elements each.
                unsafe {
                    let [x, y] = [0, 16].map(|at| _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(at).cast())));
                    _mm256_storeu_ps(s.as_mut_ptr(), _mm256_permute2f128_ps::<0x20>(x, y));
                    _mm256_storeu_ps(m.as_mut_ptr(), _mm256_permute2f128_ps::<0x31>(x, y));
                }
            }
            return;
        }
        for (i, (s, m)) in self.scales.iter_mut().zip(&mut self.means).enumerate() {
            // Four of each kind in turn.
            let at = (i / 4 * 4 * fields + i % 4) * z;
            *s = dtype.read(&bytes[at..]);
            *m = if fields == 2 { dtype.read(&bytes[at + 4 * z..]) } else { 0.0 };
        }
    }

    /// Lays out `C` columns from `first` on.
    #[allow(clippy::needless_range_loop)] // Columns and groups index everything.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn part<const C: usize>(&mut self, first: usize) {
        let (stored, groups, limits, all) = (self.stored, self.groups, self.limits, |x: f32| _mm256_set1_ps(x));
        let eights = &self.eights[first * stored / 8..][..C * stored / 8];
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
                    let mut base: [__m256; C] = std::array::from_fn(|c| bases[c][g]);
                    let channels = g * stored + slab * SLAB_CHANNELS..g * stored + (slab + slabs) * SLAB_CHANNELS;
                    let scales = self.scales[channels.clone()].chunks_exact(8);
                    let eights = eights[slab * C * SLAB_CHANNELS / 8..].chunks_exact(C);
                    for ((scale, mean), eights) in scales.zip(self.means[channels].chunks_exact(8)).zip(eights) {
                        // SAFETY: eight channels of columns and groups.
                        unsafe {
                            let (scale, mean) = (_mm256_loadu_ps(scale.as_ptr()), _mm256_loadu_ps(mean.as_ptr()));
                            let (size, square_of) = (magnitude(scale), _mm256_mul_ps(scale, scale));
                            for c in 0..C {
                                let x = &eights[c];
                                sum[c] = _mm256_fmadd_ps(size, _mm256_load_ps(x.sizes.0.as_ptr()), sum[c]);
                                square[c] = _mm256_fmadd_ps(square_of, _mm256_load_ps(x.squares.0.as_ptr()), square[c]);
                                base[c] = _mm256_fmadd_ps(mean, _mm256_load_ps(x.q.0.as_ptr()), base[c]);
                            }
                        }
                    }
                    for c in 0..C {
                        bases[c][g] = base[c];
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
            // Of the squares, the largest sum of two lanes bounds the largest number, and all four are the error.
            let two = [0, 2, 4, 6].map(|i| _mm256_hadd_ps(squares[i], squares[i + 1]));
            let join = |x: [__m256; 2]| [_mm256_permute2f128_ps::<0x20>(x[0], x[1]), _mm256_permute2f128_ps::<0x31>(x[0], x[1])];
            let all_four = join([_mm256_hadd_ps(two[0], two[1]), _mm256_hadd_ps(two[2], two[3])]);
            let most = [0, 2].map(|i| {
                let even = _mm256_shuffle_ps::<0b10_00_10_00>(two[i], two[i + 1]);
                _mm256_max_ps(even, _mm256_shuffle_ps::<0b11_01_11_01>(two[i], two[i + 1]))
            });
            let [low, high] = join(most);
            let top = _mm256_sqrt_ps(_mm256_max_ps(low, high));
            let inverse = _mm256_max_ps(_mm256_mul_ps(top, all(1.0 / 32767.0)), _mm256_mul_ps(sum, all(limits.top / RANGE)));
            let inverse = _mm256_max_ps(all(1.0 / MOST), inverse);
            let factor = _mm256_div_ps(all(1.0), inverse);
            let rounding = _mm256_mul_ps(all(limits.rms), inverse);
            let levels = _mm256_mul_ps(_mm256_add_ps(all_four[0], all_four[1]), all(limits.error * limits.error));
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
                self.round::<C>(first, self.chunks[n], factors);
            } else {
                self.round_split::<C>(first, self.chunks[n], factors);
            }
        }
        if groups == 1 {
            let mut all = [_mm256_setzero_ps(); 4];
            all.iter_mut().zip(&bases).for_each(|(all, base)| *all = base[0]);
            let x = _mm256_hadd_ps(_mm256_hadd_ps(all[0], all[1]), _mm256_hadd_ps(all[2], all[3]));
            let x = floats(_mm256_add_ps(x, _mm256_permute2f128_ps::<1>(x, x)));
            self.bases[first..first + C].iter_mut().zip(x).for_each(|(to, x)| *to = [x; 8]);
            return;
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
    fn round<const C: usize>(&mut self, first: usize, (slab, slabs): (usize, usize), factors: [f32; C]) {
        let (pick, stored) = (picks(), self.stored);
        let words = &mut self.words[first * stored / 8 + slab * 2 * C..][..slabs * 2 * C];
        let scales = &self.scales[slab * SLAB_CHANNELS..][..slabs * SLAB_CHANNELS];
        let eights = &self.eights[first * stored / 8 + slab * C * SLAB_CHANNELS / 8..][..slabs * C * SLAB_CHANNELS / 8];
        let slabs = scales.chunks_exact(SLAB_CHANNELS).zip(eights.chunks_exact(2 * C)).zip(words.chunks_exact_mut(2 * C));
        for ((scales, eights), words) in slabs {
            for half in 0..2 {
                // SAFETY: eight channels of each column, and a half of 2 C words.
                unsafe {
                    let scale = _mm256_loadu_ps(scales.as_ptr().add(8 * half));
                    let to = words.as_mut_ptr().cast::<__m256i>().add(half);
                    let row = |c: usize| rounded(&eights[half * C + c], scale, factors[c]);
                    for c in (0..C).step_by(2) {
                        // Two columns share a register.
                        let both = [row(c), row((c + 1).min(C - 1))];
                        let x = _mm256_packs_epi32(both[0], both[1]);
                        _mm256_store_si256(to.add(2 * c), _mm256_shuffle_epi8(x, pick[0]));
                        _mm256_store_si256(to.add(2 * (C + c)), _mm256_shuffle_epi8(x, pick[1]));
                        if c + 1 < C {
                            _mm256_store_si256(to.add(2 * (c + 1)), _mm256_shuffle_epi8(x, pick[2]));
                            _mm256_store_si256(to.add(2 * (C + c + 1)), _mm256_shuffle_epi8(x, pick[3]));
                        }
                    }
                }
            }
        }
    }

    /// As [`Queries::round`], where token groups differ.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round_split<const C: usize>(&mut self, first: usize, (slab, slabs): (usize, usize), factors: [f32; C]) {
        let (pick, stored, groups) = (picks(), self.stored, self.groups);
        let words = &mut self.words[2 * (first * stored / 8 + slab * 2 * C)..][..2 * slabs * 2 * C];
        let scales = &self.scales[slab * SLAB_CHANNELS..][..(groups - 1) * stored + slabs * SLAB_CHANNELS];
        let eights = &self.eights[first * stored / 8 + slab * C * SLAB_CHANNELS / 8..][..slabs * C * SLAB_CHANNELS / 8];
        for (eight, words) in words.chunks_exact_mut(2 * C).enumerate() {
            // SAFETY: eight channels of each column and group, and 2 C words.
            unsafe {
                let to = words.as_mut_ptr().cast::<__m256i>();
                // Four numbers of a half are tokens 8 k.
                let group = |k: usize| _mm256_loadu_ps(scales.as_ptr().add(k * groups / 4 * stored + 8 * eight));
                let scales = [group(0), group(1), group(2), group(3)];
                for (c, factor) in factors.into_iter().enumerate() {
                    let x = scales.map(|s| rounded(&*eights.as_ptr().add(C * eight + c), s, factor));
                    let x = x.map(|x| _mm256_packs_epi32(x, x));
                    for (odd, pick) in pick.iter().take(2).enumerate() {
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
        let words = &self.words[(first * self.stored / 8 + slab * 2 * share) * self.wide()..];
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
