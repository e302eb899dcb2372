//! `_core.cuda_attend*`: attention of a `CudaLayerCache` by one launch.

use pyo3::prelude::*;

use super::cuda::bytes;
use super::cuda_cache::{CudaLayerCache, view};
use super::device::OnDevice;
use crate::cuda::{self, Attend};
use crate::dlpack::Element;
use crate::error::Error;
use crate::tensor::Dtype;

/// Bytes of workspace for attention of as many columns (queries times query heads of a KV head), or None and what was expected.
#[pyfunction]
pub(super) fn cuda_attend_workspace(py: Python<'_>, cache: &CudaLayerCache, columns: usize) -> (Option<usize>, Option<String>) {
    match cache.look(py).attend_workspace(columns) {
        Ok(workspace) => (Some(workspace.0), None),
        Err(expected) => (None, Some(expected)),
    }
}

/// Whether the newest tokens of every sequence are exact.
#[pyfunction]
pub(super) fn cuda_newest_are_exact(py: Python<'_>, cache: &CudaLayerCache, queries: usize) -> bool {
    cache.look(py).newest_are_exact(queries)
}

/// The stream that work on a tensor goes to, and whether a CUDA graph is captured from it.
#[pyfunction]
pub(super) fn cuda_stream(x: &Bound<'_, PyAny>) -> PyResult<(usize, bool)> {
    let x = OnDevice::new("x", x)?;
    let device = cuda::device(x.tensor.device as usize)?;
    Ok((x.stream.0, device.is_captured(x.stream)?))
}

/// Attention into `out`, one launch.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "what attention takes")]
#[pyo3(signature = (cache, q, out, scale, workspace, starts=None, window=None, soft_cap=None, lse=None))]
pub(super) fn cuda_attend(
    cache: &CudaLayerCache,
    q: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    scale: f32,
    workspace: &Bound<'_, PyAny>,
    starts: Option<&Bound<'_, PyAny>>,
    window: Option<usize>,
    soft_cap: Option<f32>,
    lse: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let py = q.py();
    // Not under the lock: this may run Python, and another thread.
    let (q, out, room) = (OnDevice::new("q", q)?, OnDevice::new("out", out)?, OnDevice::new("workspace", workspace)?);
    let starts = starts.map(|x| OnDevice::new("starts", x)).transpose()?;
    let lse = lse.map(|x| OnDevice::new("lse", x)).transpose()?;
    let mut cache = cache.look(py);
    let device = cache.device().ordinal() as i32;
    let view = view("q", &q, device)?;
    let [batch, heads, queries, _] = view.shape;
    let columns = cache.check_queries(&view)?;
    out.check_device("out", device)?;
    out.tensor.check_output("out", &[batch, queries, heads, cache.codec().value.layout.dim])?;
    let needed = cache.attend_workspace(columns);
    let needed = needed.map_err(|e| Error::unsupported("attention on pages by one launch", format!("expected {e}")))?;
    if room.tensor.len() < needed.0 {
        return Err(Error::shape("workspace", format!("{} bytes or more", needed.0), room.tensor.len()).into());
    }
    if let Some(lse) = &lse {
        lse.check_device("lse", device)?;
        lse.tensor.check_output("lse", &[batch, queries, heads])?;
        if lse.tensor.element != Element::Float(Dtype::F32) {
            return Err(Error::dtype("lse", "float32", "another type").into());
        }
    }
    let call = Attend {
        q: view,
        out: (out.address(), out.tensor.float("out")?),
        lse: lse.map_or(0, |x| x.address()),
        starts: starts.map_or(Ok(0), |x| bytes("starts", &x, 4 * batch, device))?,
        scale,
        window,
        soft_cap,
        workspace: bytes("workspace", &room, room.tensor.len(), device)?,
    };
    // SAFETY: checked above; asynchronous as any launch on the stream of `q`.
    unsafe { cache.attend(&call, q.stream)? };
    Ok(())
}
