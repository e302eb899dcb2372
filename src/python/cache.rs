//! `_core.LayerCache`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::borrow::{Borrowed, output_bytes};
use crate::attention::{self, Queries};
use crate::cache;
use crate::dlpack::Element;
use crate::error::Error;
use crate::scheme::Scheme;
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// One layer's cache. See `nqkv_rs.LayerCache`.
#[pyclass(frozen, module = "nqkv_rs._core")]
pub(super) struct LayerCache {
    inner: Mutex<cache::LayerCache>,
}

/// A pool array, and the capsule that borrows its memory.
struct PoolArray {
    /// First, so that it is given back before the memory is.
    _held: Held,
    array: Py<PyAny>,
    _capsule: Py<PyAny>,
}

/// Memory of all pools, first byte to end: given twice, rows would be written over each other.
static HELD: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// An entry of [`HELD`], for as long as it lives.
struct Held(usize);

impl Held {
    fn new(first: usize, bytes: usize) -> Result<Self, Error> {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        let end = first + bytes;
        if held.range(..end).next_back().is_some_and(|(_, &other_end)| other_end > first) {
            return Err(Error::value("pool", "memory that no cache holds", "memory that overlaps what one holds"));
        }
        if bytes > 0 {
            held.insert(first, end);
        }
        Ok(Self(if bytes > 0 { first } else { 0 }))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

impl LayerCache {
    pub(super) fn of(inner: cache::LayerCache) -> Self {
        Self { inner: Mutex::new(inner) }
    }

    /// See `cache::LayerCache::fork`.
    pub(super) fn fork_inner(&self, py: Python<'_>) -> cache::LayerCache {
        self.look(py).fork()
    }

    /// For threads without the GIL.
    fn lock(&self) -> MutexGuard<'_, cache::LayerCache> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For threads with the GIL, which is given up while another thread is in a call. No Python code may run under it.
    fn look(&self, py: Python<'_>) -> MutexGuard<'_, cache::LayerCache> {
        self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    /// A change that may drop the last row of a pool: without the GIL, so that the array's finalizers run after it.
    fn change<T: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut cache::LayerCache) -> T + Send) -> T {
        py.detach(|| f(&mut self.lock()))
    }
}

fn sequence(cache: &cache::LayerCache, b: usize) -> PyResult<usize> {
    if b < cache.batch() {
        return Ok(b);
    }
    Err(Error::value("sequence", format!("0 to {}", cache.batch().saturating_sub(1)), b).into())
}

/// KV heads and page bytes, what a pool has besides rows.
pub(super) fn page_shape(codec: &PageCodec) -> [usize; 2] {
    [codec.heads, codec.layout.page_bytes()]
}

/// Memory for rows: `[rows, kv_heads, page_bytes]`, uint8, contiguous, writable.
pub(super) fn pool_memory(expected: [usize; 2], pool: &Bound<'_, PyAny>) -> PyResult<(*mut u8, usize, cache::Keep)> {
    let memory = Borrowed::new("pool", pool)?;
    let t = &memory.tensor;
    if t.element != Element::U8 {
        return Err(Error::dtype("pool", "uint8", "a float type").into());
    }
    if t.shape.len() != 3 || t.shape[1..] != expected {
        let expected = format!("[rows, {}, {}]", expected[0], expected[1]);
        return Err(Error::shape("pool", expected, format!("{:?}", t.shape)).into());
    }
    t.check_output("pool", &t.shape.clone())?;
    let (data, rows) = (t.data, t.shape[0]);
    if u32::try_from(rows).is_err() {
        return Err(Error::shape("pool", "fewer than 2^32 rows", rows).into());
    }
    let held = Held::new(data as usize, t.len())?;
    let keep = PoolArray { _held: held, array: pool.clone().unbind(), _capsule: memory.capsule.unbind() };
    Ok((data, rows, Box::new(keep)))
}

#[pymethods]
impl LayerCache {
    #[new]
    #[pyo3(signature = (scheme, kv_heads, key_dim, value_dim, exact_dtype, batch))]
    fn new(scheme: &str, kv_heads: usize, key_dim: usize, value_dim: usize, exact_dtype: &str, batch: usize) -> PyResult<Self> {
        let codec = PageCodec::new(&Scheme::from_json(scheme)?, kv_heads, key_dim, value_dim)?;
        Ok(Self::of(cache::LayerCache::new(Arc::new(codec), Dtype::parse(exact_dtype)?, batch)))
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

    fn table(&self, py: Python<'_>, sequence_index: usize) -> PyResult<Vec<(u32, u32)>> {
        let cache = self.look(py);
        let b = sequence(&cache, sequence_index)?;
        Ok(cache.table(b).iter().map(|e| (e.row, e.count)).collect())
    }

    fn rows_missing(&self, py: Python<'_>, tokens: usize) -> usize {
        self.look(py).rows_missing(tokens)
    }

    fn pool(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        let arrays = |keep: &cache::Keep| keep.downcast_ref::<PoolArray>().map(|p| p.array.clone_ref(py));
        self.look(py).kept().into_iter().filter_map(arrays).collect()
    }

    #[pyo3(signature = (pool, at_least=0))]
    fn add_rows(&self, pool: &Bound<'_, PyAny>, at_least: usize) -> PyResult<()> {
        let expected = page_shape(self.look(pool.py()).codec());
        let (data, rows, keep) = pool_memory(expected, pool)?;
        if rows < at_least {
            return Err(Error::shape("pool", format!("at least {at_least} rows"), format!("{rows} rows")).into());
        }
        // SAFETY: `pool_memory` checked it; the capsule in `keep` keeps it alive.
        unsafe { self.look(pool.py()).add_rows(data, rows, keep) };
        Ok(())
    }

    fn check_append(&self, py: Python<'_>, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>) -> PyResult<()> {
        let (k, v) = (Borrowed::new("k", k)?, Borrowed::new("v", v)?);
        let views = (k.view("k")?, v.view("v")?);
        py.detach(|| self.lock().check_append(&views.0, &views.1))?;
        Ok(())
    }

    fn append(&self, py: Python<'_>, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>) -> PyResult<()> {
        let (k, v) = (Borrowed::new("k", k)?, Borrowed::new("v", v)?);
        let views = (k.view("k")?, v.view("v")?);
        py.detach(|| self.lock().append(&views.0, &views.1))?;
        Ok(())
    }

    /// Appends and returns 0; or, of arguments that are right, how many rows are missing, having done nothing.
    fn try_append(&self, py: Python<'_>, k: &Bound<'_, PyAny>, v: &Bound<'_, PyAny>) -> PyResult<usize> {
        let (k, v) = (Borrowed::new("k", k)?, Borrowed::new("v", v)?);
        let views = (k.view("k")?, v.view("v")?);
        match py.detach(|| self.lock().append(&views.0, &views.1)) {
            Ok(()) => Ok(0),
            Err(Error::Exhausted { needed, free }) => Ok(needed - free),
            Err(other) => Err(other.into()),
        }
    }

    #[pyo3(signature = (q, out, scale, *, starts=None, fresh_k=None, fresh_v=None, window=None, soft_cap=None, lse=None))]
    #[expect(clippy::too_many_arguments, reason = "the signature is the Python one")]
    fn attend(
        &self,
        py: Python<'_>,
        q: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        scale: f64,
        starts: Option<Vec<usize>>,
        fresh_k: Option<&Bound<'_, PyAny>>,
        fresh_v: Option<&Bound<'_, PyAny>>,
        window: Option<usize>,
        soft_cap: Option<f64>,
        lse: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(u64, u64)> {
        let (q, out) = (Borrowed::new("q", q)?, Borrowed::new("out", out)?);
        let (fresh_k, fresh_v) = (Borrowed::optional("fresh_k", fresh_k)?, Borrowed::optional("fresh_v", fresh_v)?);
        let lse = Borrowed::optional("lse", lse)?;
        let fresh = match (&fresh_k, &fresh_v) {
            (Some(k), Some(v)) => Some((k.view("fresh_k")?, v.view("fresh_v")?)),
            (None, None) => None,
            _ => return Err(Error::value("fresh_k and fresh_v", "both or neither", "one of them").into()),
        };
        let queries = Queries { q: q.view("q")?, scale, starts: starts.as_deref(), fresh, window, soft_cap };
        let [batch, heads, rows, _] = queries.q.shape();
        let value_dim = {
            let cache = self.look(py);
            // Refused again when it is attended; before that, nothing is allocated for more than there can be.
            let held = (0..cache.batch()).map(|b| cache.tokens(b)).min().unwrap_or(0);
            if rows > held && batch > 0 {
                let expected = format!("at most {held} (the tokens held, queries included)");
                return Err(Error::value("queries", expected, rows).into());
            }
            cache.codec().value.layout.dim
        };
        out.tensor.check_output("out", &[batch, rows, heads, value_dim])?;
        let dtype = out.tensor.float("out")?;
        if let Some(lse) = &lse {
            lse.tensor.check_output("lse", &[batch, rows, heads])?;
            if lse.tensor.float("lse")? != Dtype::F32 {
                return Err(Error::dtype("lse", "float32", "another float type").into());
            }
        }
        let target = (out.tensor.data as usize, out.tensor.len());
        let lse = lse.as_ref().map(|l| (l.tensor.data as usize, l.tensor.len()));
        let count = py.detach(|| -> Result<_, Error> {
            let cache = self.lock();
            // SAFETY: `check_output` made sure of a writable, contiguous tensor of this length; capsules keep it alive.
            let bytes = unsafe { output_bytes(target.0, target.1 * dtype.bytes()) };
            let mut lse_values = lse.map(|(_, n)| vec![0f32; n]);
            let count = if queries.q.dtype() == Dtype::F64 {
                let mut result = vec![0f64; target.1];
                let mut wide = lse.map(|(_, n)| vec![0f64; n]);
                let count = attention::attend_f64(&cache, &queries, &mut result, wide.as_deref_mut())?;
                bytes.chunks_exact_mut(dtype.bytes()).zip(&result).for_each(|(b, &x)| dtype.write(b, x));
                lse_values = wide.map(|w| w.into_iter().map(|x| x as f32).collect());
                count
            } else {
                let mut result = vec![0f32; target.1];
                let count = attention::attend(&cache, &queries, &mut result, lse_values.as_deref_mut())?;
                dtype.write_f32(bytes, &result);
                count
            };
            if let (Some((at, n)), Some(values)) = (lse, lse_values) {
                // SAFETY: as for `out`.
                let bytes = unsafe { output_bytes(at, n * 4) };
                bytes.chunks_exact_mut(4).zip(values).for_each(|(b, x)| b.copy_from_slice(&x.to_le_bytes()));
            }
            Ok(count)
        })?;
        Ok((count.attended, count.packed))
    }

    #[pyo3(signature = (sequence_index, start, k_out, v_out))]
    fn read(
        &self,
        py: Python<'_>,
        sequence_index: usize,
        start: usize,
        k_out: &Bound<'_, PyAny>,
        v_out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (k, v) = (Borrowed::new("k_out", k_out)?, Borrowed::new("v_out", v_out)?);
        let tokens = *k.tensor.shape.get(1).unwrap_or(&0);
        let (heads, kd, vd) = {
            let cache = self.look(py);
            let held = cache.tokens(sequence(&cache, sequence_index)?);
            if start > held {
                return Err(Error::value("start", format!("0 to {held} (the tokens held)"), start).into());
            }
            // Another thread may crop meanwhile: this is for what is allocated below, and checked again.
            if tokens > held - start {
                let got = format!("{start}..{}", start.saturating_add(tokens));
                return Err(Error::value("token range", format!("inside 0..{held}"), got).into());
            }
            (cache.codec().heads, cache.codec().key.layout.dim, cache.codec().value.layout.dim)
        };
        k.tensor.check_output("k_out", &[heads, tokens, kd])?;
        v.tensor.check_output("v_out", &[heads, tokens, vd])?;
        let (dtype, other) = (k.tensor.float("k_out")?, v.tensor.float("v_out")?);
        let targets = [(k.tensor.data as usize, k.tensor.len(), dtype), (v.tensor.data as usize, v.tensor.len(), other)];
        py.detach(|| -> Result<(), Error> {
            let (mut k, mut v) = (vec![0f32; targets[0].1], vec![0f32; targets[1].1]);
            let cache = self.lock();
            if sequence_index >= cache.batch() {
                return Err(Error::value("sequence", "one that is still there", sequence_index));
            }
            cache.read(sequence_index, start, tokens, &mut k, &mut v)?;
            drop(cache);
            for ((at, n, dtype), values) in targets.into_iter().zip([k, v]) {
                // SAFETY: `check_output` made sure of a writable, contiguous tensor; capsules keep it alive.
                let bytes = unsafe { output_bytes(at, n * dtype.bytes()) };
                dtype.write_f32(bytes, &values);
            }
            Ok(())
        })?;
        Ok(())
    }

    fn remove_newest(&self, py: Python<'_>, tokens: usize) -> PyResult<()> {
        Ok(self.change(py, |c| c.remove_newest(tokens))?)
    }

    fn select(&self, py: Python<'_>, indices: Vec<usize>) -> PyResult<()> {
        Ok(self.change(py, |c| c.select(&indices))?)
    }

    fn crop(&self, py: Python<'_>, lengths: Vec<usize>) -> PyResult<()> {
        Ok(self.change(py, |c| c.crop(&lengths))?)
    }

    fn fork(&self, py: Python<'_>) -> Self {
        Self::of(self.fork_inner(py))
    }

    #[staticmethod]
    fn join(py: Python<'_>, parts: Vec<PyRef<'_, Self>>) -> PyResult<Self> {
        // Forked one by one: the same cache may stand here twice, and no two locks are held at once.
        let forks: Vec<cache::LayerCache> = parts.iter().map(|p| p.fork_inner(py)).collect();
        Ok(Self::of(cache::LayerCache::join(&forks.iter().collect::<Vec<_>>())?))
    }

    fn reset(&self, py: Python<'_>) {
        self.change(py, cache::LayerCache::reset);
    }

    fn memory(&self, py: Python<'_>) -> BTreeMap<&'static str, usize> {
        let m = self.look(py).memory();
        BTreeMap::from([("codes", m.codes), ("scales", m.scales), ("tail", m.tail), ("sinks", m.sinks), ("total", m.total())])
    }
}
