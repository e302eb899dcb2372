//! 16-bit numbers to codes with AVX2, bit for bit as by way of fp32: in each block their keys are compared, 16 at once, with
//! those of the thresholds.

use std::arch::x86_64::*;

use super::NibbleOrder;
use super::keys16::{Thresholds, infinity, keys, thresholds, value};
use super::piece::Piece;
use super::piece::{Plan, limit, unfit};
use super::sink::Sink;
use crate::codec::{Fields, ScaleDtype, ScaleKind, block_fields};
use crate::error::Result;
use crate::tensor::Dtype;

/// Blocks whose fields are found in one go.
const GROUP: usize = 16;

/// Thresholds of a block as keys, spread over the steps of a bisection.
struct Steps {
    first: __m256i,
    second: [__m256i; 2],
    third: __m256i,
    fourth: __m256i,
    /// The sign of the scale, which turns numbers before they are compared.
    turn: __m256i,
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn steps(keys: __m256i, scale: f32) -> Steps {
    let third = _mm256_permute4x64_epi64::<0b1110_1110>(keys);
    let pick = |place: i16| _mm256_shuffle_epi8(third, _mm256_set1_epi16(0x0100 + 0x0202 * place));
    let fourth = _mm256_permute4x64_epi64::<0b0100_0100>(keys);
    let turn = _mm256_set1_epi16((scale.to_bits() >> 16 & 0x8000) as i16);
    Steps { first: pick(1), second: [pick(3), pick(5)], third, fourth, turn }
}

/// Codes of the 16 numbers at `x`, in 16 bits each. Without `TURN` scales are not negative.
///
/// # Safety
/// 32 bytes can be read at `x`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn sixteen<const TURN: bool>(x: *const u8, t: &Steps) -> __m256i {
    // SAFETY: as promised; unaligned access is allowed.
    let x = unsafe { _mm256_loadu_si256(x.cast()) };
    let magnitude = _mm256_and_si256(x, _mm256_set1_epi16(i16::MAX));
    let key = _mm256_sign_epi16(magnitude, if TURN { _mm256_xor_si256(x, t.turn) } else { x });
    // What is found so far is kept as the place of a table's entry: both bytes of the index of a byte shuffle.
    let above = _mm256_cmpgt_epi16(key, t.first);
    let next = _mm256_cmpgt_epi16(key, _mm256_blendv_epi8(t.second[0], t.second[1], above));
    let found = _mm256_blendv_epi8(_mm256_set1_epi16(0x0100), _mm256_set1_epi16(0x0504), next);
    let found = _mm256_or_si256(found, _mm256_and_si256(above, _mm256_set1_epi16(0x0808)));
    let next = _mm256_cmpgt_epi16(key, _mm256_shuffle_epi8(t.third, found));
    let found = _mm256_or_si256(found, _mm256_and_si256(next, _mm256_set1_epi16(0x0202)));
    let next = _mm256_cmpgt_epi16(key, _mm256_shuffle_epi8(t.fourth, found));
    // The low byte is twice the code so far; true is -1.
    _mm256_sub_epi16(_mm256_and_si256(found, _mm256_set1_epi16(0xff)), next)
}

/// Packed codes of a block of whole sixteens, `weights` those of a pair of codes in its byte.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn encode_packed<const TURN: bool>(x: &[u8], t: &Steps, weights: __m256i, out: &mut [u8]) {
    let lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let (groups, outs) = (x.chunks_exact(128), out.chunks_exact_mut(32));
    let rest = groups.remainder();
    let done = x.len() - rest.len();
    for (x, out) in groups.zip(outs) {
        // SAFETY: 128 bytes are four vectors, 32 bytes are one; unaligned access is allowed.
        unsafe {
            let code = |i: usize| sixteen::<TURN>(x.as_ptr().add(32 * i), t);
            let front = _mm256_maddubs_epi16(_mm256_packus_epi16(code(0), code(1)), weights);
            let back = _mm256_maddubs_epi16(_mm256_packus_epi16(code(2), code(3)), weights);
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(front, back), lanes);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), bytes);
        }
    }
    for (x, out) in rest.chunks_exact(32).zip(out[done / 4..].chunks_exact_mut(8)) {
        // SAFETY: 32 bytes are one vector, and 8 are half of a small one.
        unsafe {
            let codes = sixteen::<TURN>(x.as_ptr(), t);
            let pairs = _mm256_maddubs_epi16(_mm256_packus_epi16(codes, codes), weights);
            let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(pairs, pairs), lanes);
            _mm_storel_epi64(out.as_mut_ptr().cast(), _mm256_castsi256_si128(bytes));
        }
    }
}

/// Codes of a block of whole sixteens, one per byte.
#[target_feature(enable = "avx2,fma,f16c")]
fn encode(x: &[u8], t: &Steps, out: &mut [u8]) {
    for (x, out) in x.chunks_exact(32).zip(out.chunks_exact_mut(16)) {
        // SAFETY: 32 bytes are one vector, 16 are a small one.
        unsafe {
            let codes = sixteen::<true>(x.as_ptr(), t);
            let bytes = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi16(codes, codes));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_castsi256_si128(bytes));
        }
    }
}

/// Bits of the largest magnitude of whole sixteens; NaN and infinities count as largest.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn absmax(x: &[u8]) -> u16 {
    let magnitude = _mm256_set1_epi16(i16::MAX);
    let mut top = _mm256_setzero_si256();
    for x in x.chunks_exact(32) {
        // SAFETY: 32 bytes are one vector.
        let x = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
        top = _mm256_max_epu16(top, _mm256_and_si256(x, magnitude));
    }
    let top = _mm_max_epu16(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
    // There is an instruction for the smallest of eight only.
    !_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(top, _mm_set1_epi16(-1)))) as u16
}

/// The smallest and the largest key of whole sixteens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bounds(x: &[u8]) -> (i16, i16) {
    let (mut low, mut high) = (_mm256_set1_epi16(i16::MAX), _mm256_set1_epi16(i16::MIN));
    for x in x.chunks_exact(32) {
        // SAFETY: 32 bytes are one vector.
        let x = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
        let key = _mm256_sign_epi16(_mm256_and_si256(x, _mm256_set1_epi16(i16::MAX)), x);
        (low, high) = (_mm256_min_epi16(low, key), _mm256_max_epi16(high, key));
    }
    // As in `absmax`: there is one instruction, for the smallest unsigned one.
    let smallest = |v: __m256i, turn: i16| {
        let v = _mm256_xor_si256(v, _mm256_set1_epi16(turn));
        let v = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        _mm_cvtsi128_si32(_mm_minpos_epu16(v)) as i16 ^ turn
    };
    (smallest(low, i16::MIN), smallest(high, i16::MAX))
}

/// The first number of this magnitude.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn first_of(x: &[u8], magnitude: u16) -> u16 {
    let (wanted, mask) = (_mm256_set1_epi16(magnitude as i16), _mm256_set1_epi16(i16::MAX));
    for x in x.chunks_exact(32) {
        // SAFETY: 32 bytes are one vector.
        let numbers = unsafe { _mm256_loadu_si256(x.as_ptr().cast()) };
        let same = _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_and_si256(numbers, mask), wanted));
        if same != 0 {
            let at = same.trailing_zeros() as usize;
            return u16::from_le_bytes([x[at], x[at + 1]]);
        }
    }
    0
}

/// fp32 values.
#[target_feature(enable = "avx2,fma,f16c")]
fn widen<const BRAIN: bool>(x: &[u8], wide: &mut [f32]) {
    let (groups, mut outs) = (x.chunks_exact(16), wide.chunks_exact_mut(8));
    let rest = groups.remainder();
    for (x, out) in groups.zip(outs.by_ref()) {
        // SAFETY: 16 bytes are a small vector, eight numbers are one.
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let brain = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)));
            _mm256_storeu_ps(out.as_mut_ptr(), if BRAIN { brain } else { _mm256_cvtph_ps(x) });
        }
    }
    if BRAIN { Dtype::Bf16 } else { Dtype::F16 }.read_f32(rest, outs.into_remainder());
}

/// Fields of a block of whole sixteens, or None if it holds a number beyond the limit.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fields<const BRAIN: bool>(plan: &Plan<'_>, x: &[u8], wide: &mut [f32]) -> Option<Fields> {
    let top = absmax(x);
    if top >= infinity::<BRAIN>() {
        return None;
    }
    let scale = match plan.spec.kind {
        ScaleKind::Absmax => value::<BRAIN>(top),
        // Zeros of either sign give +0.
        ScaleKind::SignedAbsmax if top == 0 => 0.0,
        ScaleKind::SignedAbsmax => value::<BRAIN>(first_of(x, top)),
        // Any order finds the same bounds, but not the same sign of a zero, which counts among tiny numbers only.
        ScaleKind::Minmax if value::<BRAIN>(top) > f32::MIN_POSITIVE => {
            let (low, high) = bounds(x);
            let value = |key: i16| value::<BRAIN>(key.unsigned_abs() | (key as u16 & 0x8000));
            return Some(block_fields(&[value(low), value(high)], ScaleKind::Minmax, plan.spec.scale_dtype));
        }
        kind => {
            if value::<BRAIN>(top) > limit(kind) {
                return None;
            }
            widen::<BRAIN>(x, wide);
            return Some(plan.fields(wide));
        }
    };
    let scale = if plan.spec.scale_dtype == ScaleDtype::Fp32 { scale } else { plan.spec.scale_dtype.round(scale) };
    Some(Fields { scale, zero: 0.0 })
}

/// What blocks of a tensor have in common.
struct Encoder<'p> {
    plan: &'p Plan<'p>,
    t: Thresholds,
    zero_code: u8,
    /// Of a pair of codes in its byte.
    weights: __m256i,
}

impl Encoder<'_> {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn steps<const BRAIN: bool>(&self, fields: Fields) -> Steps {
        let keys = match self.plan.table.as_ref().and_then(|table| table.keys(fields.scale)) {
            Some(keys) => keys,
            None => keys::<BRAIN>(&self.t, fields),
        };
        steps(keys, fields.scale)
    }

    /// Whole blocks of whole sixteens to nibbles. All fields come before all codes, so that no block waits for the scale of
    /// the one before.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn blocks<const BRAIN: bool, const TURN: bool>(&self, blocks: &[u8], sink: &mut Sink<'_>, wide: &mut [f32]) -> Result<()> {
        let (size, mut all) = (2 * self.plan.spec.block, [Fields::default(); GROUP]);
        for (x, found) in blocks.chunks_exact(size).zip(&mut all) {
            *found = fields::<BRAIN>(self.plan, x, wide).ok_or_else(unfit)?;
            sink.fields(*found);
        }
        for ((x, out), &fields) in blocks.chunks_exact(size).zip(sink.rest().chunks_exact_mut(size / 4)).zip(&all) {
            if fields.scale == 0.0 {
                out.fill(self.zero_code * 0x11);
            } else {
                encode_packed::<TURN>(x, &self.steps::<BRAIN>(fields), self.weights, out);
            }
        }
        sink.skip(blocks.len() / 2);
        Ok(())
    }

    /// A block of any length, and codes of any width.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn block<const BRAIN: bool>(&self, x: &[u8], sink: &mut Sink<'_>, wide: &mut [f32]) -> Result<()> {
        let plan = self.plan;
        if !x.len().is_multiple_of(32) || plan.thresholds.is_none() || (plan.divide && wide.len() < plan.spec.block) {
            widen::<BRAIN>(x, wide);
            plan.check(wide)?;
            let fields = plan.fields(wide);
            sink.fields(fields);
            return sink.codes(wide.len(), |out| plan.encode(wide, fields, out));
        }
        let fields = fields::<BRAIN>(plan, x, wide).ok_or_else(unfit)?;
        sink.fields(fields);
        if fields.scale == 0.0 {
            return sink.codes(wide.len(), |out| out.fill(self.zero_code));
        }
        let t = self.steps::<BRAIN>(fields);
        sink.codes(wide.len(), |out| encode(x, &t, out))
    }
}

/// [`Plan::quantize_piece`] of 16-bit numbers: bfloat16 if `BRAIN`, else fp16.
///
/// # Safety
/// Only where `avx2::available` is true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize_piece<const BRAIN: bool>(plan: &Plan<'_>, piece: Piece<&[u8], &mut [u8]>) -> Result<()> {
    let mut sink = Sink::new(plan, piece.codes, piece.fields);
    let mut wide = [0f32; 512];
    let weights = _mm256_set1_epi16(if plan.spec.order == NibbleOrder::HighFirst { 0x0110 } else { 0x1001 });
    let t = thresholds(plan.thresholds.as_ref().unwrap_or(&[0.0; 16]));
    let encoder = Encoder { plan, t, zero_code: plan.book.zero_code(), weights };
    let size = 2 * plan.spec.block;
    let nibbles = plan.thresholds.is_some() && plan.book.bits() == 4 && size.is_multiple_of(32);
    for group in piece.numbers.chunks(2 * piece.row).flat_map(|row| row.chunks(GROUP * size)) {
        let whole = if nibbles && sink.waiting == 0 { group.len() / size * size } else { 0 };
        match plan.spec.kind {
            ScaleKind::SignedAbsmax => encoder.blocks::<BRAIN, true>(&group[..whole], &mut sink, &mut wide[..size / 2])?,
            _ => encoder.blocks::<BRAIN, false>(&group[..whole], &mut sink, &mut wide[..size / 2])?,
        }
        for x in group[whole..].chunks(size) {
            encoder.block::<BRAIN>(x, &mut sink, &mut wide[..x.len() / 2])?;
        }
    }
    sink.finish()
}
