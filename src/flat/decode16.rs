//! Codes to 16-bit numbers with AVX2: the 16 values of a block, rounded once, are two tables of bytes.

use std::arch::x86_64::*;

use super::NibbleOrder;
use super::piece::{Piece, Plan};
use crate::codec::Fields;
use crate::error::Result;
use crate::pack;
use crate::tensor::Dtype;

/// The values that codes of a block stand for: low bytes and high bytes, the same 16 in both lanes, and whole.
struct Values {
    low: __m256i,
    high: __m256i,
    whole: [u16; 16],
}

/// 16 numbers, rounded as `Dtype::write_f32` does.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn round<const BRAIN: bool>(a: __m256, b: __m256) -> __m256i {
    if BRAIN {
        let round = |v| {
            let bits = _mm256_castps_si256(v);
            let upper = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            _mm256_blendv_epi8(_mm256_srli_epi32::<16>(up), _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), nan)
        };
        _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_packus_epi32(round(a), round(b)))
    } else {
        let round = |v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
        _mm256_set_m128i(round(b), round(a))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn values<const BRAIN: bool>(levels: (__m256, __m256), fields: Fields) -> Values {
    let (scale, zero) = (_mm256_set1_ps(fields.scale), _mm256_set1_ps(fields.zero));
    let rounded = round::<BRAIN>(_mm256_fmadd_ps(levels.0, scale, zero), _mm256_fmadd_ps(levels.1, scale, zero));
    // In each lane the eight low bytes, then the eight high ones.
    let apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    let bytes = _mm256_shuffle_epi8(rounded, apart);
    let (low, high) = (_mm256_permute4x64_epi64::<0b1000_1000>(bytes), _mm256_permute4x64_epi64::<0b1101_1101>(bytes));
    let mut whole = [0; 16];
    // SAFETY: 16 values are one vector.
    unsafe { _mm256_storeu_si256(whole.as_mut_ptr().cast(), rounded) };
    Values { low, high, whole }
}

/// [`round`] for a block that was decoded to fp32.
#[target_feature(enable = "avx2,fma,f16c")]
fn narrow<const BRAIN: bool>(x: &[f32], out: &mut [u8]) {
    let (groups, mut outs) = (x.chunks_exact(16), out.chunks_exact_mut(32));
    let rest = groups.remainder();
    for (x, out) in groups.zip(outs.by_ref()) {
        // SAFETY: 16 numbers are two vectors, 32 bytes are one.
        unsafe {
            let rounded = round::<BRAIN>(_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8)));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), rounded);
        }
    }
    if BRAIN { Dtype::Bf16 } else { Dtype::F16 }.write_f32(outs.into_remainder(), rest);
}

/// Whether all nibbles are below `count`.
#[target_feature(enable = "avx2,fma,f16c")]
fn within(bytes: &[u8], count: usize) -> bool {
    usize::from(bytes.iter().fold(0, |top, b| (b & 15).max(b >> 4).max(top))) < count
}

/// Looks up 32 codes, one per byte, and writes their values to `to`: of the first lane's codes 0..8 and 16..24, of the second
/// lane's 8..16 and 24..32.
///
/// # Safety
/// 64 bytes can be written at `to`, on a multiple of 32 if `STREAM`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn look_up<const STREAM: bool>(codes: __m256i, v: &Values, to: *mut u8) {
    let (low, high) = (_mm256_shuffle_epi8(v.low, codes), _mm256_shuffle_epi8(v.high, codes));
    let (front, back) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
    // SAFETY: as promised.
    unsafe {
        if STREAM {
            _mm256_stream_si256(to.cast(), front);
            _mm256_stream_si256(to.add(32).cast(), back);
        } else {
            _mm256_storeu_si256(to.cast(), front);
            _mm256_storeu_si256(to.add(32).cast(), back);
        }
    }
}

/// Values of packed nibbles, by 64, then 32, then 16; returns how many elements are left.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn decode_packed<const STREAM: bool>(bytes: &[u8], high_first: bool, v: &Values, out: &mut [u8]) -> usize {
    let mask = _mm256_set1_epi8(15);
    // Even words of codes to the first lane, odd ones to the second: each vector of values is then in order.
    let lanes = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    let split = |packed| {
        let packed = _mm256_permutevar8x32_epi32(packed, lanes);
        let (a, b) = (_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask));
        if high_first { (b, a) } else { (a, b) }
    };
    // By the numbers: 63 of them have as many bytes of codes as 64.
    let mut rest = &bytes[out.len() / 128 * 32..];
    let mut outs = out.chunks_exact_mut(128);
    for (out, bytes) in outs.by_ref().zip(bytes.chunks_exact(32)) {
        // SAFETY: 32 bytes are one vector, 128 are four; the caller of `dequantize_piece` checked the alignment.
        unsafe {
            let (first, second) = split(_mm256_loadu_si256(bytes.as_ptr().cast()));
            look_up::<STREAM>(_mm256_unpacklo_epi8(first, second), v, out.as_mut_ptr());
            look_up::<STREAM>(_mm256_unpackhi_epi8(first, second), v, out.as_mut_ptr().add(64));
        }
    }
    let mut out = outs.into_remainder();
    let mut left = out.len() / 2;
    if out.len() >= 64 {
        let (now, later) = out.split_at_mut(64);
        // SAFETY: 16 bytes are half a vector, 64 are two.
        unsafe {
            let (first, second) = split(_mm256_castsi128_si256(_mm_loadu_si128(rest.as_ptr().cast())));
            look_up::<STREAM>(_mm256_unpacklo_epi8(first, second), v, now.as_mut_ptr());
        }
        (rest, out, left) = (&rest[16..], later, left - 32);
    }
    if out.len() >= 32 {
        // SAFETY: eight bytes are a quarter of a vector, 32 are one.
        unsafe {
            let (first, second) = split(_mm256_castsi128_si256(_mm_loadl_epi64(rest.as_ptr().cast())));
            let codes = _mm256_unpacklo_epi8(first, second);
            let (low, high) = (_mm256_shuffle_epi8(v.low, codes), _mm256_shuffle_epi8(v.high, codes));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_unpacklo_epi8(low, high));
        }
        left -= 16;
    }
    left
}

/// Values of codes, one per byte; those of whole groups of 32 by vectors.
#[target_feature(enable = "avx2,fma,f16c")]
fn decode(codes: &[u8], v: &Values, out: &mut [u8]) {
    for (codes, out) in codes.chunks_exact(32).zip(out.chunks_exact_mut(64)) {
        // SAFETY: 32 bytes are one vector, 64 are two.
        unsafe {
            let codes = _mm256_loadu_si256(codes.as_ptr().cast());
            look_up::<false>(_mm256_permute4x64_epi64::<0b1101_1000>(codes), v, out.as_mut_ptr());
        }
    }
    let done = codes.len() / 32 * 32;
    for (code, out) in codes[done..].iter().zip(out[2 * done..].chunks_exact_mut(2)) {
        out.copy_from_slice(&v.whole[usize::from(*code)].to_le_bytes());
    }
}

/// [`Plan::dequantize_piece`] to 16-bit numbers: bfloat16 if `BRAIN`, else fp16.
///
/// # Safety
/// Only where `avx2::available` is true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dequantize_piece<const BRAIN: bool>(plan: &Plan<'_>, piece: Piece<&mut [u8], &[u8]>) -> Result<()> {
    let (bits, high_first) = (plan.book.bits(), plan.spec.order == NibbleOrder::HighFirst);
    // Codes without a level are left to the code that names them.
    let count = plan.book.levels().len();
    let levels = plan.levels.filter(|_| count == 1 << bits || bits == 4 && within(piece.codes, count));
    // SAFETY: 16 levels are two vectors.
    let levels = levels.map(|l| unsafe { (_mm256_loadu_ps(l.as_ptr()), _mm256_loadu_ps(l.as_ptr().add(8))) });
    let mut fields_in = piece.fields.chunks_exact(plan.spec.field_bytes());
    let (mut first, mut codes, mut wide) = (0, [0u8; 512], [0f32; 512]);
    for row in piece.numbers.chunks_mut(2 * piece.row) {
        for out in row.chunks_mut(2 * plan.spec.block) {
            let (n, at) = (out.len() / 2, first * usize::from(bits));
            let fields = plan.read_fields(fields_in.next().unwrap_or_default());
            first += n;
            let Some(levels) = levels.filter(|_| at.is_multiple_of(8)) else {
                plan.decode(piece.codes, first - n, fields, &mut wide[..n], false)?;
                narrow::<BRAIN>(&wide[..n], out);
                continue;
            };
            let v = values::<BRAIN>(levels, fields);
            let bytes = &piece.codes[at / 8..at / 8 + pack::packed_len(n, bits)];
            let left = match bits {
                4 if plan.stream && out.as_ptr().addr().is_multiple_of(32) => decode_packed::<true>(bytes, high_first, &v, out),
                4 => decode_packed::<false>(bytes, high_first, &v, out),
                _ => n,
            };
            if left > 0 {
                let (bytes, codes) = (&bytes[(n - left) / 8 * usize::from(bits)..], &mut codes[..left]);
                match high_first {
                    true => pack::unpack_nibbles_high_first(bytes, left, codes)?,
                    false => pack::unpack(bytes, bits, left, codes)?,
                }
                decode(codes, &v, &mut out[2 * (n - left)..]);
            }
        }
    }
    if plan.stream {
        _mm_sfence();
    }
    Ok(())
}
