//! One piece of a tensor to codes and fields and back: the loop over blocks, and its choice of portable or vector code.

#[cfg(target_arch = "x86_64")]
use super::avx2;
use super::{FlatSpec, NibbleOrder};
use crate::codebook::Codebook;
use crate::codec::{Fields, ScaleDtype, ScaleKind, block_fields};
use crate::error::{Error, Result};
use crate::pack;

/// A part of a tensor that starts at a byte boundary of the codes and consists of whole blocks.
pub(super) struct Piece<N, B> {
    pub(super) numbers: N,
    pub(super) codes: B,
    pub(super) fields: B,
    /// Row length inside the piece: blocks start anew at each multiple of it.
    pub(super) row: usize,
}

/// What encoding and decoding look up per tensor instead of per block.
pub(super) struct Plan<'a> {
    spec: &'a FlatSpec,
    book: Codebook,
    /// 15 thresholds and one unused place, padded with infinity, where there are at most 16 levels.
    thresholds: Option<[f32; 16]>,
    /// The levels of 4-bit codes, the last one repeated to 16.
    levels: Option<[f32; 16]>,
    /// Whether short blocks divide by their scale.
    divide: bool,
    simd: bool,
}

impl<'a> Plan<'a> {
    pub(super) fn new(spec: &'a FlatSpec, simd: bool) -> Self {
        let theirs = Codebook::nf4_bitsandbytes();
        let divide = spec.book.levels() == theirs.levels()
            && (spec.kind, spec.scale_dtype, spec.order) == (ScaleKind::Absmax, ScaleDtype::Fp32, NibbleOrder::HighFirst);
        let book = if divide { theirs } else { spec.book.clone() };
        let pad =
            |from: &[f32], with: f32| (from.len() <= 16).then(|| std::array::from_fn(|i| from.get(i).copied().unwrap_or(with)));
        let thresholds = if book.levels().len() <= 16 { pad(book.thresholds(), f32::INFINITY) } else { None };
        let levels = if book.bits() == 4 { pad(book.levels(), book.levels()[book.levels().len() - 1]) } else { None };
        Self { spec, book, thresholds, levels, divide, simd: simd && simd_available() }
    }

    /// Fields of one block.
    fn fields(&self, x: &[f32]) -> Fields {
        match self.spec.kind {
            ScaleKind::Absmax => Fields { scale: self.spec.scale_dtype.round(absmax(x, self.simd)), zero: 0.0 },
            ScaleKind::SignedAbsmax => {
                // The first element of the largest magnitude, found in two fast steps; zeros of either sign give +0.
                let top = absmax(x, self.simd);
                let extreme = x.iter().copied().find(|v| v.abs() == top && top > 0.0).unwrap_or(0.0);
                Fields { scale: self.spec.scale_dtype.round(extreme), zero: 0.0 }
            }
            kind => block_fields(x, kind, self.spec.scale_dtype),
        }
    }

    /// Codes of one block, one per byte.
    fn encode(&self, x: &[f32], fields: Fields, out: &mut [u8]) {
        if self.divide && x.len() < self.spec.block {
            let scale = fields.scale.max(1e-38);
            for (code, v) in out.iter_mut().zip(x) {
                *code = self.book.encode(v / scale);
            }
            return;
        }
        let inverse = fields.inverse();
        let done = match &self.thresholds {
            #[cfg(target_arch = "x86_64")]
            Some(t) if self.simd => {
                // SAFETY: `simd` is only set where `available` is true.
                unsafe { avx2::encode::<false>(x, fields, false, t, out) }
            }
            _ => 0,
        };
        let mut scaled = [0f32; 512];
        let scaled = &mut scaled[..x.len() - done];
        for (s, v) in scaled.iter_mut().zip(&x[done..]) {
            *s = (v - fields.zero) * inverse;
        }
        self.book.encode_slice(scaled, &mut out[done..x.len()]);
    }

    /// Codes of one block straight into their bytes, if this is a case for that: 4 bits, whole groups of 32.
    fn encode_packed(&self, x: &[f32], fields: Fields, out: &mut [u8]) -> bool {
        #[cfg(target_arch = "x86_64")]
        if let Some(t) = &self.thresholds
            && self.simd
            && self.book.bits() == 4
            && x.len().is_multiple_of(32)
            && !(self.divide && x.len() < self.spec.block)
        {
            let (out, high_first) = (&mut out[..x.len() / 2], self.spec.order == NibbleOrder::HighFirst);
            // SAFETY: `simd` is only set where `available` is true.
            return unsafe { avx2::encode::<true>(x, fields, high_first, t, out) } == x.len();
        }
        let _ = (x, fields, out);
        false
    }

    /// Packs codes that are below the limit by construction.
    fn pack(&self, codes: &[u8], out: &mut [u8]) -> Result<()> {
        match self.spec.order {
            NibbleOrder::LowFirst => pack::pack(codes, self.book.bits(), out),
            NibbleOrder::HighFirst => pack::pack_nibbles_high_first(codes, out),
        }
    }

    /// A piece: whole blocks, from a byte boundary on. The codes of blocks that end inside a byte wait for the next block.
    pub(super) fn quantize_piece(&self, piece: Piece<&[f32], &mut [u8]>) -> Result<()> {
        let bits = usize::from(self.book.bits());
        let bytes = self.spec.scale_dtype.bytes();
        let mut fields_out = piece.fields.chunks_exact_mut(self.spec.field_bytes());
        let (mut held, mut waiting, mut at) = ([0u8; 520], 0, 0);
        for block in piece.numbers.chunks(piece.row).flat_map(|row| row.chunks(self.spec.block)) {
            let fields = self.fields(block);
            if let Some(out) = fields_out.next() {
                self.spec.scale_dtype.write(out, fields.scale);
                if self.spec.kind.fields() == 2 {
                    self.spec.scale_dtype.write(&mut out[bytes..], fields.zero);
                }
            }
            if waiting == 0 && self.encode_packed(block, fields, &mut piece.codes[at..]) {
                at += block.len() / 2;
                continue;
            }
            self.encode(block, fields, &mut held[waiting..waiting + block.len()]);
            let total = waiting + block.len();
            let whole = total / 8 * 8;
            self.pack(&held[..whole], &mut piece.codes[at..at + whole / 8 * bits])?;
            at += whole / 8 * bits;
            held.copy_within(whole..total, 0);
            waiting = total - whole;
        }
        if waiting > 0 {
            self.pack(&held[..waiting], &mut piece.codes[at..])?;
            if self.divide && waiting % 2 == 1 {
                piece.codes[at + waiting / 2] |= self.book.zero_code();
            }
        }
        Ok(())
    }

    /// Values of one block whose codes begin at element `first` of a piece.
    fn decode(&self, bytes: &[u8], first: usize, fields: Fields, out: &mut [f32]) -> Result<()> {
        let (bits, levels, n) = (self.book.bits(), self.book.levels(), out.len());
        let from = first * usize::from(bits);
        let high_first = self.spec.order == NibbleOrder::HighFirst;
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if let Some(table) = self.levels.as_ref().filter(|_| self.simd && from.is_multiple_of(8) && levels.len() == 16) {
            // SAFETY: `simd` is only set where `available` is true; the function reads and writes whole groups of both.
            done = unsafe { avx2::decode(&bytes[from / 8..], high_first, table, fields.scale, fields.zero, out) };
            if done == n {
                return Ok(());
            }
        }
        let mut codes = [0u8; 512];
        let codes = &mut codes[..n - done];
        let from = from + done * usize::from(bits);
        if from.is_multiple_of(8) {
            let bytes = &bytes[from / 8..from / 8 + pack::packed_len(codes.len(), bits)];
            match self.spec.order {
                NibbleOrder::LowFirst => pack::unpack(bytes, bits, codes.len(), codes)?,
                NibbleOrder::HighFirst => pack::unpack_nibbles_high_first(bytes, codes.len(), codes)?,
            }
        } else {
            for (i, code) in codes.iter_mut().enumerate() {
                let bit = from + i * usize::from(bits);
                let bit = if high_first { bit ^ 4 } else { bit };
                let next = bytes.get(bit / 8 + 1).copied().unwrap_or(0);
                let word = u16::from_le_bytes([bytes[bit / 8], next]);
                *code = (word >> (bit % 8)) as u8 & (u8::MAX >> (8 - bits));
            }
        }
        if levels.len() < 1 << bits {
            let top = codes.iter().fold(0, |m, &c| m.max(c));
            if usize::from(top) >= levels.len() {
                return Err(Error::value("codes", format!("codes below {} ({})", levels.len(), self.book.name()), top));
            }
        }
        #[cfg(target_arch = "x86_64")]
        if self.simd {
            // SAFETY: `simd` is only set where `available` is true.
            unsafe { avx2::lookup(levels, fields, codes, &mut out[done..]) };
            return Ok(());
        }
        lookup(levels, fields, codes, &mut out[done..]);
        Ok(())
    }

    pub(super) fn dequantize_piece(&self, piece: Piece<&mut [f32], &[u8]>) -> Result<()> {
        let bytes = self.spec.scale_dtype.bytes();
        let mut fields_in = piece.fields.chunks_exact(self.spec.field_bytes());
        let mut first = 0;
        for block in piece.numbers.chunks_mut(piece.row).flat_map(|row| row.chunks_mut(self.spec.block)) {
            let stored = fields_in.next().unwrap_or_default();
            let scale = self.spec.scale_dtype.read(stored);
            let zero = if self.spec.kind.fields() == 2 { self.spec.scale_dtype.read(&stored[bytes..]) } else { 0.0 };
            self.decode(piece.codes, first, Fields { scale, zero }, block)?;
            first += block.len();
        }
        Ok(())
    }
}

pub(super) fn simd_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return avx2::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Values of codes that are below the number of levels: computed once per level where that is less work.
#[inline(always)]
pub(super) fn lookup(levels: &[f32], fields: Fields, codes: &[u8], out: &mut [f32]) {
    let mut table = [0f32; 256];
    if levels.len() <= codes.len() {
        for (value, &level) in table.iter_mut().zip(levels) {
            *value = level.mul_add(fields.scale, fields.zero);
        }
        for (value, &code) in out.iter_mut().zip(codes) {
            *value = table[usize::from(code)];
        }
    } else {
        table[..levels.len()].copy_from_slice(levels);
        for (value, &code) in out.iter_mut().zip(codes) {
            *value = table[usize::from(code)].mul_add(fields.scale, fields.zero);
        }
    }
}

/// Largest magnitude by independent maxima, which the compiler turns into vector instructions.
#[inline(always)]
pub(super) fn absmax_by_lanes<const LANES: usize>(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut tops = [0f32; LANES];
    let groups = x.chunks_exact(LANES);
    let rest = groups.remainder();
    for group in groups {
        for (top, v) in tops.iter_mut().zip(group) {
            *top = larger(v.abs(), *top);
        }
    }
    tops.iter().chain(rest).fold(0.0, |m, v| larger(v.abs(), m))
}

fn absmax(x: &[f32], simd: bool) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if simd {
        // SAFETY: `simd` is only set where `available` is true.
        return unsafe { avx2::absmax(x) };
    }
    let _ = simd;
    absmax_by_lanes::<8>(x)
}
