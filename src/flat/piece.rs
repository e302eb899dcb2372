//! One piece of a tensor to codes and fields and back: the loop over blocks, and its choice of portable or vector code.

use super::sink::Sink;
use super::{FlatSpec, NibbleOrder};
#[cfg(target_arch = "x86_64")]
use super::{avx2, decode16, encode16, keys16};
use crate::codebook::Codebook;
use crate::codec::{Fields, ScaleKind, block_fields};
use crate::error::{Error, Result};
use crate::pack;
use crate::tensor::Dtype;

/// A part of a tensor that starts at a byte boundary of the codes and consists of whole blocks.
pub(super) struct Piece<N, B> {
    /// Bytes of numbers.
    pub(super) numbers: N,
    pub(super) codes: B,
    pub(super) fields: B,
    /// Row length inside the piece, in elements: blocks start anew at each multiple of it.
    pub(super) row: usize,
}

/// What encoding and decoding look up per tensor instead of per block.
pub(super) struct Plan<'a> {
    pub(super) spec: &'a FlatSpec,
    pub(super) dtype: Dtype,
    pub(super) book: Codebook,
    /// 15 thresholds and one unused place, padded with infinity, where there are at most 16 levels.
    pub(super) thresholds: Option<[f32; 16]>,
    /// The levels of codes of at most 4 bits, the last one repeated to 16.
    pub(super) levels: Option<[f32; 16]>,
    /// Thresholds of bfloat16 by scale.
    #[cfg(target_arch = "x86_64")]
    pub(super) table: Option<keys16::Table>,
    /// Whether short blocks divide by their scale.
    pub(super) divide: bool,
    /// Whether numbers are written past the caches.
    pub(super) stream: bool,
    simd: bool,
}

/// Bytes of output from which it is written past the caches: with 32 MiB of last-level cache, 16 and 32 MiB of output then take
/// 0.6 to 0.9 of the time.
const STREAM: usize = 16 << 20;

/// Numbers from which a table of thresholds by scale is worth its making (128 blocks' worth of work).
const TABLE: usize = 1 << 14;

/// Largest magnitude that a kind takes: the sum of a block must not overflow.
pub(super) fn limit(kind: ScaleKind) -> f32 {
    if kind == ScaleKind::MeanAbsmax { f32::MAX / 1024.0 } else { f32::MAX }
}

/// What a piece reports when it meets a number beyond [`limit`]; the tensor's first one is looked for afterwards.
pub(super) fn unfit() -> Error {
    Error::value("x", "finite numbers", "others")
}

impl<'a> Plan<'a> {
    /// A plan for `n` numbers.
    pub(super) fn new(spec: &'a FlatSpec, dtype: Dtype, n: usize, simd: bool) -> Self {
        let divide = spec.follows_bitsandbytes();
        let book = if divide { Codebook::nf4_bitsandbytes() } else { spec.book.clone() };
        let pad =
            |from: &[f32], with: f32| (from.len() <= 16).then(|| std::array::from_fn(|i| from.get(i).copied().unwrap_or(with)));
        let thresholds = if book.levels().len() <= 16 { pad(book.thresholds(), f32::INFINITY) } else { None };
        let levels = pad(book.levels(), book.levels()[book.levels().len() - 1]);
        let (stream, simd) = (n * dtype.bytes() >= STREAM, simd && simd_available());
        #[cfg(target_arch = "x86_64")]
        let table = match &thresholds {
            // SAFETY: AVX2 is available.
            Some(t) if simd && dtype == Dtype::Bf16 && spec.kind.fields() == 1 && n >= TABLE => unsafe { keys16::table(t) },
            _ => None,
        };
        Self {
            spec,
            dtype,
            book,
            thresholds,
            levels,
            #[cfg(target_arch = "x86_64")]
            table,
            divide,
            stream,
            simd,
        }
    }

    /// Fields of one block.
    pub(super) fn fields(&self, x: &[f32]) -> Fields {
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
    pub(super) fn encode(&self, x: &[f32], fields: Fields, out: &mut [u8]) {
        if self.divide && x.len() < self.spec.block {
            let scale = fields.scale.max(1e-38);
            for (code, v) in out.iter_mut().zip(x) {
                *code = self.book.encode(v / scale);
            }
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(t) = self.thresholds.as_ref().filter(|_| self.simd) {
            // SAFETY: `simd` is only set where `available` is true.
            let done = unsafe { avx2::encode::<false>(x, fields, false, t, out) };
            if done < x.len() {
                let (rest, mut padded, mut codes) = (x.len() - done, [0f32; 32], [0; 32]);
                padded[..rest].copy_from_slice(&x[done..]);
                // SAFETY: as above.
                unsafe { avx2::encode::<false>(&padded, fields, false, t, &mut codes) };
                out[done..x.len()].copy_from_slice(&codes[..rest]);
            }
            return;
        }
        let inverse = fields.inverse();
        let mut scaled = [0f32; 512];
        let scaled = &mut scaled[..x.len()];
        for (s, v) in scaled.iter_mut().zip(x) {
            *s = (v - fields.zero) * inverse;
        }
        self.book.encode_slice(scaled, &mut out[..x.len()]);
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
    pub(super) fn pack(&self, codes: &[u8], out: &mut [u8]) -> Result<()> {
        match self.spec.order {
            NibbleOrder::LowFirst => pack::pack(codes, self.book.bits(), out),
            NibbleOrder::HighFirst => pack::pack_nibbles_high_first(codes, out),
        }
    }

    /// A piece: whole blocks, from a byte boundary on. `wide` is room for its numbers in fp32.
    pub(super) fn quantize_piece(&self, piece: Piece<&[u8], &mut [u8]>, wide: &mut Vec<f32>) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        match self.dtype {
            // SAFETY: `simd` is only set where `available` is true.
            Dtype::Bf16 if self.simd => return unsafe { encode16::quantize_piece::<true>(self, piece) },
            // SAFETY: as above.
            Dtype::F16 if self.simd => return unsafe { encode16::quantize_piece::<false>(self, piece) },
            _ => {}
        }
        // SAFETY: any four bytes are an fp32.
        let (head, mut numbers, _) = unsafe { piece.numbers.align_to::<f32>() };
        if self.dtype != Dtype::F32 || !head.is_empty() {
            wide.resize(piece.numbers.len() / self.dtype.bytes(), 0.0);
            self.dtype.read_f32(piece.numbers, wide);
            numbers = wide;
        }
        self.check(numbers)?;
        let mut sink = Sink::new(self, piece.codes, piece.fields);
        for block in numbers.chunks(piece.row).flat_map(|row| row.chunks(self.spec.block)) {
            let fields = self.fields(block);
            sink.fields(fields);
            if sink.waiting == 0 && self.encode_packed(block, fields, sink.rest()) {
                sink.skip(block.len());
            } else {
                sink.codes(block.len(), |out| self.encode(block, fields, out))?;
            }
        }
        sink.finish()
    }

    /// Refuses numbers beyond the limit.
    pub(super) fn check(&self, x: &[f32]) -> Result<()> {
        let limit = limit(self.spec.kind);
        #[cfg(target_arch = "x86_64")]
        if self.simd {
            // SAFETY: `simd` is only set where `available` is true.
            return if unsafe { avx2::all_within(x, limit) } { Ok(()) } else { Err(unfit()) };
        }
        if x.iter().fold(true, |all, v| all & (v.abs() <= limit)) { Ok(()) } else { Err(unfit()) }
    }

    /// Values of one block whose codes begin at element `first` of a piece; past the caches if `stream`.
    #[inline(always)]
    pub(super) fn decode(&self, bytes: &[u8], first: usize, fields: Fields, out: &mut [f32], stream: bool) -> Result<()> {
        let (from, mut done) = (first * usize::from(self.book.bits()), 0);
        #[cfg(target_arch = "x86_64")]
        if let Some(table) = &self.levels
            && self.simd
            && from.is_multiple_of(8)
            && self.book.levels().len() == 16
        {
            let (bytes, high_first) = (&bytes[from / 8..], self.spec.order == NibbleOrder::HighFirst);
            done = match stream && out.as_ptr().addr().is_multiple_of(32) {
                // SAFETY: `simd` is only set where `available` is true.
                true => unsafe { avx2::decode::<true>(bytes, high_first, table, fields, out) },
                // SAFETY: as above.
                false => unsafe { avx2::decode::<false>(bytes, high_first, table, fields, out) },
            };
        }
        let _ = stream;
        if done == out.len() {
            return Ok(());
        }
        self.decode_rest(bytes, from + done * usize::from(self.book.bits()), fields, &mut out[done..])
    }

    /// Values of codes that begin at bit `from`.
    #[inline(never)]
    fn decode_rest(&self, bytes: &[u8], from: usize, fields: Fields, out: &mut [f32]) -> Result<()> {
        let (bits, levels) = (self.book.bits(), self.book.levels());
        let high_first = self.spec.order == NibbleOrder::HighFirst;
        let mut codes = [0u8; 512];
        let codes = &mut codes[..out.len()];
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
            unsafe { avx2::lookup(levels, fields, codes, out) };
            return Ok(());
        }
        lookup(levels, fields, codes, out);
        Ok(())
    }

    /// A piece, whose numbers are written in the dtype of the plan. `wide` is room for them in fp32.
    pub(super) fn dequantize_piece(&self, piece: Piece<&mut [u8], &[u8]>, wide: &mut Vec<f32>) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        match self.dtype {
            // SAFETY: `simd` is only set where `available` is true.
            Dtype::Bf16 if self.simd => return unsafe { decode16::dequantize_piece::<true>(self, piece) },
            // SAFETY: as above.
            Dtype::F16 if self.simd => return unsafe { decode16::dequantize_piece::<false>(self, piece) },
            _ => {}
        }
        // SAFETY: any four bytes are an fp32.
        match unsafe { piece.numbers.align_to_mut::<f32>() } {
            ([], numbers, []) if self.dtype == Dtype::F32 => {
                self.dequantize_numbers(piece.codes, piece.fields, piece.row, numbers, self.stream)
            }
            _ => {
                wide.resize(piece.numbers.len() / self.dtype.bytes(), 0.0);
                self.dequantize_numbers(piece.codes, piece.fields, piece.row, wide, false)?;
                self.dtype.write_f32(piece.numbers, wide);
                Ok(())
            }
        }
    }

    fn dequantize_numbers(&self, codes: &[u8], fields: &[u8], row: usize, numbers: &mut [f32], stream: bool) -> Result<()> {
        #[cfg(target_arch = "x86_64")]
        if self.simd {
            // SAFETY: `simd` is only set where `available` is true.
            return unsafe { avx2::decode_blocks(self, codes, fields, row, numbers, stream) };
        }
        self.decode_blocks(codes, fields, row, numbers, stream)
    }

    #[inline(always)]
    pub(super) fn decode_blocks(&self, codes: &[u8], fields: &[u8], row: usize, numbers: &mut [f32], stream: bool) -> Result<()> {
        let (mut fields, mut first) = (fields.chunks_exact(self.spec.field_bytes()), 0);
        for row in numbers.chunks_mut(row) {
            for block in row.chunks_mut(self.spec.block) {
                self.decode(codes, first, self.read_fields(fields.next().unwrap_or_default()), block, stream)?;
                first += block.len();
            }
        }
        Ok(())
    }

    pub(super) fn read_fields(&self, stored: &[u8]) -> Fields {
        let dtype = self.spec.scale_dtype;
        let zero = if self.spec.kind.fields() == 2 { dtype.read(&stored[dtype.bytes()..]) } else { 0.0 };
        Fields { scale: dtype.read(stored), zero }
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
