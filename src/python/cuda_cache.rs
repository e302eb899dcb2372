//! `_core.CudaLayerCache`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::prelude::*;

use super::cache::{LayerCache, page_shape, pool_memory};
use super::cuda::bytes;
use super::device::OnDevice;
use crate::cache::Keep;
use crate::cuda::{self, DeviceView, Room, Stream};
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

impl RoomArgument<'_> {
    /// The room for `batch` sequences, what keeps it alive, and the stream to work on.
    fn check(self, cache: &cuda::DeviceCache, batch: usize) -> PyResult<(Room, Keep, Stream)> {
        let (sizes, device) = (cache.sizes(), cache.device().ordinal() as i32);
        let codec_len = cuda::codec_bytes(cache.codec(), cache.exact_dtype()).len();
        let mut keep = Vec::new();
        let mut stream = Stream(0);
        let mut part = |what: &str, x: Bound<'_, PyAny>, len: usize| -> PyResult<u64> {
            let tensor = OnDevice::new(what, &x)?;
            stream = tensor.stream;
            keep.push(x.unbind());
            bytes(what, &tensor, len, device)
        };
        let room = Room {
            codec: part("codec", self.codec, codec_len)?,
            counts: part("counts", self.counts, 16 * batch)?,
            table: part("table", self.table, 8 * batch * self.capacity)?,
            arrived: part("arrived", self.arrived, 4 * batch)?,
            sinks: [part("sinks", self.sinks.0, sizes.sinks[0] * batch)?, part("sinks", self.sinks.1, sizes.sinks[1] * batch)?],
            tail: [part("tail", self.tail.0, sizes.tail[0] * batch)?, part("tail", self.tail.1, sizes.tail[1] * batch)?],
            capacity: self.capacity,
        };
        Ok((room, Box::new(keep), stream))
    }
}

impl CudaLayerCache {
    fn lock(&self) -> MutexGuard<'_, cuda::DeviceCache> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn view(what: &str, x: &OnDevice<'_>, device: i32) -> PyResult<DeviceView> {
    x.check_device(what, device)?;
    let t = &x.tensor;
    let dtype = t.float(what)?;
    let wrong = || Error::shape(what, "4 dimensions [batch, heads, tokens, dim]", format!("{:?}", t.shape));
    let shape: [usize; 4] = t.shape.as_slice().try_into().map_err(|_| wrong())?;
    let strides: [isize; 4] = t.strides.as_slice().try_into().map_err(|_| wrong())?;
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
    fn page_bytes(&self) -> usize {
        self.lock().codec().layout.page_bytes()
    }

    #[getter]
    fn value_offset(&self) -> usize {
        self.lock().codec().layout.value_offset()
    }

    #[getter]
    fn kv_heads(&self) -> usize {
        self.lock().codec().heads
    }

    #[getter]
    fn exact_dtype(&self) -> &'static str {
        self.lock().exact_dtype().name()
    }

    #[getter]
    fn batch(&self) -> usize {
        self.lock().batch()
    }

    #[getter]
    fn rows(&self) -> usize {
        self.lock().rows()
    }

    #[getter]
    fn free_rows(&self) -> usize {
        self.lock().free_rows()
    }

    fn tokens(&self, sequence_index: usize) -> PyResult<usize> {
        let cache = self.lock();
        Ok(cache.tokens(sequence(&cache, sequence_index)?))
    }

    fn packed(&self, sequence_index: usize) -> PyResult<usize> {
        let cache = self.lock();
        Ok(cache.packed(sequence(&cache, sequence_index)?))
    }

    fn table(&self, sequence_index: usize) -> PyResult<Vec<(u32, u32)>> {
        let cache = self.lock();
        let b = sequence(&cache, sequence_index)?;
        Ok(cache.table(b).iter().map(|e| (e.row, e.count)).collect())
    }

    fn rows_missing(&self, tokens: usize) -> usize {
        self.lock().rows_missing(tokens)
    }

    fn capacity_missing(&self, tokens: usize) -> usize {
        self.lock().capacity_missing(tokens)
    }

    /// The codec as the device reads it.
    fn codec_bytes(&self) -> Vec<u8> {
        let cache = self.lock();
        cuda::codec_bytes(cache.codec(), cache.exact_dtype())
    }

    /// Bytes of one sequence's sinks (keys, values) and tail (keys, values).
    fn sizes(&self) -> ([usize; 2], [usize; 2]) {
        let sizes = self.lock().sizes();
        (sizes.sinks, sizes.tail)
    }

    fn pool(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        let arrays = |keep: &Keep| keep.downcast_ref::<PoolArray>().map(|p| p.0.clone_ref(py));
        self.lock().kept().into_iter().filter_map(arrays).collect()
    }

    fn add_rows(&self, pool: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut cache = self.lock();
        let x = OnDevice::new("pool", pool)?;
        x.check_device("pool", cache.device().ordinal() as i32)?;
        if x.tensor.element != Element::U8 {
            return Err(Error::dtype("pool", "uint8", "a float type").into());
        }
        let expected = [cache.codec().heads, cache.codec().layout.page_bytes()];
        if x.tensor.shape.len() != 3 || x.tensor.shape[1..] != expected {
            let expected = format!("[rows, {}, {}]", expected[0], expected[1]);
            return Err(Error::shape("pool", expected, format!("{:?}", x.tensor.shape)).into());
        }
        x.tensor.check_output("pool", &x.tensor.shape.clone())?;
        if !x.address().is_multiple_of(128) {
            return Err(Error::memory("pool", "memory aligned to 128 bytes", format!("address {:#x}", x.address())).into());
        }
        // SAFETY: checked above; `PoolArray` keeps the array alive.
        unsafe { cache.add_rows(x.address(), x.tensor.shape[0], Box::new(PoolArray(pool.clone().unbind()))) };
        Ok(())
    }

    /// Moves to another room, with what the cache holds.
    fn set_room(&self, room: RoomArgument<'_>) -> PyResult<()> {
        let mut cache = self.lock();
        let from: Vec<usize> = (0..cache.batch()).collect();
        let (room, keep, stream) = room.check(&cache, from.len())?;
        // SAFETY: `check` made sure of sizes and device; `keep` holds the tensors.
        unsafe { cache.move_to(room, keep, &from, stream)? };
        Ok(())
    }

    fn append(&self, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut cache = self.lock();
        let device = cache.device().ordinal() as i32;
        let (k, v) = (OnDevice::new("k", k)?, OnDevice::new("v", v)?);
        // SAFETY: borrowed tensors of this device; asynchronous as any launch on their stream.
        unsafe { cache.append(&view("k", &k, device)?, &view("v", &v, device)?, k.stream)? };
        Ok(())
    }

    /// Reserves what appending `tokens` takes; `like` gives the stream.
    fn reserve(&self, tokens: usize, like: &Bound<'_, PyAny>) -> PyResult<()> {
        let stream = OnDevice::new("like", like)?.stream;
        Ok(self.lock().reserve(tokens, stream)?)
    }

    fn advance(&self, tokens: usize) {
        self.lock().advance(tokens);
    }

    /// Tokens from `start` on of every sequence into `[batch, heads, tokens, dim]`; zeros past a sequence's end.
    fn read(&self, start: usize, k_out: &Bound<'_, PyAny>, v_out: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut cache = self.lock();
        let (k, v) = (OnDevice::new("k_out", k_out)?, OnDevice::new("v_out", v_out)?);
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

    fn remove_newest(&self, tokens: usize) -> PyResult<()> {
        let mut cache = self.lock();
        if let Some(short) = (0..cache.batch()).map(|b| cache.tokens(b)).find(|&t| t < tokens) {
            return Err(Error::value("tokens to remove", format!("at most {short} (the tokens held)"), tokens).into());
        }
        let lengths: Vec<usize> = (0..cache.batch()).map(|b| cache.tokens(b) - tokens).collect();
        Ok(cache.crop(&lengths)?)
    }

    fn crop(&self, lengths: Vec<usize>) -> PyResult<()> {
        Ok(self.lock().crop(&lengths)?)
    }

    fn select(&self, indices: Vec<usize>, room: RoomArgument<'_>) -> PyResult<()> {
        let mut cache = self.lock();
        let (room, keep, stream) = room.check(&cache, indices.len())?;
        // SAFETY: as in `set_room`.
        unsafe { cache.select(&indices, room, keep, stream)? };
        Ok(())
    }

    fn fork(&self, indices: Vec<usize>, room: RoomArgument<'_>) -> PyResult<Self> {
        let mut cache = self.lock();
        let (room, keep, stream) = room.check(&cache, indices.len())?;
        // SAFETY: as in `set_room`.
        let copy = unsafe { cache.fork(&indices, room, keep, stream)? };
        Ok(Self { inner: Mutex::new(copy) })
    }

    fn reset(&self) {
        self.lock().reset();
    }

    /// Rows that [`CudaLayerCache::to_host`] takes.
    fn named_rows(&self) -> usize {
        self.lock().named_rows()
    }

    /// The same cache in host memory, its pages in `pool`; `like` gives the stream, which is waited for.
    fn to_host(&self, py: Python<'_>, pool: &Bound<'_, PyAny>, like: &Bound<'_, PyAny>) -> PyResult<LayerCache> {
        let stream = OnDevice::new("like", like)?.stream;
        let mut cache = self.lock();
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
        let mut cache = self.lock();
        let cache = &mut *cache;
        Ok(py.detach(|| cache.fill(&host, stream))?)
    }

    fn memory(&self) -> BTreeMap<&'static str, usize> {
        let m = self.lock().memory();
        BTreeMap::from([("codes", m.codes), ("scales", m.scales), ("tail", m.tail), ("sinks", m.sinks), ("total", m.total())])
    }
}
