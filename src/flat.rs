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

use rayon::prelude::*;

use crate::codebook::Codebook;
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::{Error, Result};
use crate::pack;

use piece::{Piece, Plan, simd_available};

#[cfg(target_arch = "x86_64")]
mod avx2;
mod piece;
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

    fn field_bytes(&self) -> usize {
        self.kind.fields() * self.scale_dtype.bytes()
    }

    /// Errors unless this spec, and a tensor of `n` elements in rows of `row`, make sense.
    fn check(&self, n: usize, row: usize) -> Result<()> {
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

/// Errors on the first number that cannot be quantized: NaN, an infinity, or a magnitude whose sum over a block overflows.
fn check_numbers(x: &[f32], kind: ScaleKind) -> Result<()> {
    let limit = if kind == ScaleKind::MeanAbsmax { f32::MAX / 1024.0 } else { f32::MAX };
    let fits = |v: &f32| v.abs() <= limit;
    let simd = simd_available();
    let bad = x.par_chunks(PIECE).position_first(|piece| {
        #[cfg(target_arch = "x86_64")]
        if simd {
            // SAFETY: AVX2 is available.
            return !unsafe { avx2::all_within(piece, limit) };
        }
        let _ = simd;
        !piece.iter().fold(true, |all, v| all & fits(v))
    });
    let Some(piece) = bad else { return Ok(()) };
    let index = x.iter().skip(piece * PIECE).position(|v| !fits(v)).unwrap_or_default() + piece * PIECE;
    if x[index].is_finite() {
        return Err(Error::value("x", format!("magnitudes up to {limit:e} around a mean"), format!("{:e} at {index}", x[index])));
    }
    Err(Error::NonFinite { what: "x".into(), index, got: x[index].to_string() })
}

/// Quantizes `x`, rows of `row` elements. NaN and infinities are errors.
pub fn quantize(x: &[f32], row: usize, spec: &FlatSpec) -> Result<Quantized> {
    spec.check(x.len(), row)?;
    let mut codes = vec![0; spec.codes_len(x.len())];
    let mut fields = vec![0; spec.fields_len(x.len(), row)];
    quantize_into(x, row, spec, &mut codes, &mut fields)?;
    Ok(Quantized { codes, fields })
}

/// [`quantize`] into slices of [`FlatSpec::codes_len`] and [`FlatSpec::fields_len`] bytes. On an error nothing is written.
pub fn quantize_into(x: &[f32], row: usize, spec: &FlatSpec, codes: &mut [u8], fields: &mut [u8]) -> Result<()> {
    quantize_with(x, row, spec, codes, fields, true)
}

fn quantize_with(x: &[f32], row: usize, spec: &FlatSpec, codes: &mut [u8], fields: &mut [u8], simd: bool) -> Result<()> {
    spec.check(x.len(), row)?;
    check_len("codes", spec.codes_len(x.len()), codes.len())?;
    check_len("fields", spec.fields_len(x.len(), row), fields.len())?;
    check_numbers(x, spec.kind)?;
    let (mut x, mut codes, mut fields) = (x, codes, fields);
    let mut pieces = Vec::new();
    for (n, row) in if x.is_empty() { Vec::new() } else { piece_lengths(x.len(), row, spec.block) } {
        let (numbers, rest) = x.split_at(n);
        let (c, codes_rest) = codes.split_at_mut(spec.codes_len(n));
        let (f, fields_rest) = fields.split_at_mut(blocks(n, row, spec.block) * spec.field_bytes());
        pieces.push(Piece { numbers, codes: c, fields: f, row });
        (x, codes, fields) = (rest, codes_rest, fields_rest);
    }
    let plan = Plan::new(spec, simd);
    pieces.into_par_iter().try_for_each(|piece| plan.quantize_piece(piece))
}

/// Blocks of a piece of `n` elements, whose last row may be short.
fn blocks(n: usize, row: usize, block: usize) -> usize {
    n / row * row.div_ceil(block) + (n % row).div_ceil(block)
}

/// The numbers that `n` codes in rows of `row` stand for, into `out` of `n` elements. On an error (lengths, or codes beyond the
/// codebook) what `out` holds is unspecified.
pub fn dequantize(codes: &[u8], fields: &[u8], n: usize, row: usize, spec: &FlatSpec, out: &mut [f32]) -> Result<()> {
    dequantize_with(codes, fields, n, row, spec, out, true)
}

fn dequantize_with(
    codes: &[u8],
    fields: &[u8],
    n: usize,
    row: usize,
    spec: &FlatSpec,
    out: &mut [f32],
    simd: bool,
) -> Result<()> {
    spec.check(n, row)?;
    check_len("codes", spec.codes_len(n), codes.len())?;
    check_len("fields", spec.fields_len(n, row), fields.len())?;
    if out.len() != n {
        return Err(Error::shape("out", format!("[{n}]"), format!("[{}]", out.len())));
    }
    let (mut codes, mut fields, mut out) = (codes, fields, out);
    let mut pieces = Vec::new();
    for (n, row) in if n == 0 { Vec::new() } else { piece_lengths(n, row, spec.block) } {
        let (numbers, rest) = out.split_at_mut(n);
        let (c, codes_rest) = codes.split_at(spec.codes_len(n));
        let (f, fields_rest) = fields.split_at(blocks(n, row, spec.block) * spec.field_bytes());
        pieces.push(Piece { numbers, codes: c, fields: f, row });
        (out, codes, fields) = (rest, codes_rest, fields_rest);
    }
    let plan = Plan::new(spec, simd);
    pieces.into_par_iter().try_for_each(|piece| plan.dequantize_piece(piece))
}
