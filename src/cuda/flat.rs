//! Whole tensors on a device: the launches of `cuda/flat.cu`. Same bits as [`crate::flat`].

use std::ffi::c_void;

use super::codec::{cells, kind_number, scale_dtype_number};
use super::{Device, Kernel, Stream};
use crate::codebook::Codebook;
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::{Error, Result};
use crate::flat::{FlatSpec, NibbleOrder};
use crate::tensor::Dtype;

/// `FlatArguments` of `cuda/flat.cu`.
#[repr(C)]
#[derive(Clone)]
struct Arguments {
    x: u64,
    out: u64,
    codes: u64,
    fields: u64,
    bad: u64,
    n: i64,
    row: i64,
    first: i64,
    blocks_per_row: i32,
    block: i32,
    bits: i32,
    kind: i32,
    scale_dtype: i32,
    levels: i32,
    high_first: i32,
    divide: i32,
    cell_scale: f32,
    cell_offset: f32,
    level: [f32; 256],
    threshold: [f32; 256],
}
const _: () = assert!(size_of::<Arguments>() == 104 + 2048);

const THREADS: usize = 256;
/// Blocks of threads for each processor, so that the device is full once.
const BLOCKS: usize = 4;
/// Fewer, and with them fewer places that are read at once, where each thread has enough on its way.
const PLAIN_BLOCKS: usize = 3;
/// Of a block that dequantizes, and elements of each: as many blocks as that takes, so that what is written at once stays
/// together.
const DEQUANTIZE_THREADS: usize = 64;
const DEQUANTIZED: usize = 32;
/// Elements that kernels which count them by eights in 32 bits take.
const MOST: i64 = 1 << 34;

/// Whether each cell of the table in `cuda/flat_plain.cuh` holds at most one threshold, and none lies beyond 1.
fn fits_plain_cells(thresholds: &[f32]) -> bool {
    const SCALE: f64 = 31.0;
    // What the table's own rounding may move a threshold by, in cells.
    const HAIR: f64 = 0.01;
    let within = thresholds.iter().all(|t| t.abs() <= 1.0);
    within
        && (-32..32).all(|cell| {
            let ends = [-0.5 - HAIR, 0.5 + HAIR].map(|e| (f64::from(cell) + e) / SCALE);
            thresholds.iter().filter(|&&t| ends[0] <= f64::from(t) && f64::from(t) <= ends[1]).count() <= 1
        })
}

/// A contiguous tensor on a device.
#[derive(Debug, Clone, Copy)]
pub struct Flat {
    /// First element.
    pub address: u64,
    /// Element type: not [`Dtype::F64`].
    pub dtype: Dtype,
    /// Elements.
    pub len: usize,
    /// Elements of a row.
    pub row: usize,
}

/// Codes and fields on a device.
#[derive(Debug, Clone, Copy)]
pub struct Packed {
    /// [`FlatSpec::codes_len`] bytes.
    pub codes: u64,
    /// [`FlatSpec::fields_len`] bytes.
    pub fields: u64,
}

/// A spec made ready for a device: its levels, thresholds and cells as kernels take them.
#[derive(Clone)]
pub struct FlatCodec {
    spec: FlatSpec,
    arguments: Arguments,
    /// Codes can be chosen by cells.
    cells: bool,
    /// Those of the kinds of `cuda/flat_plain.cuh` over blocks of 64, by cells that need no offset.
    plain: bool,
}

impl FlatCodec {
    /// Prepares a spec.
    pub fn new(spec: FlatSpec) -> Self {
        let theirs = Codebook::nf4_bitsandbytes();
        let divide = spec.follows_bitsandbytes();
        let book = if divide { &theirs } else { &spec.book };
        let mut a = Arguments {
            x: 0,
            out: 0,
            codes: 0,
            fields: 0,
            bad: 0,
            n: 0,
            row: 0,
            first: 0,
            blocks_per_row: 0,
            block: spec.block as i32,
            bits: i32::from(book.bits()),
            kind: kind_number(spec.kind) as i32,
            scale_dtype: scale_dtype_number(spec.scale_dtype) as i32,
            levels: book.levels().len() as i32,
            high_first: i32::from(spec.order == NibbleOrder::HighFirst),
            divide: i32::from(divide),
            cell_scale: 0.0,
            cell_offset: 0.0,
            level: [0.0; 256],
            threshold: [f32::INFINITY; 256],
        };
        a.level[..book.levels().len()].copy_from_slice(book.levels());
        a.threshold[..book.thresholds().len()].copy_from_slice(book.thresholds());
        let laid = if a.bits == 4 { cells(book.thresholds()) } else { None };
        (a.cell_scale, a.cell_offset) = laid.unwrap_or_default();
        let plain = spec.block == 64
            && matches!(spec.kind, ScaleKind::Absmax | ScaleKind::SignedAbsmax | ScaleKind::Minmax)
            && spec.scale_dtype != ScaleDtype::E4m3
            && a.bits == 4
            && fits_plain_cells(book.thresholds());
        Self { spec, arguments: a, cells: laid.is_some(), plain }
    }

    /// The spec.
    pub fn spec(&self) -> &FlatSpec {
        &self.spec
    }

    fn check(&self, x: &Flat, packed: Packed) -> Result<()> {
        self.spec.check(x.len, x.row)?;
        if x.dtype == Dtype::F64 {
            return Err(Error::dtype("x", "float32, float16 or bfloat16 on a CUDA device", "float64"));
        }
        let field = self.spec.scale_dtype.bytes() as u64;
        if !packed.fields.is_multiple_of(field) || !x.address.is_multiple_of(x.dtype.bytes() as u64) {
            return Err(Error::memory("x and fields", "memory aligned to its elements", "another address"));
        }
        Ok(())
    }

    /// Two kilobytes, and as many again for each time that they are handed on: the checks stand apart.
    fn arguments(&self, x: &Flat, packed: Packed, bad: u64) -> Arguments {
        Arguments {
            x: x.address,
            out: x.address,
            codes: packed.codes,
            fields: packed.fields,
            n: x.len as i64,
            row: x.row.max(1) as i64,
            bad,
            blocks_per_row: x.row.div_ceil(self.spec.block) as i32,
            ..self.arguments.clone()
        }
    }
}

impl Arguments {
    /// Elements that stand in whole blocks which follow each other without a gap.
    fn whole_blocks(&self) -> i64 {
        match (self.row == self.n, self.row % i64::from(self.block)) {
            (_, 0) => self.n,
            (true, short) => self.n - short,
            (false, _) => 0,
        }
    }

    unsafe fn launch(&mut self, device: &Device, stream: Stream, kernel: Kernel, threads: usize, blocks: usize) -> Result<()> {
        let argument: *mut c_void = (&raw mut *self).cast();
        // SAFETY: the caller's promise, passed on; the one parameter is this struct.
        unsafe { device.launch(kernel, (blocks, 1, 1), threads, 0, stream, &mut [argument]) }
    }
}

/// Blocks for `elements` of which each does `each`, but at most `most` for each processor.
fn blocks(device: &Device, elements: i64, each: usize, most: usize) -> usize {
    (elements as usize).div_ceil(each).min(device.processors() * most)
}

/// One of three kernels, by element type.
fn by_dtype(dtype: Dtype, [f32, f16, bf16]: [Kernel; 3]) -> Kernel {
    match dtype {
        Dtype::F16 => f16,
        Dtype::Bf16 => bf16,
        _ => f32,
    }
}

impl FlatCodec {
    /// Quantizes `x`. `bad`, if not 0, is the address of a u64 that is lowered to where the first number that is not finite
    /// is, to the block: nothing waits for the device, so whoever wants to know reads it later.
    ///
    /// # Safety
    /// Addresses are of memory of `device`, as large as their types say, alive and unused by others until `stream` is past
    /// this.
    pub unsafe fn quantize(&self, device: &Device, stream: Stream, x: &Flat, to: Packed, bad: u64) -> Result<()> {
        self.check(x, to)?;
        let spec = &self.spec;
        let mut a = self.arguments(x, to, bad);
        let lanes = spec.block.is_power_of_two() && spec.block <= 256;
        let aligned = x.address.is_multiple_of(16) && to.codes.is_multiple_of(4);
        use Kernel as K;
        if lanes && aligned && (self.cells || self.plain) {
            a.first = a.whole_blocks();
            let (kernels, most) = if self.plain {
                a.first = a.first.min(MOST);
                ([K::FlatQuantizeF32, K::FlatQuantizeF16, K::FlatQuantizeBf16], PLAIN_BLOCKS)
            } else {
                ([K::FlatQuantizeFieldsF32, K::FlatQuantizeFieldsF16, K::FlatQuantizeFieldsBf16], BLOCKS)
            };
            let kernel = by_dtype(x.dtype, kernels);
            // SAFETY: the caller's promise.
            unsafe { a.launch(device, stream, kernel, THREADS, blocks(device, a.first, 8 * THREADS, most))? };
        }
        if a.first < a.n {
            let fields = by_dtype(x.dtype, [K::FlatFieldsAnyF32, K::FlatFieldsAnyF16, K::FlatFieldsAnyBf16]);
            let codes = by_dtype(x.dtype, [K::FlatCodesAnyF32, K::FlatCodesAnyF16, K::FlatCodesAnyBf16]);
            let rest = a.n - a.first;
            // SAFETY: the caller's promise.
            unsafe {
                a.launch(device, stream, fields, 128, blocks(device, rest, 4 * spec.block, BLOCKS))?;
                a.launch(device, stream, codes, THREADS, blocks(device, rest, 8 * THREADS, BLOCKS))?;
            }
        }
        Ok(())
    }

    /// The numbers that codes stand for, into `out`.
    ///
    /// # Safety
    /// As for [`FlatCodec::quantize`].
    pub unsafe fn dequantize(&self, device: &Device, stream: Stream, from: Packed, out: &Flat) -> Result<()> {
        self.check(out, from)?;
        let mut a = self.arguments(out, from, 0);
        let aligned = out.address.is_multiple_of(16) && from.codes.is_multiple_of(4);
        let gapless = out.row == out.len || out.row.is_multiple_of(self.spec.block);
        use Kernel as K;
        if aligned && gapless && a.bits == 4 {
            a.first = (a.n / 8 * 8).min(MOST);
            let kernel = by_dtype(out.dtype, [K::FlatDequantizeF32, K::FlatDequantizeF16, K::FlatDequantizeBf16]);
            let blocks = (a.first as usize).div_ceil(DEQUANTIZED * DEQUANTIZE_THREADS);
            // SAFETY: the caller's promise.
            unsafe { a.launch(device, stream, kernel, DEQUANTIZE_THREADS, blocks)? };
        }
        if a.first < a.n {
            let kernel = by_dtype(out.dtype, [K::FlatValuesAnyF32, K::FlatValuesAnyF16, K::FlatValuesAnyBf16]);
            // SAFETY: the caller's promise.
            unsafe { a.launch(device, stream, kernel, THREADS, blocks(device, a.n - a.first, THREADS, BLOCKS))? };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_hold_one_threshold_in_every_named_codebook_of_four_bits() {
        for name in ["nf4", "nf4-bnb", "lloyd4", "uniform4", "int4", "e2m1", "l2absmax4-64", "l2signed4-64"] {
            let spec = FlatSpec {
                book: Codebook::parse(name).unwrap(),
                block: 64,
                kind: ScaleKind::Absmax,
                scale_dtype: ScaleDtype::Fp32,
                order: NibbleOrder::LowFirst,
            };
            let codec = FlatCodec::new(spec);
            assert!(codec.cells, "{name}");
            assert_eq!(codec.plain, name != "lloyd4", "{name}: thresholds beyond 1");
        }
    }
}
