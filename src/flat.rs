//! Whole tensors to codes and fields and back, outside of any page: `quantize` and `dequantize`.
//!
//! A tensor is `[rows, row]`, row-major. Blocks run along the last axis and never cross a row; the last block of a row may be
//! shorter. Codes are packed over the whole tensor, fields follow block by block (scale, then mean or zero point).
//!
//! **bitsandbytes.** NF4 with absmax scales in fp32 and the first element in the high nibble is the 4-bit format of
//! bitsandbytes, and this module then follows its CPU rules bit by bit, in codes, scales and decoded values: midpoints rounded
//! in fp32 ([`Codebook::nf4_bitsandbytes`]), a short last block divided by its scale instead of multiplied by the reciprocal,
//! an unused last nibble that holds the code of 0. Its blocks ignore rows, so pass one row. One deviation: the scale of a
//! short last block below 1e-38 (a block of zeros, say) is stored as it is and not as 1e-38; codes are the same.

use crate::codebook::Codebook;
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::{Error, Result};
use crate::pack;
use crate::parallel;
use crate::tensor::Dtype;

use piece::{Piece, Plan};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod decode16;
#[cfg(target_arch = "x86_64")]
mod encode16;
#[cfg(target_arch = "x86_64")]
mod keys16;
mod piece;
mod sink;
#[cfg(test)]
mod tests;

/// Which half of a byte holds the first of two 4-bit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NibbleOrder {
    /// The low half, as everywhere else in this crate; the only order for other widths.
    LowFirst,
    /// The high half, as in bitsandbytes.
    HighFirst,
}

/// How a whole tensor is quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct FlatSpec {
    /// The levels.
    pub book: Codebook,
    /// Elements that share one scale: a multiple of 8 from 16 to 512.
    pub block: usize,
    /// What a block stores.
    pub kind: ScaleKind,
    /// How its fields are stored.
    pub scale_dtype: ScaleDtype,
    /// Which half of a byte comes first (4 bits only).
    pub order: NibbleOrder,
}

/// A quantized tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantized {
    /// Codes, packed over the whole tensor.
    pub codes: Vec<u8>,
    /// Per block scale, then mean or zero point where the kind has one, little endian.
    pub fields: Vec<u8>,
}

/// Elements per parallel piece, about: 64 KiB of fp32.
const PIECE: usize = 16384;

impl FlatSpec {
    /// The 4-bit format of bitsandbytes at this block size.
    pub fn bitsandbytes(block: usize) -> Self {
        let book = Codebook::nf4_bitsandbytes();
        Self { book, block, kind: ScaleKind::Absmax, scale_dtype: ScaleDtype::Fp32, order: NibbleOrder::HighFirst }
    }

    /// Bytes of all codes of `n` elements.
    pub fn codes_len(&self, n: usize) -> usize {
        pack::packed_len(n, self.book.bits())
    }

    /// Bytes of all fields of `n` elements in rows of `row`.
    pub fn fields_len(&self, n: usize, row: usize) -> usize {
        if n == 0 { 0 } else { n / row * row.div_ceil(self.block) * self.field_bytes() }
    }

    /// Whether this is bitsandbytes' 4-bit format, whose own rules then hold.
    pub(crate) fn follows_bitsandbytes(&self) -> bool {
        self.book.levels() == Codebook::nf4_bitsandbytes().levels()
            && (self.kind, self.scale_dtype, self.order) == (ScaleKind::Absmax, ScaleDtype::Fp32, NibbleOrder::HighFirst)
    }

    fn field_bytes(&self) -> usize {
        self.kind.fields() * self.scale_dtype.bytes()
    }

    /// Errors unless this spec, and a tensor of `n` elements in rows of `row`, make sense.
    pub(crate) fn check(&self, n: usize, row: usize) -> Result<()> {
        if !(16..=512).contains(&self.block) || !self.block.is_multiple_of(8) {
            return Err(Error::value("block", "a multiple of 8 from 16 to 512", self.block));
        }
        if self.order == NibbleOrder::HighFirst && self.book.bits() != 4 {
            return Err(Error::value(
                "nibble order",
                "low first, unless codes have 4 bits",
                format!("{} bits", self.book.bits()),
            ));
        }
        if n > 0 && (row == 0 || !n.is_multiple_of(row)) {
            return Err(Error::shape("x", format!("[rows, {row}]"), format!("{n} elements")));
        }
        Ok(())
    }
}

fn check_len(what: &str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::shape(what, format!("[{expected}] bytes"), format!("[{got}]"))) }
}

/// Lengths of the pieces and their row length. Long rows are cut at block boundaries, short ones are grouped; either way a
/// piece has a multiple of 8 elements (the last one aside), hence whole bytes of codes.
fn piece_lengths(n: usize, row: usize, block: usize) -> Vec<(usize, usize)> {
    let cut = |total: usize, step: usize, row: usize| (0..total).step_by(step).map(move |at| (step.min(total - at), row));
    if row > PIECE && (row == n || row.is_multiple_of(8)) {
        let step = PIECE / block * block;
        return (0..n / row).flat_map(|_| cut(row, step, step)).collect();
    }
    let rows = (PIECE / row).max(1).next_multiple_of(8);
    cut(n, rows * row, row).collect()
}

/// The error of the first number that cannot be quantized: NaN, an infinity, or a magnitude beyond the kind's limit.
fn first_unfit(x: &[u8], dtype: Dtype, kind: ScaleKind) -> Option<Error> {
    let (limit, mut wide) = (piece::limit(kind), vec![0f32; PIECE]);
    x.chunks(PIECE * dtype.bytes()).enumerate().find_map(|(i, bytes)| {
        let wide = &mut wide[..bytes.len() / dtype.bytes()];
        dtype.read_f32(bytes, wide);
        let at = wide.iter().position(|v| v.is_nan() || v.abs() > limit)?;
        let (index, got) = (i * PIECE + at, wide[at]);
        Some(match got.is_finite() {
            true => Error::value("x", format!("magnitudes up to {limit:e} around a mean"), format!("{got:e} at {index}")),
            false => Error::NonFinite { what: "x".into(), index, got: got.to_string() },
        })
    })
}

/// Quantizes `x`, rows of `row` elements. NaN and infinities are errors.
pub fn quantize(x: &[f32], row: usize, spec: &FlatSpec) -> Result<Quantized> {
    spec.check(x.len(), row)?;
    let mut codes = vec![0; spec.codes_len(x.len())];
    let mut fields = vec![0; spec.fields_len(x.len(), row)];
    quantize_into(x, row, spec, &mut codes, &mut fields)?;
    Ok(Quantized { codes, fields })
}

/// [`quantize`] into slices of [`FlatSpec::codes_len`] and [`FlatSpec::fields_len`] bytes. On an error what they hold is
/// unspecified: numbers are checked where they are read, once.
pub fn quantize_into(x: &[f32], row: usize, spec: &FlatSpec, codes: &mut [u8], fields: &mut [u8]) -> Result<()> {
    // SAFETY: any fp32 is four bytes.
    let (_, bytes, _) = unsafe { x.align_to::<u8>() };
    quantize_bytes(bytes, Dtype::F32, row, spec, codes, fields)
}

/// [`quantize_into`] of numbers of any dtype, given as their bytes at any alignment. 16-bit numbers are coded as they are,
/// the codes the same as those of their fp32 values.
pub fn quantize_bytes(x: &[u8], dtype: Dtype, row: usize, spec: &FlatSpec, codes: &mut [u8], fields: &mut [u8]) -> Result<()> {
    quantize_with(x, dtype, row, spec, codes, fields, true)
}

fn quantize_with(
    x: &[u8],
    dtype: Dtype,
    row: usize,
    spec: &FlatSpec,
    codes: &mut [u8],
    fields: &mut [u8],
    simd: bool,
) -> Result<()> {
    let n = x.len() / dtype.bytes();
    check_len("x", n * dtype.bytes(), x.len())?;
    spec.check(n, row)?;
    check_len("codes", spec.codes_len(n), codes.len())?;
    check_len("fields", spec.fields_len(n, row), fields.len())?;
    let (all, mut x, mut codes, mut fields) = (x, x, codes, fields);
    let mut pieces = Vec::new();
    for (n, row) in if n == 0 { Vec::new() } else { piece_lengths(n, row, spec.block) } {
        let (numbers, rest) = x.split_at(n * dtype.bytes());
        let (c, codes_rest) = codes.split_at_mut(spec.codes_len(n));
        let (f, fields_rest) = fields.split_at_mut(blocks(n, row, spec.block) * spec.field_bytes());
        pieces.push(Piece { numbers, codes: c, fields: f, row });
        (x, codes, fields) = (rest, codes_rest, fields_rest);
    }
    let plan = Plan::new(spec, dtype, n, simd);
    let done = parallel::each(pieces, Vec::new, |wide, piece| plan.quantize_piece(piece, wide));
    // Pieces end in any order: the number that is named is the first.
    done.map_err(|e| first_unfit(all, dtype, spec.kind).unwrap_or(e))
}

/// Blocks of a piece of `n` elements, whose last row may be short.
fn blocks(n: usize, row: usize, block: usize) -> usize {
    n / row * row.div_ceil(block) + (n % row).div_ceil(block)
}

/// The numbers that `n` codes in rows of `row` stand for, into `out` of `n` elements. On an error (lengths, or codes beyond the
/// codebook) what `out` holds is unspecified.
pub fn dequantize(codes: &[u8], fields: &[u8], n: usize, row: usize, spec: &FlatSpec, out: &mut [f32]) -> Result<()> {
    if out.len() != n {
        return Err(Error::shape("out", format!("[{n}]"), format!("[{}]", out.len())));
    }
    // SAFETY: any fp32 is four bytes, and any four bytes are an fp32.
    let (_, bytes, _) = unsafe { out.align_to_mut::<u8>() };
    dequantize_bytes(codes, fields, row, spec, Dtype::F32, bytes)
}

/// [`dequantize`] to numbers of any dtype, each rounded once from fp32, as their bytes at any alignment.
pub fn dequantize_bytes(codes: &[u8], fields: &[u8], row: usize, spec: &FlatSpec, dtype: Dtype, out: &mut [u8]) -> Result<()> {
    dequantize_with(codes, fields, row, spec, dtype, out, true)
}

fn dequantize_with(
    codes: &[u8],
    fields: &[u8],
    row: usize,
    spec: &FlatSpec,
    dtype: Dtype,
    out: &mut [u8],
    simd: bool,
) -> Result<()> {
    let n = out.len() / dtype.bytes();
    check_len("out", n * dtype.bytes(), out.len())?;
    spec.check(n, row)?;
    check_len("codes", spec.codes_len(n), codes.len())?;
    check_len("fields", spec.fields_len(n, row), fields.len())?;
    let (mut codes, mut fields, mut out) = (codes, fields, out);
    let mut pieces = Vec::new();
    for (n, row) in if n == 0 { Vec::new() } else { piece_lengths(n, row, spec.block) } {
        let (numbers, rest) = out.split_at_mut(n * dtype.bytes());
        let (c, codes_rest) = codes.split_at(spec.codes_len(n));
        let (f, fields_rest) = fields.split_at(blocks(n, row, spec.block) * spec.field_bytes());
        pieces.push(Piece { numbers, codes: c, fields: f, row });
        (out, codes, fields) = (rest, codes_rest, fields_rest);
    }
    let plan = Plan::new(spec, dtype, n, simd);
    parallel::each(pieces, Vec::new, |wide, piece| plan.dequantize_piece(piece, wide))
}
