//! `_core.quantize` and `_core.dequantize` of whole tensors.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::borrow::{Borrowed, output_bytes};
use crate::codebook::Codebook;
use crate::dlpack::{Element, TensorRef};
use crate::error::{Error, Result};
use crate::flat::{self, FlatSpec, NibbleOrder};
use crate::scheme::BookSpec;

/// A codec from its words: `codebook` is a name, or JSON levels; the rest are the words of a scheme.
pub(super) fn spec(codebook: &str, block: usize, scale: &str, scale_dtype: &str, order: &str) -> Result<FlatSpec> {
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
pub(super) fn row(shape: &[usize], flat: bool) -> usize {
    if flat { shape.iter().product() } else { shape.last().copied().unwrap_or(1) }
}

/// The words of a codec in a call, after its tensors: in this order, or by name.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Words {
    codebook: String,
    block: usize,
    scale: String,
    scale_dtype: String,
    flat: bool,
    #[pyo3(default = "low".into())]
    order: String,
}

const WORDS: [&str; 6] = ["codebook", "block", "scale", "scale_dtype", "flat", "order"];

/// The codec of a call.
struct Codec {
    spec: FlatSpec,
    /// Whether blocks run across rows.
    flat: bool,
}

impl Codec {
    fn new(words: &Bound<'_, PyTuple>, named: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let all = named.map_or_else(|| Ok(PyDict::new(words.py())), |named| named.copy())?;
        for (name, value) in WORDS.iter().zip(words) {
            all.set_item(name, value)?;
        }
        let given = words.len() + named.map_or(0, |named| named.len());
        let known = WORDS.iter().filter(|name| all.contains(name).unwrap_or(false)).count();
        if known != given {
            return Err(PyTypeError::new_err(format!("codec: expected each of {WORDS:?} at most once, got {words} and {all}")));
        }
        let Words { codebook, block, scale, scale_dtype, flat, order } = all.extract()?;
        Ok(Self { spec: spec(&codebook, block, &scale, &scale_dtype, &order)?, flat })
    }

    fn row(&self, shape: &[usize]) -> usize {
        row(shape, self.flat)
    }

    /// Bytes of codes and of fields.
    fn sizes(&self, shape: &[usize]) -> (usize, usize) {
        let n = shape.iter().product();
        (self.spec.codes_len(n), self.spec.fields_len(n, self.row(shape)))
    }
}

/// All elements in row-major order as fp32.
fn gather(t: &TensorRef, what: &str) -> Result<Vec<f32>> {
    let dtype = t.float(what)?;
    if t.is_empty() {
        return Ok(Vec::new());
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
    Ok(out)
}

/// Bytes of codes and fields for a tensor of `shape`.
#[pyfunction]
#[pyo3(signature = (shape, *words, **named), text_signature = "(shape, codebook, block, scale, scale_dtype, flat)")]
pub(super) fn quantized_sizes(
    shape: Vec<usize>,
    words: &Bound<'_, PyTuple>,
    named: Option<&Bound<'_, PyDict>>,
) -> PyResult<(usize, usize)> {
    Ok(Codec::new(words, named)?.sizes(&shape))
}

/// Quantizes `x` into `codes` and `fields` (uint8).
#[pyfunction]
#[pyo3(
    signature = (x, codes, fields, *words, **named),
    text_signature = "(x, codes, fields, codebook, block, scale, scale_dtype, flat, order)"
)]
pub(super) fn quantize(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    fields: &Bound<'_, PyAny>,
    words: &Bound<'_, PyTuple>,
    named: Option<&Bound<'_, PyDict>>,
) -> PyResult<()> {
    let codec = Codec::new(words, named)?;
    let x = Borrowed::new("x", x)?;
    let (codes, fields) = (Borrowed::new("codes", codes)?, Borrowed::new("fields", fields)?);
    let (n, row, sizes) = (x.tensor.len(), codec.row(&x.tensor.shape), codec.sizes(&x.tensor.shape));
    let targets = (byte_output(&codes, "codes", sizes.0)?, byte_output(&fields, "fields", sizes.1)?);
    let tensor = SendRef(&x.tensor);
    py.detach(move || -> Result<()> {
        let tensor = tensor.get();
        let dtype = tensor.float("x")?;
        // SAFETY: `byte_output` checked both; their capsules outlive this call.
        let (codes, fields) = unsafe { (output_bytes(targets.0.0, targets.0.1), output_bytes(targets.1.0, targets.1.1)) };
        if n > 0 && tensor.check_contiguous("x").is_ok() {
            // SAFETY: contiguous, not empty, and alive while the call is.
            let x = unsafe { std::slice::from_raw_parts(tensor.data, n * dtype.bytes()) };
            return flat::quantize_bytes(x, dtype, row, &codec.spec, codes, fields);
        }
        flat::quantize_into(&gather(tensor, "x")?, row, &codec.spec, codes, fields)
    })?;
    Ok(())
}

/// Dequantizes `codes` and `fields` into `out`.
#[pyfunction]
#[pyo3(
    signature = (codes, fields, out, *words, **named),
    text_signature = "(codes, fields, out, codebook, block, scale, scale_dtype, flat, order)"
)]
pub(super) fn dequantize(
    py: Python<'_>,
    codes: &Bound<'_, PyAny>,
    fields: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    words: &Bound<'_, PyTuple>,
    named: Option<&Bound<'_, PyDict>>,
) -> PyResult<()> {
    let codec = Codec::new(words, named)?;
    let (codes, fields) = (Borrowed::new("codes", codes)?, Borrowed::new("fields", fields)?);
    let out = Borrowed::new("out", out)?;
    out.tensor.check_writable("out")?;
    let dtype = out.tensor.float("out")?;
    let (n, row, sizes) = (out.tensor.len(), codec.row(&out.tensor.shape), codec.sizes(&out.tensor.shape));
    let sources = (byte_input(&codes, "codes", sizes.0)?, byte_input(&fields, "fields", sizes.1)?);
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
        flat::dequantize_bytes(codes, fields, row, &codec.spec, dtype, bytes)
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
    b.tensor.check_writable(what)?;
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
