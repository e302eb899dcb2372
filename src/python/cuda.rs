//! `_core.cuda_*`: what runs on devices, on the caller's stream.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;

use super::device::OnDevice;
use super::flat::{row, spec};
use crate::cuda::flat::FlatCodec;
use crate::cuda::{self, flat};
use crate::dlpack::Element;
use crate::error::Error;

/// Devices, and why there are none.
#[pyfunction]
pub(super) fn cuda_status() -> (usize, Option<&'static str>) {
    match cuda::status() {
        Ok(devices) => (devices, None),
        Err(why) => (0, Some(why)),
    }
}

/// The CUDA version that the driver speaks.
#[pyfunction]
pub(super) fn cuda_driver_version() -> Option<(i32, i32)> {
    cuda::driver_version()
}

/// Name, compute capability and multiprocessors of a device.
#[pyfunction]
pub(super) fn cuda_device(ordinal: usize) -> PyResult<(String, (i32, i32), usize)> {
    let device = cuda::device(ordinal)?;
    Ok((device.name()?, device.capability(), device.processors()))
}

/// Loads every kernel.
#[pyfunction]
pub(super) fn cuda_warm_up(py: Python<'_>, ordinal: usize) -> PyResult<()> {
    py.detach(|| cuda::device(ordinal)?.warm_up())?;
    Ok(())
}

/// Codecs by their words: preparing one takes longer than a launch.
type Known = Vec<((String, usize, String, String, String), Arc<FlatCodec>)>;
static CODECS: Mutex<Known> = Mutex::new(Vec::new());

fn codec(codebook: &str, block: usize, scale: &str, scale_dtype: &str, order: &str) -> PyResult<Arc<FlatCodec>> {
    const MOST: usize = 64;
    let mut known = CODECS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let found = known.iter().find(|(k, _)| {
        (k.0.as_str(), k.1, k.2.as_str(), k.3.as_str(), k.4.as_str()) == (codebook, block, scale, scale_dtype, order)
    });
    if let Some((_, codec)) = found {
        return Ok(Arc::clone(codec));
    }
    let codec = Arc::new(FlatCodec::new(spec(codebook, block, scale, scale_dtype, order)?));
    if known.len() == MOST {
        known.remove(0);
    }
    known.push(((codebook.into(), block, scale.into(), scale_dtype.into(), order.into()), Arc::clone(&codec)));
    Ok(codec)
}

fn device_of(tensor: &OnDevice<'_>) -> Result<&'static cuda::Device, Error> {
    cuda::device(usize::try_from(tensor.tensor.device).unwrap_or(usize::MAX))
}

pub(super) fn bytes(what: &str, x: &OnDevice<'_>, len: usize, device: i32) -> PyResult<u64> {
    x.check_device(what, device)?;
    if x.tensor.element != Element::U8 {
        return Err(Error::dtype(what, "uint8", "a float type").into());
    }
    x.tensor.check_contiguous(what)?;
    if x.tensor.len() != len {
        return Err(Error::shape(what, format!("{len} bytes"), format!("{} bytes", x.tensor.len())).into());
    }
    Ok(x.address())
}

/// Quantizes `x` into `codes` and `fields`; `bad` is eight bytes for the index of the first number that is not finite.
#[pyfunction]
#[pyo3(signature = (x, codes, fields, codebook, block, scale, scale_dtype, flat, order, bad=None))]
#[expect(clippy::too_many_arguments, reason = "the words of a codec")]
pub(super) fn cuda_quantize(
    x: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    fields: &Bound<'_, PyAny>,
    codebook: &str,
    block: usize,
    scale: &str,
    scale_dtype: &str,
    flat: bool,
    order: &str,
    bad: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let codec = codec(codebook, block, scale, scale_dtype, order)?;
    let spec = codec.spec();
    let (codes, fields) = (OnDevice::beside("codes", codes)?, OnDevice::beside("fields", fields)?);
    let (object, mut x) = (x, OnDevice::new("x", x)?);
    // PyTorch's dispatcher comes here with tensors as they are, since a wrapper in Python would take as long as all of this.
    let copy = match x.tensor.check_contiguous("x") {
        Ok(()) => None,
        Err(_) if object.hasattr("contiguous")? => Some(object.call_method0("contiguous")?),
        Err(e) => return Err(e.into()),
    };
    if let Some(copy) = &copy {
        x = OnDevice::new("x", copy)?;
        x.tensor.check_contiguous("x")?;
    }
    let (n, row, device) = (x.tensor.len(), row(&x.tensor.shape, flat), x.tensor.device);
    let codes = bytes("codes", &codes, spec.codes_len(n), device)?;
    let fields = bytes("fields", &fields, spec.fields_len(n, row), device)?;
    let bad = match bad {
        Some(bad) => bytes("bad", &OnDevice::beside("bad", bad)?, 8, device)?,
        None => 0,
    };
    let tensor = flat::Flat { address: x.address(), dtype: x.tensor.float("x")?, len: n, row };
    // SAFETY: checked above; the caller keeps the tensors until the stream is past the launch, as with any asynchronous call.
    unsafe { codec.quantize(device_of(&x)?, x.stream, &tensor, flat::Packed { codes, fields }, bad)? };
    Ok(())
}

/// Dequantizes `codes` and `fields` into `out`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the words of a codec")]
pub(super) fn cuda_dequantize(
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
    let codec = codec(codebook, block, scale, scale_dtype, order)?;
    let spec = codec.spec();
    let (codes, fields, out) =
        (OnDevice::beside("codes", codes)?, OnDevice::beside("fields", fields)?, OnDevice::new("out", out)?);
    out.tensor.check_writable("out")?;
    let (n, row, device) = (out.tensor.len(), row(&out.tensor.shape, flat), out.tensor.device);
    let codes = bytes("codes", &codes, spec.codes_len(n), device)?;
    let fields = bytes("fields", &fields, spec.fields_len(n, row), device)?;
    let tensor = flat::Flat { address: out.address(), dtype: out.tensor.float("out")?, len: n, row };
    // SAFETY: as in `cuda_quantize`.
    unsafe { codec.dequantize(device_of(&out)?, out.stream, flat::Packed { codes, fields }, &tensor)? };
    Ok(())
}
