//! Exponentials of eight or 16 numbers at a time: the operations of [`super::math::exp`] in their order, so the same bits.

use std::arch::x86_64::*;

/// [`super::math::exp`] of `N` registers, by the operations of one width. The last one multiplies by a power of two, and gives 0
/// for what is below -87. Step by step for all `N`, because each step waits for the one before.
macro_rules! exp {
    ($x:ident, $all:ident, $min:ident, $max:ident, $add:ident, $sub:ident, $mul:ident, $power:ident) => {{
        let all = |x: f32| $all(x);
        let magic = all(12_582_912.0);
        let (mut r, mut n, mut shifted, mut s, mut p) = ($x, $x, $x, $x, $x);
        for i in 0..N {
            // In this order a NaN passes.
            r[i] = $min(all(88.0), $max(all(-87.0), $x[i]));
        }
        for i in 0..N {
            shifted[i] = $add($mul(r[i], all(std::f32::consts::LOG2_E)), magic);
        }
        for i in 0..N {
            n[i] = $sub(shifted[i], magic);
        }
        for i in 0..N {
            r[i] = $sub(r[i], $mul(n[i], all(0.693_359_4)));
        }
        for i in 0..N {
            r[i] = $sub(r[i], $mul(n[i], all(-2.121_944_4e-4)));
        }
        for i in 0..N {
            s[i] = $mul(r[i], r[i]);
            p[i] = $add(all(1.0 / 720.0), $mul(r[i], all(1.0 / 5040.0)));
        }
        for i in 0..N {
            let b = $add(all(1.0 / 24.0), $mul(r[i], all(1.0 / 120.0)));
            p[i] = $add(b, $mul(s[i], p[i]));
        }
        for i in 0..N {
            let a = $add(all(0.5), $mul(r[i], all(1.0 / 6.0)));
            p[i] = $add(a, $mul(s[i], p[i]));
        }
        for i in 0..N {
            p[i] = $add(all(1.0), $add(r[i], $mul(s[i], p[i])));
        }
        for i in 0..N {
            p[i] = $power(p[i], shifted[i], magic, $x[i]);
        }
        p
    }};
}

/// `p` times the power of two that `shifted` says; 0 where `x` is below -87.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn power_of_eight(p: __m256, shifted: __m256, magic: __m256, x: __m256) -> __m256 {
    let bits = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(magic));
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(bits, _mm256_set1_epi32(127)));
    let low = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-87.0));
    _mm256_andnot_ps(low, _mm256_mul_ps(p, _mm256_castsi256_ps(power)))
}

/// [`power_of_eight`] of 16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f")]
fn power_of_sixteen(p: __m512, shifted: __m512, magic: __m512, x: __m512) -> __m512 {
    let bits = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(magic));
    let power = _mm512_slli_epi32::<23>(_mm512_add_epi32(bits, _mm512_set1_epi32(127)));
    let above = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-87.0));
    _mm512_maskz_mul_ps(above, p, _mm512_castsi512_ps(power))
}

#[allow(clippy::needless_range_loop)] // Most steps read several arrays.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn of_eights<const N: usize>(x: [__m256; N]) -> [__m256; N] {
    exp!(x, _mm256_set1_ps, _mm256_min_ps, _mm256_max_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, power_of_eight)
}

#[allow(clippy::needless_range_loop)] // Most steps read several arrays.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f")]
fn of_sixteens<const N: usize>(x: [__m512; N]) -> [__m512; N] {
    exp!(x, _mm512_set1_ps, _mm512_min_ps, _mm512_max_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, power_of_sixteen)
}

/// Replaces a multiple of eight numbers and adds them to eight sums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_eights(x: &mut [f32], max: f32, mut sums: __m256) -> __m256 {
    const N: usize = 4;
    let max = _mm256_set1_ps(max);
    let mut groups = x.chunks_exact_mut(8 * N);
    for group in &mut groups {
        // SAFETY: 8 N elements.
        unsafe {
            let mut e = [max; N];
            for (i, e) in e.iter_mut().enumerate() {
                *e = _mm256_sub_ps(_mm256_loadu_ps(group.as_ptr().add(8 * i)), max);
            }
            for (i, e) in of_eights(e).into_iter().enumerate() {
                _mm256_storeu_ps(group.as_mut_ptr().add(8 * i), e);
                sums = _mm256_add_ps(sums, e);
            }
        }
    }
    for eight in groups.into_remainder().chunks_exact_mut(8) {
        // SAFETY: eight elements.
        unsafe {
            let [e] = of_eights([_mm256_sub_ps(_mm256_loadu_ps(eight.as_ptr()), max)]);
            _mm256_storeu_ps(eight.as_mut_ptr(), e);
            sums = _mm256_add_ps(sums, e);
        }
    }
    sums
}

/// [`super::math::exp_sum`] of a multiple of eight numbers: eight partial sums.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sums(x: &mut [f32], max: f32) -> [f32; 8] {
    super::lay::floats(add_eights(x, max, _mm256_setzero_ps()))
}

/// [`sums`] with AVX-512: the same eight, in the same order.
#[target_feature(enable = "avx2,fma,f16c,avx512f")]
pub(super) fn sums_avx512(x: &mut [f32], max: f32) -> [f32; 8] {
    const N: usize = 2;
    let (mut sums, all) = (_mm256_setzero_ps(), _mm512_set1_ps(max));
    let mut groups = x.chunks_exact_mut(16 * N);
    for group in &mut groups {
        // SAFETY: 16 N elements.
        unsafe {
            let mut e = [all; N];
            for (i, e) in e.iter_mut().enumerate() {
                *e = _mm512_sub_ps(_mm512_loadu_ps(group.as_ptr().add(16 * i)), all);
            }
            for (i, e) in of_sixteens(e).into_iter().enumerate() {
                _mm512_storeu_ps(group.as_mut_ptr().add(16 * i), e);
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(e)));
                sums = _mm256_add_ps(_mm256_add_ps(sums, _mm512_castps512_ps256(e)), high);
            }
        }
    }
    super::lay::floats(add_eights(groups.into_remainder(), max, sums))
}
