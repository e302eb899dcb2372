//! `_core.CudaLayerCache`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::cache::{LayerCache, page_shape, pool_memory};
use super::cuda::bytes;
use super::device::OnDevice;
use super::transform::Parts;
use crate::cache::Keep;
use crate::cuda::{self, DeviceTransform, DeviceView, Room, Stream};
use crate::dlpack::Element;
use crate::error::Error;
use crate::scheme::Scheme;
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// One layer's cache on a CUDA device. See `nqkv_rs.cuda_cache`.
#[pyclass(frozen, module = "nqkv_rs._core")]
pub(super) struct CudaLayerCache {
    inner: Mutex<cuda::DeviceCache>,
}

/// A pool array, kept alive by the cache.
struct PoolArray(Py<PyAny>);

/// Memory besides rows: uint8 tensors, and the pages that a table holds.
#[derive(FromPyObject)]
struct RoomArgument<'py> {
    codec: Bound<'py, PyAny>,
    counts: Bound<'py, PyAny>,
    table: Bound<'py, PyAny>,
    arrived: Bound<'py, PyAny>,
    sinks: (Bound<'py, PyAny>, Bound<'py, PyAny>),
    tail: (Bound<'py, PyAny>, Bound<'py, PyAny>),
    capacity: usize,
}

/// A room's tensors, borrowed: not under the cache's lock, since that may run Python.
struct BorrowedRoom<'py> {
    parts: [(&'static str, OnDevice<'py>); 8],
    keep: Vec<Py<PyAny>>,
    capacity: usize,
}

impl<'py> RoomArgument<'py> {
    fn borrow(self) -> PyResult<BorrowedRoom<'py>> {
        let mut keep = Vec::new();
        let mut part = |what, x: Bound<'py, PyAny>| -> PyResult<_> {
            let tensor = OnDevice::new(what, &x)?;
            keep.push(x.unbind());
            Ok((what, tensor))
        };
        let parts = [
            part("codec", self.codec)?,
            part("counts", self.counts)?,
            part("table", self.table)?,
            part("arrived", self.arrived)?,
            part("sinks", self.sinks.0)?,
            part("sinks", self.sinks.1)?,
            part("tail", self.tail.0)?,
            part("tail", self.tail.1)?,
        ];
        Ok(BorrowedRoom { parts, keep, capacity: self.capacity })
    }
}

impl BorrowedRoom<'_> {
    /// The room for `batch` sequences, what keeps it alive, and the stream to work on.
    fn check(self, cache: &cuda::DeviceCache, batch: usize) -> PyResult<(Room, Keep, Stream)> {
        let (sizes, capacity) = (cache.sizes(), self.capacity);
        let codec = cuda::codec_bytes(cache.codec(), cache.exact_dtype()).len();
        let [sinks, tail] = [sizes.sinks, sizes.tail].map(|both| both.map(|bytes| bytes * batch));
        let lengths = [codec, 16 * batch, 8 * batch * capacity, 4 * batch, sinks[0], sinks[1], tail[0], tail[1]];
        let mut at = [0; 8];
        for ((at, (what, tensor)), len) in at.iter_mut().zip(&self.parts).zip(lengths) {
            *at = bytes(what, tensor, len, cache.device().ordinal() as i32)?;
        }
        let [codec, counts, table, arrived, sinks @ .., key_tail, value_tail] = at;
        let room = Room { codec, counts, table, arrived, sinks, tail: [key_tail, value_tail], capacity };
        Ok((room, Box::new(self.keep), self.parts[7].1.stream))
    }
}

impl CudaLayerCache {
    /// For threads without the GIL.
    fn lock(&self) -> MutexGuard<'_, cuda::DeviceCache> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For threads with the GIL, which is given up while another thread is in a call. No Python code may run under it.
    pub(super) fn look(&self, py: Python<'_>) -> MutexGuard<'_, cuda::DeviceCache> {
        self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    /// A change that may drop memory: without the GIL, so that finalizers run after it.
    fn change<T: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut cuda::DeviceCache) -> T + Send) -> T {
        py.detach(|| f(&mut self.lock()))
    }
}

pub(super) fn view(what: &str, x: &OnDevice<'_>, device: i32) -> PyResult<DeviceView> {
    x.check_device(what, device)?;
    let t = &x.tensor;
    let dtype = t.float(what)?;
    let wrong = || Error::shape(what, "4 dimensions [batch, heads, tokens, dim]", format!("{:?}", t.shape));
    let shape: [usize; 4] = t.shape[..].try_into().map_err(|_| wrong())?;
    let strides: [isize; 4] = t.strides[..].try_into().map_err(|_| wrong())?;
    Ok(DeviceView { address: x.address(), dtype, shape, strides })
}

fn sequence(cache: &cuda::DeviceCache, b: usize) -> PyResult<usize> {
    if b < cache.batch() {
        return Ok(b);
    }
    Err(Error::value("sequence", format!("0 to {}", cache.batch().saturating_sub(1)), b).into())
}

#[pymethods]
impl CudaLayerCache {
    #[new]
    fn new(
        scheme: &str,
        kv_heads: usize,
        key_dim: usize,
        value_dim: usize,
        exact_dtype: &str,
        batch: usize,
        device: usize,
    ) -> PyResult<Self> {
        let codec = PageCodec::new(&Scheme::from_json(scheme)?, kv_heads, key_dim, value_dim)?;
        let inner = cuda::DeviceCache::new(Arc::new(codec), Dtype::parse(exact_dtype)?, batch, device)?;
        Ok(Self { inner: Mutex::new(inner) })
    }

    #[getter]
    fn page_bytes(&self, py: Python<'_>) -> usize {
        self.look(py).codec().layout.page_bytes()
    }

    #[getter]
    fn value_offset(&self, py: Python<'_>) -> usize {
        self.look(py).codec().layout.value_offset()
    }

    #[getter]
    fn kv_heads(&self, py: Python<'_>) -> usize {
        self.look(py).codec().heads
    }

    #[getter]
    fn exact_dtype(&self, py: Python<'_>) -> &'static str {
        self.look(py).exact_dtype().name()
    }

    #[getter]
    fn batch(&self, py: Python<'_>) -> usize {
        self.look(py).batch()
    }

    #[getter]
    fn rows(&self, py: Python<'_>) -> usize {
        self.look(py).rows()
    }

    #[getter]
    fn free_rows(&self, py: Python<'_>) -> usize {
        self.look(py).free_rows()
    }

    fn tokens(&self, py: Python<'_>, sequence_index: usize) -> PyResult<usize> {
        let cache = self.look(py);
        Ok(cache.tokens(sequence(&cache, sequence_index)?))
    }

    fn packed(&self, py: Python<'_>, sequence_index: usize) -> PyResult<usize> {
        let cache = self.look(py);
        Ok(cache.packed(sequence(&cache, sequence_index)?))
    }

    /// Tokens of every sequence.
    fn lengths(&self, py: Python<'_>) -> Vec<usize> {
        let cache = self.look(py);
        (0..cache.batch()).map(|b| cache.tokens(b)).collect()
    }

    /// Positions that queries attend, and those read from pages.
    #[pyo3(signature = (queries, starts=None, window=None, fresh=false))]
    fn attended(
        &self,
        py: Python<'_>,
        queries: usize,
        starts: Option<Vec<usize>>,
        window: Option<usize>,
        fresh: bool,
    ) -> PyResult<(u64, u64)> {
        let count = self.look(py).attended(queries, starts.as_deref(), window, fresh)?;
        Ok((count.attended, count.packed))
    }

    fn table(&self, py: Python<'_>, sequence_index: usize) -> PyResult<Vec<(u32, u32)>> {
        let cache = self.look(py);
        let b = sequence(&cache, sequence_index)?;
        Ok(cache.table(b).iter().map(|e| (e.row, e.count)).collect())
    }

    fn rows_missing(&self, py: Python<'_>, tokens: usize) -> usize {
        self.look(py).rows_missing(tokens)
    }

    fn capacity_missing(&self, py: Python<'_>, tokens: usize) -> usize {
        self.look(py).capacity_missing(tokens)
    }

    /// The codec as the device reads it.
    fn codec_bytes(&self, py: Python<'_>) -> Vec<u8> {
        let cache = self.look(py);
        cuda::codec_bytes(cache.codec(), cache.exact_dtype())
    }

    /// Bytes of one sequence's sinks (keys, values) and tail (keys, values).
    fn sizes(&self, py: Python<'_>) -> ([usize; 2], [usize; 2]) {
        let sizes = self.look(py).sizes();
        (sizes.sinks, sizes.tail)
    }

    fn pool(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        let arrays = |keep: &Keep| keep.downcast_ref::<PoolArray>().map(|p| p.0.clone_ref(py));
        self.look(py).kept().into_iter().filter_map(arrays).collect()
    }

    fn add_rows(&self, py: Python<'_>, pool: &Bound<'_, PyAny>) -> PyResult<()> {
        let x = OnDevice::new("pool", pool)?;
        let mut cache = self.look(py);
        x.check_device("pool", cache.device().ordinal() as i32)?;
        if x.tensor.element != Element::U8 {
            return Err(Error::dtype("pool", "uint8", "a float type").into());
        }
        let expected = [cache.codec().heads, cache.codec().layout.page_bytes()];
        if x.tensor.shape.len() != 3 || x.tensor.shape[1..] != expected {
            let expected = format!("[rows, {}, {}]", expected[0], expected[1]);
            return Err(Error::shape("pool", expected, format!("{:?}", x.tensor.shape)).into());
        }
        x.tensor.check_writable("pool")?;
        if !x.address().is_multiple_of(128) {
            return Err(Error::memory("pool", "memory aligned to 128 bytes", format!("address {:#x}", x.address())).into());
        }
        // SAFETY: checked above; `PoolArray` keeps the array alive.
        unsafe { cache.add_rows(x.address(), x.tensor.shape[0], Box::new(PoolArray(pool.clone().unbind()))) };
        Ok(())
    }

    /// Moves to another room, with what the cache holds.
    fn set_room(&self, py: Python<'_>, room: RoomArgument<'_>) -> PyResult<()> {
        let room = room.borrow()?;
        let (from, (room, keep, stream)) = {
            let cache = self.look(py);
            ((0..cache.batch()).collect::<Vec<_>>(), room.check(&cache, cache.batch())?)
        };
        // SAFETY: `check` made sure of sizes and device, which do not change; `keep` holds the tensors.
        Ok(self.change(py, |cache| unsafe { cache.move_to(room, keep, &from, stream) })?)
    }

    /// Appends; `grow`, if there is one, is called with the number of tokens if they need more memory than there is. False, and
    /// nothing done, if transforming takes a launch of its own.
    #[pyo3(signature = (k, v, grow=None, keys=None, values=None))]
    fn append(
        &self,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        grow: Option<&Bound<'_, PyAny>>,
        keys: Option<Parts<'_>>,
        values: Option<Parts<'_>>,
    ) -> PyResult<bool> {
        let py = k.py();
        // Not under the lock: this may run Python, and another thread.
        let (k, v) = (OnDevice::new("k", k)?, OnDevice::beside("v", v)?);
        let (key, value) = (view("k", &k, k.tensor.device)?, view("v", &v, v.tensor.device)?);
        let how = match (keys, values) {
            (None, None) => None,
            (keys, values) => {
                let on = |parts: Option<Parts<'_>>, x: &OnDevice<'_>, view: &DeviceView| match parts {
                    Some(parts) => parts.on(x.tensor.device, view.shape),
                    None => Ok(DeviceTransform::default()),
                };
                Some([on(keys, &k, &key)?, on(values, &v, &value)?])
            }
        };
        let mut cache = self.look(py);
        let device = cache.device().ordinal() as i32;
        k.check_device("k", device)?;
        v.check_device("v", device)?;
        let tokens = key.shape[2];
        while let Some(grow) = grow
            && cache.must_grow(tokens)
        {
            cache.check_append(&key, &value)?;
            cache.device().check_uncaptured(k.stream, "rows are added before the capture, with reserve()")?;
            drop(cache);
            grow.call1((tokens,))?;
            cache = self.look(py);
        }
        let Some(how) = how else {
            // SAFETY: borrowed tensors of this device; asynchronous as any launch on their stream.
            unsafe { cache.append(&key, &value, k.stream)? };
            return Ok(true);
        };
        // SAFETY: as above.
        Ok(unsafe { cache.append_transformed(&key, &value, &how, k.stream)? })
    }

    /// Reserves what appending `tokens` takes; `like` gives the stream.
    fn reserve(&self, py: Python<'_>, tokens: usize, like: &Bound<'_, PyAny>) -> PyResult<()> {
        let stream = OnDevice::new("like", like)?.stream;
        Ok(self.look(py).reserve(tokens, stream)?)
    }

    fn advance(&self, py: Python<'_>, tokens: usize) -> PyResult<()> {
        Ok(self.look(py).advance(tokens)?)
    }

    /// Tokens from `start` on of every sequence into `[batch, heads, tokens, dim]`; zeros past a sequence's end.
    fn read(&self, py: Python<'_>, start: usize, k_out: &Bound<'_, PyAny>, v_out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (k, v) = (OnDevice::new("k_out", k_out)?, OnDevice::beside("v_out", v_out)?);
        let mut cache = self.look(py);
        let device = cache.device().ordinal() as i32;
        let (a, b) = (view("k_out", &k, device)?, view("v_out", &v, device)?);
        let (batch, heads, tokens) = (cache.batch(), cache.codec().heads, a.shape[2]);
        k.tensor.check_output("k_out", &[batch, heads, tokens, cache.codec().key.layout.dim])?;
        v.tensor.check_output("v_out", &[batch, heads, tokens, cache.codec().value.layout.dim])?;
        if a.dtype != b.dtype {
            return Err(Error::dtype("v_out", a.dtype.name(), b.dtype.name()).into());
        }
        // SAFETY: outputs of this size on this device.
        unsafe { cache.read(start, tokens, a.dtype, [a.address, b.address], k.stream)? };
        Ok(())
    }

    fn remove_newest(&self, py: Python<'_>, tokens: usize) -> PyResult<()> {
        let mut cache = self.look(py);
        if let Some(short) = (0..cache.batch()).map(|b| cache.tokens(b)).find(|&t| t < tokens) {
            return Err(Error::value("tokens to remove", format!("at most {short} (the tokens held)"), tokens).into());
        }
        let lengths: Vec<usize> = (0..cache.batch()).map(|b| cache.tokens(b) - tokens).collect();
        Ok(cache.crop(&lengths)?)
    }

    fn crop(&self, py: Python<'_>, lengths: Vec<usize>) -> PyResult<()> {
        Ok(self.change(py, |cache| cache.crop(&lengths))?)
    }

    fn select(&self, py: Python<'_>, indices: Vec<usize>, room: RoomArgument<'_>) -> PyResult<()> {
        let (room, keep, stream) = room.borrow()?.check(&self.look(py), indices.len())?;
        // SAFETY: as in `set_room`.
        Ok(self.change(py, |cache| unsafe { cache.select(&indices, room, keep, stream) })?)
    }

    fn fork(&self, py: Python<'_>, indices: Vec<usize>, room: RoomArgument<'_>) -> PyResult<Self> {
        let (room, keep, stream) = room.borrow()?.check(&self.look(py), indices.len())?;
        // SAFETY: as in `set_room`.
        let copy = self.change(py, |cache| unsafe { cache.fork(&indices, room, keep, stream) })?;
        Ok(Self { inner: Mutex::new(copy) })
    }

    fn reset(&self, py: Python<'_>) {
        self.change(py, cuda::DeviceCache::reset);
    }

    /// Rows that [`CudaLayerCache::to_host`] takes.
    fn named_rows(&self, py: Python<'_>) -> usize {
        self.look(py).named_rows()
    }

    /// The same cache in host memory, its pages in `pool`; `like` gives the stream, which is waited for.
    fn to_host(&self, py: Python<'_>, pool: &Bound<'_, PyAny>, like: &Bound<'_, PyAny>) -> PyResult<LayerCache> {
        let stream = OnDevice::new("like", like)?.stream;
        let mut cache = self.look(py);
        let (data, rows, keep) = pool_memory(page_shape(cache.codec()), pool)?;
        if rows != cache.named_rows() {
            return Err(Error::shape("pool", format!("{} rows", cache.named_rows()), format!("{rows} rows")).into());
        }
        let (cache, data) = (&mut *cache, data.expose_provenance());
        // SAFETY: `pool_memory` checked the pool; the capsule in `keep` keeps it alive.
        let host = py.detach(|| unsafe { cache.to_host(std::ptr::with_exposed_provenance_mut(data), keep, stream) })?;
        Ok(LayerCache::of(host))
    }

    /// Fills this cache, which has rows and a room but no tokens, with what `host` holds; `like` gives the stream.
    fn fill(&self, py: Python<'_>, host: PyRef<'_, LayerCache>, like: &Bound<'_, PyAny>) -> PyResult<()> {
        let stream = OnDevice::new("like", like)?.stream;
        let host = host.fork_inner(py);
        let mut cache = self.look(py);
        let cache = &mut *cache;
        Ok(py.detach(|| cache.fill(&host, stream))?)
    }

    fn memory(&self, py: Python<'_>) -> BTreeMap<&'static str, usize> {
        let m = self.look(py).memory();
        BTreeMap::from([("codes", m.codes), ("scales", m.scales), ("tail", m.tail), ("sinks", m.sinks), ("total", m.total())])
    }
}
