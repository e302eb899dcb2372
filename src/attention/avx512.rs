//! Exponentials with AVX-512.

use std::arch::x86_64::*;

/// [`super::math::exp`] of `N` times 16 numbers, as [`super::avx2::exp`].
#[allow(clippy::needless_range_loop)] // Most steps read several arrays.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f")]
fn exp<const N: usize>(x: [__m512; N]) -> [__m512; N] {
    let all = |x: f32| _mm512_set1_ps(x);
    let magic = all(12_582_912.0);
    let (mut r, mut n, mut shifted, mut s, mut p) = (x, x, x, x, x);
    for i in 0..N {
        // In this order a NaN passes.
        r[i] = _mm512_min_ps(all(88.0), _mm512_max_ps(all(-87.0), x[i]));
    }
    for i in 0..N {
        shifted[i] = _mm512_add_ps(_mm512_mul_ps(r[i], all(std::f32::consts::LOG2_E)), magic);
    }
    for i in 0..N {
        n[i] = _mm512_sub_ps(shifted[i], magic);
    }
    for i in 0..N {
        r[i] = _mm512_sub_ps(r[i], _mm512_mul_ps(n[i], all(0.693_359_4)));
    }
    for i in 0..N {
        r[i] = _mm512_sub_ps(r[i], _mm512_mul_ps(n[i], all(-2.121_944_4e-4)));
    }
    for i in 0..N {
        s[i] = _mm512_mul_ps(r[i], r[i]);
        p[i] = _mm512_add_ps(all(1.0 / 720.0), _mm512_mul_ps(r[i], all(1.0 / 5040.0)));
    }
    for i in 0..N {
        let b = _mm512_add_ps(all(1.0 / 24.0), _mm512_mul_ps(r[i], all(1.0 / 120.0)));
        p[i] = _mm512_add_ps(b, _mm512_mul_ps(s[i], p[i]));
    }
    for i in 0..N {
        let a = _mm512_add_ps(all(0.5), _mm512_mul_ps(r[i], all(1.0 / 6.0)));
        p[i] = _mm512_add_ps(a, _mm512_mul_ps(s[i], p[i]));
    }
    for i in 0..N {
        p[i] = _mm512_add_ps(all(1.0), _mm512_add_ps(r[i], _mm512_mul_ps(s[i], p[i])));
    }
    for i in 0..N {
        let bits = _mm512_sub_epi32(_mm512_castps_si512(shifted[i]), _mm512_castps_si512(magic));
        let power = _mm512_slli_epi32::<23>(_mm512_add_epi32(bits, _mm512_set1_epi32(127)));
        let above = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x[i], all(-87.0));
        p[i] = _mm512_maskz_mul_ps(above, p[i], _mm512_castsi512_ps(power));
    }
    p
}

/// [`super::math::exp_sum`] of a multiple of 32 numbers: the eight partial sums of [`super::avx2::exp_sums`].
#[target_feature(enable = "avx2,fma,f16c,avx512f")]
pub(super) fn exp_sums(x: &mut [f32], max: f32) -> [f32; 8] {
    const N: usize = 2;
    let (mut sums, max) = (_mm256_setzero_ps(), _mm512_set1_ps(max));
    let mut groups = x.chunks_exact_mut(16 * N);
    for group in &mut groups {
        // SAFETY: 16 N elements.
        unsafe {
            let mut e = [max; N];
            for (i, e) in e.iter_mut().enumerate() {
                *e = _mm512_sub_ps(_mm512_loadu_ps(group.as_ptr().add(16 * i)), max);
            }
            for (i, e) in exp(e).into_iter().enumerate() {
                _mm512_storeu_ps(group.as_mut_ptr().add(16 * i), e);
                let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(e)));
                sums = _mm256_add_ps(_mm256_add_ps(sums, _mm512_castps512_ps256(e)), high);
            }
        }
    }
    super::lay::floats(sums)
}
