//! The other factor of the innermost loops: queries times key scales, and softmax weights times value scales, laid out as
//! [`super::integers`] and [`super::codes`] read them.
//!
//! For integers it is block floating point: the numbers of one column that meet in 32-bit sums share a factor, the largest that
//! cannot overflow. What rounding costs is estimated (all errors independent, as they are to a good approximation) and compared
//! with a limit; beyond it the page is read in fp32.

use std::arch::x86_64::*;

use super::codes::Lane;

mod queries;
mod weights;

pub(super) use queries::{KeyFields, Queries};
pub(super) use weights::{Reading, Scales, Weights};

/// Factors stop here: numbers this small add nothing.
const MOST: f32 = 1e30;

/// Sum of products of equally many numbers, a multiple of eight.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm256_setzero_ps();
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        // SAFETY: eight elements each.
        sum = unsafe { _mm256_fmadd_ps(_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(b.as_ptr()), sum) };
    }
    total(sum)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total(sum: __m256) -> f32 {
    let s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn floats(x: __m256) -> [f32; 8] {
    let mut out = Lane::default();
    // SAFETY: eight aligned elements.
    unsafe { _mm256_store_ps(out.0.as_mut_ptr(), x) };
    out.0
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn magnitude(x: __m256) -> __m256 {
    _mm256_andnot_ps(_mm256_set1_ps(-0.0), x)
}

/// Reduces eight registers to the lower and the upper halves of each: `pair` joins neighbours of two registers, half by half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn halves(x: [__m256; 8], pair: impl Fn(__m256, __m256) -> __m256) -> [__m256; 2] {
    let a = pair(pair(x[0], x[1]), pair(x[2], x[3]));
    let b = pair(pair(x[4], x[5]), pair(x[6], x[7]));
    [_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b)]
}

/// Adds the sums of eight lanes, `stride` apart, to eight numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_totals(lanes: &[Lane], stride: usize, out: &mut [f32]) {
    assert!(lanes.len() > 7 * stride && out.len() == 8);
    let mut x = [_mm256_setzero_ps(); 8];
    for (i, x) in x.iter_mut().enumerate() {
        // SAFETY: eight aligned elements of one of the lanes.
        *x = unsafe { _mm256_load_ps(lanes.as_ptr().add(i * stride).cast()) };
    }
    let [low, high] = halves(x, |a, b| _mm256_hadd_ps(a, b));
    // SAFETY: eight elements.
    unsafe {
        let before = _mm256_loadu_ps(out.as_ptr());
        _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(before, _mm256_add_ps(low, high)));
    }
}
