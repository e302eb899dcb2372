//! The thresholds of a block of 16-bit numbers as keys, with AVX2.
//!
//! Numbers sort like their **keys**, signed integers: the bits of the magnitude, with the sign. A code is the number of
//! thresholds below, and `(x - zero) * inverse > t` is monotone in x however it is rounded. So a threshold has one key, the
//! largest at which that very comparison is false.

use std::arch::x86_64::*;

use crate::codec::Fields;

/// The order of thresholds in a vector: those of the last step of a bisection; then in even places those of the step before,
/// and in between the first one (9) and the two of the second step (11 and 13).
const ORDER: [usize; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 1, 7, 5, 3, 9, 11, 13, 15];

/// fp32 thresholds in two vectors that `packs` brings into [`ORDER`].
pub(super) struct Thresholds {
    ordered: [f32; 16],
    a: __m256,
    b: __m256,
    /// All ones where there is no threshold.
    none: __m256i,
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn thresholds(t: &[f32; 16]) -> Thresholds {
    let o = ORDER.map(|i| t[i]);
    let a = _mm256_setr_ps(o[0], o[1], o[2], o[3], o[8], o[9], o[10], o[11]);
    let b = _mm256_setr_ps(o[4], o[5], o[6], o[7], o[12], o[13], o[14], o[15]);
    let none = |t| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_EQ_OQ>(t, _mm256_set1_ps(f32::INFINITY)));
    Thresholds { ordered: o, a, b, none: _mm256_packs_epi32(none(a), none(b)) }
}

/// Bits to ranks and back: like keys, but -0 is -1 and each negative number one less, so that ranks have no gap.
#[target_feature(enable = "avx2,fma,f16c")]
fn sortable(x: __m256i) -> __m256i {
    _mm256_xor_si256(x, _mm256_and_si256(_mm256_srai_epi16::<15>(x), _mm256_set1_epi16(0x7fff)))
}

/// Ranks of the largest numbers not above `a` and `b`, in the order of `packs`.
#[target_feature(enable = "avx2,fma,f16c")]
fn floor<const BRAIN: bool>(a: __m256, b: __m256) -> __m256i {
    if BRAIN {
        let rank = |v| {
            let bits = _mm256_castps_si256(v);
            let flip = _mm256_and_si256(_mm256_srai_epi32::<31>(bits), _mm256_set1_epi32(0x7fff_ffff));
            _mm256_srai_epi32::<16>(_mm256_xor_si256(bits, flip))
        };
        _mm256_packs_epi32(rank(a), rank(b))
    } else {
        let (a, b) = (_mm256_cvtps_ph::<_MM_FROUND_TO_NEG_INF>(a), _mm256_cvtps_ph::<_MM_FROUND_TO_NEG_INF>(b));
        sortable(_mm256_set_m128i(_mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(a, b)))
    }
}

/// fp32 values of ranks: [`floor`] backwards.
#[target_feature(enable = "avx2,fma,f16c")]
fn values<const BRAIN: bool>(ranks: __m256i) -> (__m256, __m256) {
    let x = sortable(ranks);
    if BRAIN {
        let zero = _mm256_setzero_si256();
        (_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, x)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, x)))
    } else {
        let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        (_mm256_cvtph_ps(_mm_unpacklo_epi64(low, high)), _mm256_cvtph_ps(_mm_unpackhi_epi64(low, high)))
    }
}

/// fp32 value of 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn value<const BRAIN: bool>(bits: u16) -> f32 {
    if BRAIN { f32::from_bits(u32::from(bits) << 16) } else { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into()))) }
}

/// Bits of infinity: numbers are below.
pub(super) const fn infinity<const BRAIN: bool>() -> u16 {
    if BRAIN { 0x7f80 } else { 0x7c00 }
}

/// Per threshold the largest key that is not above it, for a scale that is not 0; its sign is left to the caller.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn keys<const BRAIN: bool>(t: &Thresholds, fields: Fields) -> __m256i {
    let (scale, inverse) = (fields.scale.abs().max(1e-38), fields.inverse().abs());
    let (wide_scale, zero, wide_inverse) = (_mm256_set1_ps(scale), _mm256_set1_ps(fields.zero), _mm256_set1_ps(inverse));
    let above = |ranks| {
        let (x, y) = values::<BRAIN>(ranks);
        let above = |x, t| {
            let scaled = _mm256_mul_ps(_mm256_sub_ps(x, zero), wide_inverse);
            _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(scaled, t))
        };
        _mm256_packs_epi32(above(x, t.a), above(y, t.b))
    };
    // A guess, right but for rounding; it counts only if the comparison itself turns true from this rank to the next.
    let mut rank = floor::<BRAIN>(_mm256_fmadd_ps(t.a, wide_scale, zero), _mm256_fmadd_ps(t.b, wide_scale, zero));
    let one = _mm256_set1_epi16(1);
    for _ in 0..3 {
        let (here, next) = (above(rank), above(_mm256_add_epi16(rank, one)));
        let settled = _mm256_or_si256(_mm256_andnot_si256(here, next), t.none);
        if _mm256_movemask_epi8(settled) == -1 {
            let key = _mm256_sub_epi16(rank, _mm256_srai_epi16::<15>(rank));
            return _mm256_blendv_epi8(key, _mm256_set1_epi16(i16::MAX), t.none);
        }
        // One down where it is true already, one up where it is false still.
        rank = _mm256_add_epi16(rank, _mm256_add_epi16(_mm256_add_epi16(here, next), one));
    }
    // Numbers of extreme magnitude: bisection over all keys, and one below.
    let exact = t.ordered.map(|t| {
        let top = i32::from(infinity::<BRAIN>()) - 1;
        let (mut low, mut high) = (-top - 1, if t == f32::INFINITY { i32::from(i16::MAX) } else { top });
        while low < high && t < f32::INFINITY {
            let middle = (low + high + 1) >> 1;
            let x = value::<BRAIN>(middle.unsigned_abs() as u16).copysign(middle as f32);
            if (x - fields.zero) * inverse > t { high = middle - 1 } else { low = middle }
        }
        high as i16
    });
    // SAFETY: 16 keys are one vector.
    unsafe { _mm256_loadu_si256(exact.as_ptr().cast()) }
}

/// Keys of bfloat16 thresholds by the mantissa of the scale, where all else is a shift of exponents: for scales with no more
/// bits than bfloat16 has.
pub(super) struct Table(Vec<[i16; 16]>);

/// Exponents of the scales that a table serves. With thresholds within 2^±32 nothing in the comparison leaves the normal
/// numbers, nor turns a smallest number into 0.
const EXPONENTS: std::ops::Range<u32> = 127 - 60..127 + 15;

/// A table for these thresholds, if they are of moderate magnitude.
///
/// # Safety
/// Only where `avx2::available` is true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn table(t: &[f32; 16]) -> Option<Table> {
    let moderate = |t: &f32| *t == 0.0 || *t == f32::INFINITY || (2f32.powi(-32)..2f32.powi(32)).contains(&t.abs());
    if !t.iter().all(moderate) {
        return None;
    }
    let t = thresholds(t);
    let row = |mantissa: u32| {
        let scale = f32::from_bits(EXPONENTS.start << 23 | mantissa << 16);
        let mut row = [0; 16];
        // SAFETY: 16 keys are one vector.
        unsafe { _mm256_storeu_si256(row.as_mut_ptr().cast(), keys::<true>(&t, Fields { scale, zero: 0.0 })) };
        row
    };
    Some(Table((0..128).map(row).collect()))
}

impl Table {
    /// The keys of a block without zero point, if the table serves its scale.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(super) fn keys(&self, scale: f32) -> Option<__m256i> {
        let bits = scale.abs().to_bits();
        if bits & 0xffff != 0 || !EXPONENTS.contains(&(bits >> 23)) {
            return None;
        }
        let row = &self.0[(bits >> 16 & 127) as usize];
        // SAFETY: 16 keys are one vector.
        let row = unsafe { _mm256_loadu_si256(row.as_ptr().cast()) };
        let up = _mm256_set1_epi16((((bits >> 23) - EXPONENTS.start) << 7) as i16);
        // Away from 0, which stays where it is; what stands for no threshold is the highest key and saturates.
        Some(_mm256_adds_epi16(row, _mm256_sign_epi16(up, row)))
    }
}
