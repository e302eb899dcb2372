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

/// Finite bfloat16 to fp32, exactly.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn read_bf16(bytes: &[u8], out: &mut [f32]) {
    let n = out.len().min(bytes.len() / 2);
    let eights = n / 8 * 8;
    for i in (0..eights).step_by(8) {
        // SAFETY: i + 8 <= n elements lie in both slices.
        unsafe {
            let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(bytes.as_ptr().add(2 * i).cast()));
            _mm256_storeu_ps(out.as_mut_ptr().add(i), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)));
        }
    }
    for i in eights..n {
        out[i] = half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32();
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

/// [`super::math::scores`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores(a: &[f32], b: &[f32], depth: usize, c: &mut [f32], c_stride: usize) {
    let (rows, tokens, whole) = (a.len() / depth, b.len() / depth, depth / 8 * 8);
    for i in (0..rows).step_by(4) {
        for n in (0..tokens).step_by(2) {
            let mut sums = [_mm256_setzero_ps(); 8];
            // Missing rows and tokens repeat the last one.
            let a = [0, 1, 2, 3].map(|k| &a[(i + k).min(rows - 1) * depth..][..depth]);
            let b = [0, 1].map(|k| &b[(n + k).min(tokens - 1) * depth..][..depth]);
            for k in (0..whole).step_by(8) {
                for (j, b) in b.iter().enumerate() {
                    for (r, a) in a.iter().enumerate() {
                        // SAFETY: k + 8 <= depth.
                        let (x, y) = unsafe { (_mm256_loadu_ps(a.as_ptr().add(k)), _mm256_loadu_ps(b.as_ptr().add(k))) };
                        sums[4 * j + r] = _mm256_fmadd_ps(x, y, sums[4 * j + r]);
                    }
                }
            }
            let [low, high] = super::lay::halves(sums, |a, b| _mm256_hadd_ps(a, b));
            let sums = super::lay::floats(_mm256_add_ps(low, high));
            for (j, b) in b.iter().enumerate().take(tokens - n) {
                for (r, a) in a.iter().enumerate().take(rows - i) {
                    let rest: f32 = a[whole..].iter().zip(&b[whole..]).map(|(a, b)| a * b).sum();
                    c[(i + r) * c_stride + n + j] = sums[4 * j + r] + rest;
                }
            }
        }
    }
}
