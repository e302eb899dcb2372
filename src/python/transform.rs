//! `_core.transform` and `_core.cuda_transform`: keys and values on their way in.

use pyo3::prelude::*;

use super::borrow::{Borrowed, output_bytes};
#[cfg(feature = "cuda")]
use super::device::OnDevice;
use crate::dlpack::TensorRef;
use crate::error::{Error, Result};
use crate::tensor::Dtype;
use crate::transform::{Rope, Transform};

/// Cosines, sines, whether neighbours are pairs, what is subtracted, whether to rotate.
#[derive(FromPyObject)]
pub(super) struct Parts<'py>(Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>, bool, Option<Bound<'py, PyAny>>, bool);

/// Contiguous float32 of so many dimensions.
fn check<'a>(what: &str, t: &'a TensorRef, dimensions: usize) -> Result<&'a [usize]> {
    if t.float(what)? != Dtype::F32 {
        return Err(Error::dtype(what, "float32", t.float(what)?.name()));
    }
    t.check_contiguous(what)?;
    if t.shape.len() != dimensions {
        return Err(Error::shape(what, format!("of {dimensions} dimensions"), format!("{:?}", t.shape)));
    }
    Ok(&t.shape)
}

/// The shape that cosines and sines share.
fn rope_shape(cos: &TensorRef, sin: &TensorRef) -> Result<[usize; 3]> {
    let (a, b) = (check("cos", cos, 3)?, check("sin", sin, 3)?);
    if a != b {
        return Err(Error::shape("sin", format!("{a:?} (that of cos)"), format!("{b:?}")));
    }
    Ok([a[0], a[1], a[2]])
}

fn both(what: &str) -> Error {
    Error::value("rope", "cos and sin", format!("{what} alone"))
}

/// # Safety
/// The tensor was checked to be contiguous float32, and is alive and unwritten while the slice is used.
unsafe fn numbers(t: &TensorRef) -> &[f32] {
    if t.is_empty() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(t.data.cast::<f32>(), t.len()) }
}

/// Writes `x`, changed, to `out`, contiguous and of the same shape.
#[pyfunction]
pub(super) fn transform(py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>, parts: Parts<'_>) -> PyResult<()> {
    let Parts(cos, sin, interleaved, centre, hadamard) = parts;
    let (x, out) = (Borrowed::new("x", x)?, Borrowed::new("out", out)?);
    let view = x.view("x")?;
    let dtype = out.tensor.float("out")?;
    out.tensor.check_output("out", &view.shape())?;
    let (cos, sin) = (Borrowed::optional("cos", cos.as_ref())?, Borrowed::optional("sin", sin.as_ref())?);
    let centre = Borrowed::optional("centre", centre.as_ref())?;
    if let Some(centre) = &centre {
        let [_, heads, _, dim] = view.shape();
        if check("centre", &centre.tensor, 2)? != [heads, dim] {
            return Err(Error::shape("centre", format!("[{heads}, {dim}]"), format!("{:?}", centre.tensor.shape)).into());
        }
    }
    let rope = match (&cos, &sin) {
        (None, None) => None,
        (Some(_), None) => return Err(both("cos").into()),
        (None, Some(_)) => return Err(both("sin").into()),
        (Some(c), Some(s)) => {
            let [batch, tokens, pairs] = rope_shape(&c.tensor, &s.tensor)?;
            // SAFETY: checked, and the capsules live to the end of this call.
            let (cos, sin) = unsafe { (numbers(&c.tensor), numbers(&s.tensor)) };
            Some(Rope { cos, sin, batch, tokens, pairs, interleaved })
        }
    };
    // SAFETY: as above.
    let centre = centre.as_ref().map(|c| unsafe { numbers(&c.tensor) });
    let change = Transform { rope, centre, hadamard };
    // SAFETY: checked to be contiguous and writable; that nobody else uses it meanwhile is the contract of an output.
    let bytes = unsafe { output_bytes(out.tensor.data as usize, out.tensor.len() * dtype.bytes()) };
    py.detach(|| change.apply(&view, dtype, bytes))?;
    Ok(())
}

#[cfg(feature = "cuda")]
pub(super) mod on_device {
    use super::super::cuda_cache::view;
    use super::*;
    use crate::cuda::{self, DeviceTransform};

    fn address(what: &str, t: Option<&OnDevice<'_>>, device: i32, dimensions: usize) -> PyResult<u64> {
        let Some(t) = t else { return Ok(0) };
        t.check_device(what, device)?;
        check(what, &t.tensor, dimensions)?;
        Ok(t.address())
    }

    impl Parts<'_> {
        /// For a `[batch, heads, tokens, dim]` tensor on a device.
        pub(crate) fn on(self, device: i32, [_, heads, tokens, dim]: [usize; 4]) -> PyResult<DeviceTransform> {
            let Parts(cos, sin, interleaved, centre, hadamard) = self;
            let cos = cos.as_ref().map(|x| OnDevice::beside("cos", x)).transpose()?;
            let sin = sin.as_ref().map(|x| OnDevice::beside("sin", x)).transpose()?;
            let centre = centre.as_ref().map(|x| OnDevice::beside("centre", x)).transpose()?;
            let mut made = DeviceTransform {
                cos: address("cos", cos.as_ref(), device, 3)?,
                sin: address("sin", sin.as_ref(), device, 3)?,
                centre: address("centre", centre.as_ref(), device, 2)?,
                interleaved,
                hadamard,
                ..DeviceTransform::default()
            };
            match (&cos, &sin) {
                (None, None) => {}
                (Some(_), None) => return Err(both("cos").into()),
                (None, Some(_)) => return Err(both("sin").into()),
                (Some(c), Some(s)) => {
                    let shape = rope_shape(&c.tensor, &s.tensor)?;
                    if shape[1] != tokens {
                        return Err(Error::shape("rope", format!("{tokens} tokens"), format!("{shape:?}")).into());
                    }
                    (made.rope_batch, made.pairs) = (shape[0], shape[2]);
                }
            }
            if let Some(c) = &centre
                && c.tensor.shape[..] != [heads, dim]
            {
                return Err(Error::shape("centre", format!("[{heads}, {dim}]"), format!("{:?}", c.tensor.shape)).into());
            }
            Ok(made)
        }
    }

    /// The same on a CUDA device, on the stream of `x`.
    #[pyfunction]
    pub(in crate::python) fn cuda_transform(x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>, parts: Parts<'_>) -> PyResult<()> {
        let (x, out) = (OnDevice::new("x", x)?, OnDevice::beside("out", out)?);
        let device = x.tensor.device;
        let (from, to) = (view("x", &x, device)?, view("out", &out, device)?);
        out.tensor.check_output("out", &x.tensor.shape)?;
        let change = parts.on(device, from.shape)?;
        let device = cuda::device(usize::try_from(device).unwrap_or(usize::MAX))?;
        // SAFETY: checked above; asynchronous as any launch on the stream.
        unsafe { change.apply(device, x.stream, &from, &to)? };
        Ok(())
    }
}
