//! Tensors on CUDA devices, borrowed for the length of a call, and the stream to work on.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyType};

use crate::cuda::Stream;
use crate::dlpack::{CUDA, DlExchangeApi, DlManagedTensor, DlManagedTensorVersioned, DlTensor, TensorRef};
use crate::error::Error;

/// A tensor on a CUDA device.
pub(super) struct OnDevice<'py> {
    pub(super) tensor: TensorRef,
    /// The producer's current stream; the legacy default stream if it does not say.
    pub(super) stream: Stream,
    _capsule: Option<Bound<'py, PyAny>>,
}

/// A producer's table, by type. Types and tables live for the process.
struct Table(usize, *const DlExchangeApi);
// SAFETY: the table is constant.
unsafe impl Send for Table {}
static TABLES: Mutex<Vec<Table>> = Mutex::new(Vec::new());
/// The first of them whose type has a table, for a look without the lock.
static FIRST: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// What a tensor's type offers to C code: PyTorch from 2.11 on.
fn exchange(object: &Bound<'_, PyAny>) -> Option<*const DlExchangeApi> {
    let key = object.get_type_ptr() as usize;
    if FIRST[0].load(Ordering::Acquire) == key {
        return Some(FIRST[1].load(Ordering::Relaxed) as *const DlExchangeApi);
    }
    let known = |tables: &[Table]| tables.iter().find(|t| t.0 == key).map(|t| t.1);
    let lock = || TABLES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(api) = known(&lock()) {
        return (!api.is_null()).then_some(api);
    }
    // Not under the lock: this runs Python.
    let kind = object.get_type();
    let found = look_up(&kind).unwrap_or(std::ptr::null());
    let mut tables = lock();
    if known(&tables).is_none() {
        tables.push(Table(key, found));
        if !found.is_null() && FIRST[0].load(Ordering::Relaxed) == 0 {
            FIRST[1].store(found.expose_provenance(), Ordering::Relaxed);
            FIRST[0].store(key, Ordering::Release);
        }
        // The type lives on, so that its address is nobody else's.
        std::mem::forget(kind.unbind());
    }
    (!found.is_null()).then_some(found)
}

fn look_up(kind: &Bound<'_, PyType>) -> Option<*const DlExchangeApi> {
    let capsule = kind.getattr("__dlpack_c_exchange_api__").ok()?;
    let pointer = capsule.cast::<PyCapsule>().ok()?.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
    let mut api = pointer.as_ptr().cast::<DlExchangeApi>().cast_const();
    // SAFETY: the capsule's name says what it points to; older tables hang behind newer ones.
    unsafe {
        while !api.is_null() && (*api).major != 1 {
            api = (*api).previous;
        }
        (!api.is_null() && (*api).borrow.is_some() && (*api).stream.is_some()).then_some(api)
    }
}

impl<'py> OnDevice<'py> {
    pub(super) fn new(what: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Self::borrow(what, object, true)
    }

    /// For a call whose stream another tensor gives: `stream` means nothing.
    pub(super) fn beside(what: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        Self::borrow(what, object, false)
    }

    fn borrow(what: &str, object: &Bound<'py, PyAny>, with_stream: bool) -> PyResult<Self> {
        if let Some(api) = exchange(object) {
            let mut tensor = MaybeUninit::<DlTensor>::uninit();
            // SAFETY: `look_up` checked version and functions; the object is of the type that offered them.
            let (tensor, stream) = unsafe {
                let (borrow, stream) = ((*api).borrow.expect("checked"), (*api).stream.expect("checked"));
                if borrow(object.as_ptr().cast::<c_void>(), tensor.as_mut_ptr()) != 0 {
                    return Err(PyErr::fetch(object.py()));
                }
                let tensor = TensorRef::on(CUDA, what, tensor.assume_init_ref(), false)?;
                let mut handle = std::ptr::null_mut();
                if with_stream && stream(CUDA, tensor.device, &raw mut handle) != 0 {
                    return Err(PyErr::fetch(object.py()));
                }
                (tensor, Stream(handle as usize))
            };
            return Ok(Self { tensor, stream, _capsule: None });
        }
        if !object.hasattr("__dlpack__")? {
            let name = object.get_type().name()?;
            return Err(PyTypeError::new_err(format!(
                "{what}: expected an array on a CUDA device (with __dlpack__), got {name}"
            )));
        }
        let (kind, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
        if kind != CUDA {
            let got = format!("one on DLPack device type {kind}");
            return Err(Error::memory(what, "an array on a CUDA device", got).into());
        }
        // The producer makes the legacy default stream wait for its work, and we launch there.
        let words = PyDict::new(object.py());
        words.set_item("stream", 1)?;
        words.set_item("max_version", (1, 0))?;
        let capsule = object.call_method("__dlpack__", (), Some(&words)).or_else(|e| {
            if !e.is_instance_of::<PyTypeError>(object.py()) {
                return Err(e);
            }
            words.del_item("max_version")?;
            object.call_method("__dlpack__", (), Some(&words))
        })?;
        let handle = capsule.cast::<PyCapsule>().map_err(|_| Error::memory(what, "a DLPack capsule", "another object"))?;
        let tensor = if let Ok(pointer) = handle.pointer_checked(Some(c"dltensor_versioned")) {
            // SAFETY: a capsule of this name holds a live DLManagedTensorVersioned.
            let managed = unsafe { pointer.cast::<DlManagedTensorVersioned>().as_ref() };
            if managed.major != 1 {
                let got = format!("{}.{}", managed.major, managed.minor);
                return Err(Error::value(format!("{what}: DLPack version"), "1.x", got).into());
            }
            // SAFETY: version 1 has this layout.
            unsafe { TensorRef::on(CUDA, what, &managed.tensor, managed.flags & 1 != 0)? }
        } else if let Ok(pointer) = handle.pointer_checked(Some(c"dltensor")) {
            // SAFETY: as above, for the unversioned form.
            unsafe { TensorRef::on(CUDA, what, &pointer.cast::<DlManagedTensor>().as_ref().tensor, false)? }
        } else {
            return Err(Error::memory(what, "an unused DLPack capsule", "another capsule").into());
        };
        Ok(Self { tensor, stream: Stream(1), _capsule: Some(capsule) })
    }

    /// Refuses a tensor on another device than `device`.
    pub(super) fn check_device(&self, what: &str, device: i32) -> PyResult<()> {
        if self.tensor.device == device {
            return Ok(());
        }
        Err(Error::memory(what, format!("a tensor on CUDA device {device}"), format!("one on device {}", self.tensor.device))
            .into())
    }

    pub(super) fn address(&self) -> u64 {
        self.tensor.data as u64
    }
}
