//! Codes to 16-bit numbers with AVX2: the 16 values of a block, rounded once, are two tables of bytes.

use std::arch::x86_64::*;

use super::piece::{Piece, Plan};
use super::{FlatSpec, NibbleOrder};
use crate::codec::{Fields, ScaleDtype};
use crate::error::Result;
use crate::pack;
use crate::tensor::Dtype;

/// The values that codes of a block stand for: their low bytes and their high bytes, the same 16 in both lanes.
#[derive(Clone, Copy)]
struct Values {
    low: __m256i,
    high: __m256i,
}

impl Values {
    /// The values, whole.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn whole(&self) -> [u16; 16] {
        let mut bytes = [[0u8; 32]; 2];
        for (bytes, v) in bytes.iter_mut().zip([self.low, self.high]) {
            // SAFETY: 32 bytes are one vector.
            unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v) };
        }
        std::array::from_fn(|i| u16::from_le_bytes([bytes[0][i], bytes[1][i]]))
    }
}

/// The levels of a codebook as [`values`] takes them: those that end in the first lane's words 0 to 3, 4 to 7, then those of
/// the second lane.
#[derive(Clone, Copy)]
struct Levels {
    even: __m256,
    odd: __m256,
}

impl Levels {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(l: &[f32; 16]) -> Self {
        // SAFETY: 16 levels are four vectors of four.
        unsafe {
            let four = |i: usize| _mm_loadu_ps(l.as_ptr().add(4 * i));
            Self { even: _mm256_set_m128(four(2), four(0)), odd: _mm256_set_m128(four(3), four(1)) }
        }
    }
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

/// The values of a block: `fma(level, scale, zero)`, rounded as [`round`] does where they are not NaN, which finite fields
/// never give.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn values<const BRAIN: bool>(levels: Levels, scale: f32, zero: f32) -> Values {
    let (scale, zero) = (_mm256_set1_ps(scale), _mm256_set1_ps(zero));
    let (even, odd) = (_mm256_fmadd_ps(levels.even, scale, zero), _mm256_fmadd_ps(levels.odd, scale, zero));
    let (words, apart) = if BRAIN {
        let up = |v| {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd)
        };
        // The upper halves are the values: those of `even` in the even words, those of `odd` in the odd ones.
        let words = _mm256_blend_epi16::<0b1010_1010>(_mm256_srli_epi32::<16>(up(even)), up(odd));
        (words, _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15))
    } else {
        let half = |v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v);
        // Words 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15.
        let words = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_set_m128i(half(odd), half(even)));
        (words, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15))
    };
    // In each lane the eight low bytes, then the eight high ones.
    let bytes = _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(apart));
    Values { low: _mm256_permute4x64_epi64::<0b1000_1000>(bytes), high: _mm256_permute4x64_epi64::<0b1101_1101>(bytes) }
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

/// The codes of 32 bytes, one per byte, as [`look_up`] takes them for numbers in order: the even words of bytes are in the
/// first lane, the odd ones in the second.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn split<const HIGH: bool>(packed: __m256i) -> (__m256i, __m256i) {
    let packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    let mask = _mm256_set1_epi8(15);
    let (a, b) = (_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask));
    let (first, second) = if HIGH { (b, a) } else { (a, b) };
    (_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second))
}

/// The values of 64 packed nibbles.
///
/// # Safety
/// 32 bytes can be read at `codes` and 128 written at `to`, on a multiple of 32 if `STREAM`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn sixty_four<const HIGH: bool, const STREAM: bool>(codes: *const u8, v: &Values, to: *mut u8) {
    // SAFETY: as promised.
    unsafe {
        let (front, back) = split::<HIGH>(_mm256_loadu_si256(codes.cast()));
        look_up::<STREAM>(front, v, to);
        look_up::<STREAM>(back, v, to.add(64));
    }
}

/// Values of packed nibbles, by 64, then 32, then 16; returns how many elements are left.
#[target_feature(enable = "avx2,fma,f16c")]
fn decode_packed<const HIGH: bool>(bytes: &[u8], v: &Values, out: &mut [u8]) -> usize {
    // By the numbers: 63 of them have as many bytes of codes as 64.
    let mut rest = &bytes[out.len() / 128 * 32..];
    let mut outs = out.chunks_exact_mut(128);
    for (out, bytes) in outs.by_ref().zip(bytes.chunks_exact(32)) {
        // SAFETY: 32 bytes and 128 of them.
        unsafe { sixty_four::<HIGH, false>(bytes.as_ptr(), v, out.as_mut_ptr()) };
    }
    let mut out = outs.into_remainder();
    let mut left = out.len() / 2;
    if out.len() >= 64 {
        let (now, later) = out.split_at_mut(64);
        // SAFETY: 16 bytes are half a vector, 64 are two.
        unsafe {
            let (front, _) = split::<HIGH>(_mm256_castsi128_si256(_mm_loadu_si128(rest.as_ptr().cast())));
            look_up::<false>(front, v, now.as_mut_ptr());
        }
        (rest, out, left) = (&rest[16..], later, left - 32);
    }
    if out.len() >= 32 {
        // SAFETY: eight bytes are a quarter of a vector, 32 are one.
        unsafe {
            let (codes, _) = split::<HIGH>(_mm256_castsi128_si256(_mm_loadl_epi64(rest.as_ptr().cast())));
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
    if done == codes.len() {
        return;
    }
    let whole = v.whole();
    for (code, out) in codes[done..].iter().zip(out[2 * done..].chunks_exact_mut(2)) {
        out.copy_from_slice(&whole[usize::from(*code)].to_le_bytes());
    }
}

/// Blocks whose fields are read at once.
const RUN: usize = 64;

/// The fields of blocks that follow each other: scales, and means or zero points.
struct Run {
    scales: [f32; RUN],
    zeros: [f32; RUN],
}

impl Run {
    /// Reads the next fields; false if one of them is not finite.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn read(&mut self, spec: &FlatSpec, stored: &[u8]) -> bool {
        let (dtype, two) = (spec.scale_dtype, spec.kind.fields() == 2);
        if let (ScaleDtype::Fp32, false) = (dtype, two) {
            for (scale, bytes) in self.scales.iter_mut().zip(stored.chunks_exact(4)) {
                *scale = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        } else {
            for (i, bytes) in stored.chunks_exact(spec.field_bytes()).enumerate() {
                self.scales[i] = dtype.read(bytes);
                self.zeros[i] = if two { dtype.read(&bytes[dtype.bytes()..]) } else { 0.0 };
            }
        }
        // Zero times anything finite is zero.
        self.scales.iter().zip(&self.zeros).fold(true, |all, (s, z)| all & (s * 0.0 == 0.0) & (z * 0.0 == 0.0))
    }
}

/// Whole blocks of nibbles to numbers, 64 at a time.
///
/// # Safety
/// If `STREAM`, `out` begins on a multiple of 32.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blocks<const BRAIN: bool, const HIGH: bool, const STREAM: bool>(
    levels: Levels,
    run: &Run,
    block: usize,
    codes: &[u8],
    out: &mut [u8],
) {
    let pairs = codes.chunks_exact(block / 2).zip(out.chunks_exact_mut(2 * block));
    for ((codes, out), (scale, zero)) in pairs.zip(run.scales.iter().zip(&run.zeros)) {
        let v = values::<BRAIN>(levels, *scale, *zero);
        for (codes, out) in codes.chunks_exact(32).zip(out.chunks_exact_mut(128)) {
            // SAFETY: 32 bytes and 128 of them; the alignment is as promised, since every block is a multiple of 128 bytes.
            unsafe { sixty_four::<HIGH, STREAM>(codes.as_ptr(), &v, out.as_mut_ptr()) };
        }
    }
}

/// [`Plan::dequantize_piece`] to 16-bit numbers: bfloat16 if `BRAIN`, else fp16.
///
/// # Safety
/// Only where `avx2::available` is true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dequantize_piece<const BRAIN: bool>(plan: &Plan<'_>, piece: Piece<&mut [u8], &[u8]>) -> Result<()> {
    let (bits, high_first) = (plan.book.bits(), plan.spec.order == NibbleOrder::HighFirst);
    let (block, field_bytes) = (plan.spec.block, plan.spec.field_bytes());
    // Codes without a level are left to the code that names them.
    let count = plan.book.levels().len();
    let levels = plan.levels.filter(|_| count == 1 << bits || bits == 4 && within(piece.codes, count));
    let levels = levels.map(|l| Levels::new(&l));
    let (mut fields, mut first, mut room) = (piece.fields, 0usize, Room { codes: [0; 512], wide: [0.0; 512] });
    let mut run = Run { scales: [0.0; RUN], zeros: [0.0; RUN] };
    for row in piece.numbers.chunks_mut(2 * piece.row) {
        let mut row = row;
        while !row.is_empty() {
            // A run of whole blocks of nibbles, if one is next.
            let n = (row.len() / (2 * block)).min(RUN);
            if let Some(levels) = levels.filter(|_| n > 0 && bits == 4 && block.is_multiple_of(64) && first.is_multiple_of(2))
                && run.read(plan.spec, &fields[..n * field_bytes])
            {
                let (out, rest) = row.split_at_mut(2 * n * block);
                let codes = &piece.codes[first / 2..(first + n * block) / 2];
                let stream = plan.stream && out.as_ptr().addr().is_multiple_of(32);
                // SAFETY: streamed to where the alignment allows it.
                unsafe {
                    match (high_first, stream) {
                        (false, false) => blocks::<BRAIN, false, false>(levels, &run, block, codes, out),
                        (false, true) => blocks::<BRAIN, false, true>(levels, &run, block, codes, out),
                        (true, false) => blocks::<BRAIN, true, false>(levels, &run, block, codes, out),
                        (true, true) => blocks::<BRAIN, true, true>(levels, &run, block, codes, out),
                    }
                }
                (row, fields, first) = (rest, &fields[n * field_bytes..], first + n * block);
                continue;
            }
            let (out, rest) = row.split_at_mut(row.len().min(2 * block));
            let own = plan.read_fields(&fields[..field_bytes]);
            one_block::<BRAIN>(plan, levels, own, piece.codes, first, out, &mut room)?;
            (row, fields, first) = (rest, &fields[field_bytes..], first + out.len() / 2);
        }
    }
    if plan.stream {
        _mm_sfence();
    }
    Ok(())
}

/// Room for the codes and the fp32 numbers of one block.
struct Room {
    codes: [u8; 512],
    wide: [f32; 512],
}

/// One block of any length and width, whose codes begin at element `first` of the piece.
#[target_feature(enable = "avx2,fma,f16c")]
fn one_block<const BRAIN: bool>(
    plan: &Plan<'_>,
    levels: Option<Levels>,
    fields: Fields,
    codes: &[u8],
    first: usize,
    out: &mut [u8],
    room: &mut Room,
) -> Result<()> {
    let (bits, high_first) = (plan.book.bits(), plan.spec.order == NibbleOrder::HighFirst);
    let (n, at) = (out.len() / 2, first * usize::from(bits));
    let finite = fields.scale.is_finite() && fields.zero.is_finite();
    let Some(levels) = levels.filter(|_| finite && at.is_multiple_of(8)) else {
        plan.decode(codes, first, fields, &mut room.wide[..n], false)?;
        narrow::<BRAIN>(&room.wide[..n], out);
        return Ok(());
    };
    let v = values::<BRAIN>(levels, fields.scale, fields.zero);
    let bytes = &codes[at / 8..at / 8 + pack::packed_len(n, bits)];
    let left = match (bits, high_first) {
        (4, false) => decode_packed::<false>(bytes, &v, out),
        (4, true) => decode_packed::<true>(bytes, &v, out),
        _ => n,
    };
    if left > 0 {
        let (bytes, codes) = (&bytes[(n - left) / 8 * usize::from(bits)..], &mut room.codes[..left]);
        match high_first {
            true => pack::unpack_nibbles_high_first(bytes, left, codes)?,
            false => pack::unpack(bytes, bits, left, codes)?,
        }
        decode(codes, &v, &mut out[2 * (n - left)..]);
    }
    Ok(())
}
