//! Where the codes and fields of a piece go.

use super::piece::Plan;
use crate::codec::{Fields, ScaleDtype};
use crate::error::Result;

/// Codes and fields of a piece, block by block. Codes that end inside a byte wait for the next block.
pub(super) struct Sink<'p> {
    plan: &'p Plan<'p>,
    fields: std::slice::ChunksExactMut<'p, u8>,
    codes: &'p mut [u8],
    held: [u8; 520],
    /// Codes in `held`.
    pub(super) waiting: usize,
    /// Bytes of codes written.
    at: usize,
}

impl<'p> Sink<'p> {
    pub(super) fn new(plan: &'p Plan<'p>, codes: &'p mut [u8], fields: &'p mut [u8]) -> Self {
        let fields = fields.chunks_exact_mut(plan.spec.field_bytes());
        Self { plan, fields, codes, held: [0; 520], waiting: 0, at: 0 }
    }

    /// Writes the fields of the next block.
    #[inline(always)]
    pub(super) fn fields(&mut self, fields: Fields) {
        let (spec, Some(out)) = (self.plan.spec, self.fields.next()) else { return };
        if spec.scale_dtype == ScaleDtype::Fp32 {
            out[..4].copy_from_slice(&fields.scale.to_le_bytes());
        } else {
            spec.scale_dtype.write(out, fields.scale);
        }
        if spec.kind.fields() == 2 {
            spec.scale_dtype.write(&mut out[spec.scale_dtype.bytes()..], fields.zero);
        }
    }

    /// The bytes not written yet, for one who packs by himself when nothing waits.
    #[inline(always)]
    pub(super) fn rest(&mut self) -> &mut [u8] {
        &mut self.codes[self.at..]
    }

    /// `n` nibbles were written to [`Sink::rest`].
    #[inline(always)]
    pub(super) fn skip(&mut self, n: usize) {
        self.at += n / 2;
    }

    /// Packs the `n` codes of a block that `fill` writes, one per byte.
    pub(super) fn codes(&mut self, n: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        fill(&mut self.held[self.waiting..self.waiting + n]);
        let total = self.waiting + n;
        let (whole, bytes) = (total / 8 * 8, total / 8 * usize::from(self.plan.book.bits()));
        self.plan.pack(&self.held[..whole], &mut self.codes[self.at..self.at + bytes])?;
        self.at += bytes;
        self.held.copy_within(whole..total, 0);
        self.waiting = total - whole;
        Ok(())
    }

    /// Packs what still waits.
    pub(super) fn finish(self) -> Result<()> {
        if self.waiting > 0 {
            self.plan.pack(&self.held[..self.waiting], &mut self.codes[self.at..])?;
            if self.plan.divide && self.waiting % 2 == 1 {
                self.codes[self.at + self.waiting / 2] |= self.plan.book.zero_code();
            }
        }
        Ok(())
    }
}
