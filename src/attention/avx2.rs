//! The matrix product and the fp16 reader with AVX2, FMA and F16C.

use std::arch::x86_64::*;

use super::math::Product;

/// fp16 to fp32, exactly.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn read_f16(bytes: &[u8], out: &mut [f32]) {
    let n = out.len().min(bytes.len() / 2);
    let eights = n / 8 * 8;
    for i in (0..eights).step_by(8) {
        // SAFETY: i + 8 <= n elements lie in both slices.
        unsafe {
            let x = _mm_loadu_si128(bytes.as_ptr().add(2 * i).cast());
            _mm256_storeu_ps(out.as_mut_ptr().add(i), _mm256_cvtph_ps(x));
        }
    }
    for i in eights..n {
        out[i] = half::f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32();
    }
}

/// The product for `R` rows from `i` on and 16 columns from `j` on.
///
/// # Safety
/// The bounds that `Product::run` asserts.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block<const R: usize>(p: &Product, c: &mut [f32], i: usize, j: usize) {
    // SAFETY: row i + R - 1 and column j + 15 lie inside all three matrices.
    unsafe {
        let to = c.as_mut_ptr().add(i * p.c_stride + j);
        let a = p.a.as_ptr().add(i * p.a_stride);
        let b = p.b.as_ptr().add(j);
        let mut sum = [[_mm256_setzero_ps(); 2]; R];
        for (r, s) in sum.iter_mut().enumerate() {
            *s = [_mm256_loadu_ps(to.add(r * p.c_stride)), _mm256_loadu_ps(to.add(r * p.c_stride + 8))];
        }
        for k in 0..p.depth {
            let (b0, b1) = (_mm256_loadu_ps(b.add(k * p.b_stride)), _mm256_loadu_ps(b.add(k * p.b_stride + 8)));
            for (r, s) in sum.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*a.add(r * p.a_stride + k));
                s[0] = _mm256_fmadd_ps(x, b0, s[0]);
                s[1] = _mm256_fmadd_ps(x, b1, s[1]);
            }
        }
        for (r, s) in sum.iter().enumerate() {
            _mm256_storeu_ps(to.add(r * p.c_stride), s[0]);
            _mm256_storeu_ps(to.add(r * p.c_stride + 8), s[1]);
        }
    }
}

/// [`Product::run`].
///
/// # Safety
/// The bounds that `Product::run` asserts.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn product(p: &Product, c: &mut [f32]) {
    for j in (0..p.width).step_by(16) {
        let mut i = 0;
        // SAFETY: the caller's bounds; R rows are left each time.
        unsafe {
            while i < p.rows {
                match p.rows - i {
                    1 => block::<1>(p, c, i, j),
                    2 => block::<2>(p, c, i, j),
                    3 => block::<3>(p, c, i, j),
                    4 => block::<4>(p, c, i, j),
                    5 => block::<5>(p, c, i, j),
                    _ => block::<6>(p, c, i, j),
                }
                i += 6;
            }
        }
    }
}

/// [`super::math::exp`] of eight numbers: the same operations, the same bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp(x: __m256) -> __m256 {
    let all = |x: f32| _mm256_set1_ps(x);
    let low = _mm256_cmp_ps::<_CMP_LT_OQ>(x, all(-87.0));
    // In this order a NaN passes.
    let clamped = _mm256_min_ps(all(88.0), _mm256_max_ps(all(-87.0), x));
    let magic = all(12_582_912.0);
    let shifted = _mm256_add_ps(_mm256_mul_ps(clamped, all(std::f32::consts::LOG2_E)), magic);
    let n = _mm256_sub_ps(shifted, magic);
    let r = _mm256_sub_ps(clamped, _mm256_mul_ps(n, all(0.693_359_4)));
    let r = _mm256_sub_ps(r, _mm256_mul_ps(n, all(-2.121_944_4e-4)));
    let s = _mm256_mul_ps(r, r);
    let pair = |c: f32, d: f32| _mm256_add_ps(all(c), _mm256_mul_ps(r, all(d)));
    let (a, b, c) = (pair(0.5, 1.0 / 6.0), pair(1.0 / 24.0, 1.0 / 120.0), pair(1.0 / 720.0, 1.0 / 5040.0));
    let p = _mm256_add_ps(a, _mm256_mul_ps(s, _mm256_add_ps(b, _mm256_mul_ps(s, c))));
    let p = _mm256_add_ps(all(1.0), _mm256_add_ps(r, _mm256_mul_ps(s, p)));
    let bits = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_castps_si256(magic));
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(bits, _mm256_set1_epi32(127)));
    _mm256_andnot_ps(low, _mm256_mul_ps(p, _mm256_castsi256_ps(power)))
}

/// [`super::math::exp_sum`] of a multiple of eight numbers: eight partial sums.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn exp_sums(x: &mut [f32], max: f32) -> [f32; 8] {
    let mut sums = _mm256_setzero_ps();
    for eight in x.chunks_exact_mut(8) {
        // SAFETY: eight elements.
        unsafe {
            let e = exp(_mm256_sub_ps(_mm256_loadu_ps(eight.as_ptr()), _mm256_set1_ps(max)));
            _mm256_storeu_ps(eight.as_mut_ptr(), e);
            sums = _mm256_add_ps(sums, e);
        }
    }
    let mut out = [0f32; 8];
    // SAFETY: eight elements.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sums) };
    out
}
