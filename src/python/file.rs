//! `_core.save` and `_core.SavedCache`: caches to files and back.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use super::borrow::Borrowed;
use super::cache::{LayerCache, page_shape, pool_memory};
use crate::cache;
use crate::dlpack::Element;
use crate::error::Error;
use crate::file::{self, DenseTensor, Layer};

/// A layer to save: nothing, pages, or state (JSON), keys and values of an ordinary layer.
#[derive(FromPyObject)]
pub(super) enum LayerArgument<'py> {
    Packed(PyRef<'py, LayerCache>),
    Dense(String, Bound<'py, PyAny>, Bound<'py, PyAny>),
}

/// What is held while the file is written.
enum Held<'py> {
    Packed(cache::LayerCache),
    Dense { state: serde_json::Value, tensors: [Borrowed<'py>; 2] },
    Empty,
}

fn json(what: &str, text: &str) -> PyResult<serde_json::Value> {
    Ok(serde_json::from_str(text).map_err(|e| Error::value(what, "JSON", e))?)
}

/// Writes layers as one file, complete or not at all; returns its bytes.
#[pyfunction]
#[pyo3(signature = (path, model, layers))]
pub(super) fn save(py: Python<'_>, path: PathBuf, model: &str, layers: Vec<Option<LayerArgument<'_>>>) -> PyResult<u64> {
    let model = json("model", model)?;
    let mut held = Vec::new();
    for layer in layers {
        held.push(match layer {
            None => Held::Empty,
            // A fork: what is written stays as it is, while the cache may go on.
            Some(LayerArgument::Packed(cache)) => Held::Packed(cache.fork_inner(py)),
            Some(LayerArgument::Dense(state, k, v)) => {
                let tensors = [Borrowed::new("keys", &k)?, Borrowed::new("values", &v)?];
                for (what, x) in ["keys", "values"].into_iter().zip(&tensors) {
                    x.tensor.check_contiguous(what)?;
                    x.tensor.float(what)?;
                }
                Held::Dense { state: json("state", &state)?, tensors }
            }
        });
    }
    let mut layers = Vec::new();
    for held in &held {
        layers.push(match held {
            Held::Empty => Layer::Empty,
            Held::Packed(cache) => Layer::Packed(cache),
            Held::Dense { state, tensors: [k, v] } => {
                let tensor = |what: &str, x: &Borrowed<'_>| -> Result<DenseTensor<'_>, Error> {
                    let (dtype, shape) = (x.tensor.float(what)?, x.tensor.shape.clone());
                    let n = x.tensor.len() * dtype.bytes();
                    // SAFETY: contiguous as checked; the capsule keeps the elements alive; no address for no elements.
                    let bytes = if n == 0 { &[] } else { unsafe { std::slice::from_raw_parts(x.tensor.data, n) } };
                    Ok(DenseTensor { dtype, shape, bytes })
                };
                Layer::Dense { state: state.clone(), keys: tensor("keys", k)?, values: tensor("values", v)? }
            }
        });
    }
    py.detach(|| write_whole(&path, &model, &layers)).map_err(|e| os_error(&e, &path))
}

/// Python's own exception for an error of the system, which names the file; what no system was asked about is a wrong value.
fn os_error(e: &io::Error, path: &Path) -> PyErr {
    let text = e.to_string();
    match e.raw_os_error() {
        Some(code) => {
            PyOSError::new_err((code, text.split(" (os error").next().unwrap_or("").to_owned(), path.display().to_string()))
        }
        None if e.kind() == io::ErrorKind::InvalidInput => PyValueError::new_err(format!("path: {text}, got {path:?}")),
        None => PyOSError::new_err(format!("{}: {text}", path.display())),
    }
}

/// Writes beside `path` and renames, so that nobody ever sees half a file.
fn write_whole(path: &Path, model: &serde_json::Value, layers: &[Layer]) -> io::Result<u64> {
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "expected the path of a file"))?;
    // A name of its own for every call: two threads may save to one path.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let part = path.with_file_name(format!(".{}.{}.{call}.part", name.to_string_lossy(), std::process::id()));
    let write = || {
        let mut out = BufWriter::with_capacity(1 << 20, fs::File::create(&part)?);
        let bytes = file::write(&mut out, model, layers)?;
        out.flush()?;
        fs::rename(&part, path)?;
        Ok(bytes)
    };
    write().inspect_err(|_| drop(fs::remove_file(&part)))
}

/// The bytes of a saved file, checked.
#[pyclass(frozen, module = "nqkv_rs._core")]
pub(super) struct SavedCache {
    inner: file::SavedCache,
    data: usize,
    len: usize,
    _capsule: Py<PyAny>,
}

#[pymethods]
impl SavedCache {
    #[new]
    fn new(py: Python<'_>, bytes: &Bound<'_, PyAny>) -> PyResult<Self> {
        let memory = Borrowed::new("bytes", bytes)?;
        let t = &memory.tensor;
        if t.element != Element::U8 || t.shape.len() != 1 {
            return Err(Error::shape("bytes", "[bytes of a file], uint8", format!("{:?}", t.shape)).into());
        }
        t.check_contiguous("bytes")?;
        let (data, len) = (t.data as usize, t.shape[0]);
        let inner = py.detach(|| {
            // SAFETY: contiguous bytes that the capsule keeps alive; no address for no bytes.
            let bytes = if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data as *const u8, len) } };
            file::open(bytes)
        })?;
        Ok(Self { inner, data, len, _capsule: memory.capsule.unbind() })
    }

    #[getter]
    fn header(&self) -> String {
        serde_json::to_string(&self.inner.header).expect("a header has only serialisable fields")
    }

    /// Type, shape, first byte and end of a tensor.
    fn tensor(&self, name: &str) -> PyResult<(String, Vec<usize>, usize, usize)> {
        let entry = self.inner.tensors.get(name).ok_or_else(|| Error::file(format!("expected a tensor {name}, got none")))?;
        Ok((entry.dtype.clone(), entry.shape.clone(), entry.range.start, entry.range.end))
    }

    /// Shape, first byte and end of the pages of a packed layer.
    fn pages(&self, layer: usize) -> PyResult<(Vec<usize>, usize, usize)> {
        let entry = self.inner.pages(layer)?;
        Ok((entry.shape.clone(), entry.range.start, entry.range.end))
    }

    /// A packed layer over `pool`, memory that holds its pages.
    fn layer(&self, layer: usize, pool: &Bound<'_, PyAny>) -> PyResult<LayerCache> {
        let (codec, ..) = self.inner.codec(layer)?;
        let expected = self.inner.pages(layer)?.shape[0];
        let (data, rows, keep) = pool_memory(page_shape(&codec), pool)?;
        if rows != expected {
            return Err(Error::shape("pool", format!("{expected} rows"), format!("{rows} rows")).into());
        }
        // SAFETY: as in `new`.
        let bytes = unsafe { std::slice::from_raw_parts(self.data as *const u8, self.len) };
        // SAFETY: `pool_memory` checked the pool; the capsule in `keep` keeps it alive.
        Ok(LayerCache::of(unsafe { self.inner.layer(layer, bytes, data, keep)? }))
    }
}
