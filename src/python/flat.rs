//! `_core.quantize` and `_core.dequantize` of whole tensors.

use std::borrow::Cow;

use pyo3::prelude::*;
use rayon::prelude::*;

use super::borrow::{Borrowed, output_bytes};
use crate::codebook::Codebook;
use crate::dlpack::{Element, TensorRef};
use crate::error::{Error, Result};
use crate::flat::{self, FlatSpec, NibbleOrder};
use crate::scheme::BookSpec;
use crate::tensor::Dtype;

/// Elements that one thread converts at a time.
const PIECE: usize = 1 << 16;

/// The codec of a call: `codebook` is a name, or JSON levels; the rest are the words of a scheme.
fn spec(codebook: &str, block: usize, scale: &str, scale_dtype: &str, order: &str) -> Result<FlatSpec> {
    let word = |what: &str, text: &str| Error::value(what, "one of the scheme language's words", format!("{text:?}"));
    let book = match codebook {
        levels if levels.starts_with('[') => {
            let levels = serde_json::from_str(levels).map_err(|e| Error::value("codebook", "a list of numbers", e))?;
            BookSpec::Levels(levels).build()?
        }
        name => Codebook::parse(name)?,
    };
    if block == 0 {
        // The sizes below divide by it; every other wrong block is refused where the numbers are.
        return Err(Error::value("block", "a multiple of 8 from 16 to 512", block));
    }
    let parse = |text: &str| serde_json::Value::String(text.into());
    Ok(FlatSpec {
        book,
        block,
        kind: serde_json::from_value(parse(scale)).map_err(|_| word("scale", scale))?,
        scale_dtype: serde_json::from_value(parse(scale_dtype)).map_err(|_| word("scale_dtype", scale_dtype))?,
        order: match order {
            "low" => NibbleOrder::LowFirst,
            "high" => NibbleOrder::HighFirst,
            _ => return Err(Error::value("order", "\"low\" or \"high\"", format!("{order:?}"))),
        },
    })
}

/// Elements of a row: the last extent, or all of them if `flat`.
fn row(shape: &[usize], flat: bool) -> usize {
    if flat { shape.iter().product() } else { shape.last().copied().unwrap_or(1) }
}

/// All elements in row-major order as fp32: borrowed where they lie so already.
fn gather<'a>(t: &'a TensorRef, what: &str) -> Result<Cow<'a, [f32]>> {
    let dtype = t.float(what)?;
    if t.is_empty() {
        return Ok(Cow::Owned(Vec::new()));
    }
    let aligned = (t.data as usize).is_multiple_of(align_of::<f32>());
    if dtype == Dtype::F32 && aligned && t.check_contiguous(what).is_ok() {
        // SAFETY: contiguous, aligned, not empty, and alive while the borrow is.
        return Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(t.data.cast(), t.len()) }));
    }
    let size = dtype.bytes() as isize;
    let (dims, strides): (&[usize], &[isize]) = if t.shape.is_empty() { (&[1], &[1]) } else { (&t.shape, &t.strides) };
    let (last, outer) = (dims.len() - 1, dims[..dims.len() - 1].iter().product::<usize>());
    let mut out = vec![0f32; t.len()];
    for (r, row) in out.chunks_exact_mut(dims[last]).enumerate() {
        debug_assert!(r < outer.max(1));
        let (mut rest, mut at) = (r, 0isize);
        for i in (0..last).rev() {
            at += (rest % dims[i]) as isize * strides[i];
            rest /= dims[i];
        }
        if strides[last] == 1 {
            // SAFETY: a row of unit stride inside the tensor, whose extent `TensorRef::new` checked.
            dtype.read_f32(unsafe { std::slice::from_raw_parts(t.data.offset(at * size), row.len() * size as usize) }, row);
            continue;
        }
        for (i, o) in row.iter_mut().enumerate() {
            let offset = (at + i as isize * strides[last]) * size;
            // SAFETY: an element inside the tensor.
            *o = dtype.read(unsafe { std::slice::from_raw_parts(t.data.offset(offset), size as usize) }) as f32;
        }
    }
    Ok(Cow::Owned(out))
}

/// Elements of a piece that can be coded on its own: whole blocks that start on a byte. All `n` if rows do not allow it.
fn piece_len(spec: &FlatSpec, n: usize, row: usize) -> usize {
    match row {
        _ if row == n => spec.block * (PIECE / spec.block).max(1),
        _ if row.is_multiple_of(8) && row <= PIECE => row * (PIECE / row),
        _ => n,
    }
}

/// Converts and quantizes a contiguous tensor of another dtype than fp32, piece by piece, while a piece is in a core's cache.
fn quantize_pieces(x: &[u8], dtype: Dtype, row: usize, spec: &FlatSpec, codes: &mut [u8], fields: &mut [u8]) -> Result<()> {
    let n = x.len() / dtype.bytes();
    let piece = piece_len(spec, n, row);
    let (code_bytes, field_bytes) = (spec.codes_len(piece), spec.fields_len(piece, piece.min(row)));
    let pieces = x.par_chunks(piece * dtype.bytes()).zip(codes.par_chunks_mut(code_bytes));
    let pieces = pieces.zip(fields.par_chunks_mut(field_bytes)).enumerate();
    let done = pieces.map_init(Vec::new, |wide, (i, ((x, codes), fields))| {
        let len = x.len() / dtype.bytes();
        wide.resize(len, 0f32);
        dtype.read_f32(x, wide);
        flat::quantize_into(wide, len.min(row), spec, codes, fields).map_err(|e| match e {
            Error::NonFinite { what, index, got } => Error::NonFinite { what, index: i * piece + index, got },
            other => other,
        })
    });
    // In order, so that the first offending element is the one that is named.
    done.collect::<Vec<Result<()>>>().into_iter().collect()
}

/// Bytes of codes and fields for a tensor of `shape`.
#[pyfunction]
pub(super) fn quantized_sizes(
    shape: Vec<usize>,
    codebook: &str,
    block: usize,
    scale: &str,
    scale_dtype: &str,
    flat: bool,
) -> PyResult<(usize, usize)> {
    let spec = spec(codebook, block, scale, scale_dtype, "low")?;
    let n = shape.iter().product();
    Ok((spec.codes_len(n), spec.fields_len(n, row(&shape, flat))))
}

/// Quantizes `x` into `codes` and `fields` (uint8).
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the words of a codec")]
pub(super) fn quantize(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    fields: &Bound<'_, PyAny>,
    codebook: &str,
    block: usize,
    scale: &str,
    scale_dtype: &str,
    flat: bool,
    order: &str,
) -> PyResult<()> {
    let spec = spec(codebook, block, scale, scale_dtype, order)?;
    let x = Borrowed::new("x", x)?;
    let (codes, fields) = (Borrowed::new("codes", codes)?, Borrowed::new("fields", fields)?);
    let (n, row) = (x.tensor.len(), row(&x.tensor.shape, flat));
    let targets = (byte_output(&codes, "codes", spec.codes_len(n))?, byte_output(&fields, "fields", spec.fields_len(n, row))?);
    let tensor = SendRef(&x.tensor);
    py.detach(move || -> Result<()> {
        let tensor = tensor.get();
        let dtype = tensor.float("x")?;
        // SAFETY: `byte_output` checked both; their capsules outlive this call.
        let (codes, fields) = unsafe { (output_bytes(targets.0.0, targets.0.1), output_bytes(targets.1.0, targets.1.1)) };
        if n > 0 && dtype != Dtype::F32 && tensor.check_contiguous("x").is_ok() {
            // SAFETY: contiguous, not empty, and alive while the call is.
            let x = unsafe { std::slice::from_raw_parts(tensor.data, n * dtype.bytes()) };
            return quantize_pieces(x, dtype, row, &spec, codes, fields);
        }
        flat::quantize_into(&gather(tensor, "x")?, row, &spec, codes, fields)
    })?;
    Ok(())
}

/// Dequantizes `codes` and `fields` into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the words of a codec")]
pub(super) fn dequantize(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    fields: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    codebook: &str,
    block: usize,
    scale: &str,
    scale_dtype: &str,
    flat: bool,
    order: &str,
) -> PyResult<()> {
    let spec = spec(codebook, block, scale, scale_dtype, order)?;
    let (codes, fields) = (Borrowed::new("codes", codes)?, Borrowed::new("fields", fields)?);
    let out = Borrowed::new("out", out)?;
    out.tensor.check_output("out", &out.tensor.shape.clone())?;
    let dtype = out.tensor.float("out")?;
    let (n, row) = (out.tensor.len(), row(&out.tensor.shape, flat));
    let sources = (byte_input(&codes, "codes", spec.codes_len(n))?, byte_input(&fields, "fields", spec.fields_len(n, row))?);
    let target = out.tensor.data as usize;
    py.detach(move || -> Result<()> {
        // SAFETY: `byte_input` and `check_output` checked all three; their capsules outlive this call.
        let (codes, fields, bytes) = unsafe {
            (
                &*output_bytes(sources.0.0, sources.0.1),
                &*output_bytes(sources.1.0, sources.1.1),
                output_bytes(target, n * dtype.bytes()),
            )
        };
        if n > 0 && dtype == Dtype::F32 && target.is_multiple_of(align_of::<f32>()) {
            // SAFETY: aligned fp32 of this length, writable as above, not empty.
            let out = unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<f32>(), n) };
            return flat::dequantize(codes, fields, n, row, &spec, out);
        }
        if n == 0 {
            return Ok(());
        }
        let piece = piece_len(&spec, n, row);
        let (code_bytes, field_bytes) = (spec.codes_len(piece), spec.fields_len(piece, piece.min(row)));
        bytes.par_chunks_mut(piece * dtype.bytes()).enumerate().try_for_each_init(Vec::new, |wide, (i, bytes)| {
            let len = bytes.len() / dtype.bytes();
            wide.resize(len, 0f32);
            let codes = &codes[i * code_bytes..][..spec.codes_len(len)];
            let fields = &fields[i * field_bytes..][..spec.fields_len(len, len.min(row))];
            flat::dequantize(codes, fields, len, len.min(row), &spec, wide)?;
            dtype.write_f32(bytes, wide);
            Ok(())
        })?;
        Ok(())
    })?;
    Ok(())
}

/// A borrowed description that may cross to the thread that runs without the GIL: it is only read.
struct SendRef<'a>(&'a TensorRef);
// SAFETY: the pointer inside is read only, and the call that made the reference waits for its end.
unsafe impl Send for SendRef<'_> {}

impl<'a> SendRef<'a> {
    fn get(self) -> &'a TensorRef {
        self.0
    }
}

fn byte_output(b: &Borrowed<'_>, what: &str, len: usize) -> Result<(usize, usize)> {
    b.tensor.check_output(what, &b.tensor.shape.clone())?;
    byte_input(b, what, len)
}

fn byte_input(b: &Borrowed<'_>, what: &str, len: usize) -> Result<(usize, usize)> {
    if b.tensor.element != Element::U8 {
        return Err(Error::dtype(what, "uint8", "a float type"));
    }
    b.tensor.check_contiguous(what)?;
    if b.tensor.len() != len {
        return Err(Error::shape(what, format!("{len} bytes"), format!("{} bytes", b.tensor.len())));
    }
    Ok((b.tensor.data as usize, len))
}
