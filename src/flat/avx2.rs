//! The two hot loops of 4-bit codes with AVX2, bit for bit the same as the portable ones.

use std::arch::x86_64::*;

use super::piece::Plan;
use crate::codec::Fields;
use crate::error::Result;

/// Whether this CPU runs the functions of this module.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Codes of `(x - zero) * inverse` for at most 16 levels, one per byte or (`PACKED`) two, the first in the high half if
/// `high_first`. `thresholds` are padded with infinity to 15 (the last entry is not used). Encodes whole groups of 32 and
/// returns how many numbers that were.
///
/// # Safety
/// Only where [`available`] is true.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn encode<const PACKED: bool>(
    x: &[f32],
    fields: Fields,
    high_first: bool,
    t: &[f32; 16],
    out: &mut [u8],
) -> usize {
    // Bisection in registers: the root, then tables of 2, 4 and 8 thresholds picked by the bits found so far.
    let root = _mm256_set1_ps(t[7]);
    let second = _mm256_setr_ps(t[3], t[11], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
    let third = _mm256_setr_ps(t[1], t[5], t[9], t[13], 0.0, 0.0, 0.0, 0.0);
    let fourth = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]);
    let (zero, inverse) = (_mm256_set1_ps(fields.zero), _mm256_set1_ps(fields.inverse()));
    let lane_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    // Weights of a pair of codes in its byte.
    let weights = _mm256_set1_epi16(if high_first { 0x0110 } else { 0x1001 });
    let eight = |v: __m256| {
        let v = _mm256_mul_ps(_mm256_sub_ps(v, zero), inverse);
        let v = _mm256_and_ps(v, _mm256_cmp_ps::<_CMP_ORD_Q>(v, v)); // NaN counts as 0
        // A true comparison is -1: doubling and subtracting appends the next bit.
        let above = |t: __m256| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(v, t));
        let code = _mm256_sub_epi32(_mm256_setzero_si256(), above(root));
        let code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above(_mm256_permutevar8x32_ps(second, code)));
        let code = _mm256_sub_epi32(_mm256_add_epi32(code, code), above(_mm256_permutevar8x32_ps(third, code)));
        _mm256_sub_epi32(_mm256_add_epi32(code, code), above(_mm256_permutevar8x32_ps(fourth, code)))
    };
    let step = if PACKED { 16 } else { 32 };
    let groups = (x.len() / 32).min(out.len() / step);
    for i in 0..groups {
        // SAFETY: 32 numbers are there from 32 i on and `step` bytes from step * i on; unaligned access is allowed.
        unsafe {
            let at = x.as_ptr().add(32 * i);
            let a = _mm256_packus_epi32(eight(_mm256_loadu_ps(at)), eight(_mm256_loadu_ps(at.add(8))));
            let b = _mm256_packus_epi32(eight(_mm256_loadu_ps(at.add(16))), eight(_mm256_loadu_ps(at.add(24))));
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), lane_order);
            let to = out.as_mut_ptr().add(step * i);
            if PACKED {
                let pairs = _mm256_maddubs_epi16(bytes, weights);
                let halves = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi16(pairs, pairs));
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(halves));
            } else {
                _mm256_storeu_si256(to.cast(), bytes);
            }
        }
    }
    groups * 32
}

/// Whether no magnitude is above `limit` and none is NaN.
///
/// # Safety
/// Only where [`available`] is true.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn all_within(x: &[f32], limit: f32) -> bool {
    let (sign, top) = (_mm256_set1_ps(-0.0), _mm256_set1_ps(limit));
    let mut beyond = _mm256_setzero_ps();
    let groups = x.chunks_exact(8);
    let rest = groups.remainder().iter().all(|v| v.abs() <= limit);
    for group in groups {
        // SAFETY: a group holds eight numbers.
        let v = unsafe { _mm256_loadu_ps(group.as_ptr()) };
        beyond = _mm256_or_ps(beyond, _mm256_cmp_ps::<_CMP_NLE_UQ>(_mm256_andnot_ps(sign, v), top));
    }
    rest && _mm256_movemask_ps(beyond) == 0
}

/// `lookup` compiled for this CPU, where an fma is one instruction.
///
/// # Safety
/// Only where [`available`] is true.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn lookup(levels: &[f32], fields: Fields, codes: &[u8], out: &mut [f32]) {
    super::piece::lookup(levels, fields, codes, out);
}

/// Values of packed nibbles: `fma(level, scale, zero)`, computed once per level. Decodes whole groups of eight and returns how
/// many numbers that were.
///
/// # Safety
/// Only where [`available`] is true; if `STREAM`, `out` begins on a multiple of 32 and a fence follows.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) unsafe fn decode<const STREAM: bool>(
    bytes: &[u8],
    high_first: bool,
    levels: &[f32; 16],
    fields: Fields,
    out: &mut [f32],
) -> usize {
    // SAFETY: `levels` holds two vectors.
    let (low, high) = unsafe { (_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels.as_ptr().add(8))) };
    let (scale, zero) = (_mm256_set1_ps(fields.scale), _mm256_set1_ps(fields.zero));
    let (low, high) = (_mm256_fmadd_ps(low, scale, zero), _mm256_fmadd_ps(high, scale, zero));
    let mask = _mm_set1_epi8(15);
    let split = |packed| {
        let (a, b) = (_mm_and_si128(packed, mask), _mm_and_si128(_mm_srli_epi16::<4>(packed), mask));
        if high_first { (b, a) } else { (a, b) }
    };
    // The values of eight codes, one per byte.
    let look_up = |codes, to: *mut f32| {
        let codes = _mm256_cvtepu8_epi32(codes);
        // Bit 3 of the code, moved to the sign, picks the table.
        let pick = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
        let value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), pick);
        // SAFETY: eight numbers can be written there, at a multiple of 32 if `STREAM`.
        unsafe { if STREAM { _mm256_stream_ps(to, value) } else { _mm256_storeu_ps(to, value) } }
    };
    let groups = (out.len() / 32).min(bytes.len() / 16);
    for i in 0..groups {
        // SAFETY: 16 bytes are there from 16 i on and 32 numbers from 32 i on; unaligned access is allowed.
        unsafe {
            let (first, second) = split(_mm_loadu_si128(bytes.as_ptr().add(16 * i).cast()));
            let (front, back) = (_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second));
            for (j, codes) in [front, _mm_srli_si128::<8>(front), back, _mm_srli_si128::<8>(back)].into_iter().enumerate() {
                look_up(codes, out.as_mut_ptr().add(32 * i + 8 * j));
            }
        }
    }
    let (rest, out) = (&bytes[16 * groups..], &mut out[32 * groups..]);
    let mut done = 32 * groups;
    for (bytes, out) in rest.chunks_exact(4).zip(out.chunks_exact_mut(8)) {
        let (first, second) = split(_mm_cvtsi32_si128(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])));
        look_up(_mm_unpacklo_epi8(first, second), out.as_mut_ptr());
        done += 8;
    }
    done
}

/// Largest magnitude of finite numbers; the order of a maximum does not matter.
///
/// # Safety
/// Only where [`available`] is true.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn absmax(x: &[f32]) -> f32 {
    super::piece::absmax_by_lanes::<32>(x)
}

/// [`Plan::decode_blocks`] compiled for this CPU.
///
/// # Safety
/// Only where [`available`] is true.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn decode_blocks(
    plan: &Plan<'_>,
    codes: &[u8],
    fields: &[u8],
    row: usize,
    numbers: &mut [f32],
    stream: bool,
) -> Result<()> {
    plan.decode_blocks(codes, fields, row, numbers, stream)?;
    if stream {
        // Streamed numbers come before whatever tells other threads of them.
        _mm_sfence();
    }
    Ok(())
}
