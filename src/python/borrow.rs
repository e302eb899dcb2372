//! Foreign tensors, borrowed through DLPack for the length of a call.

use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use crate::dlpack::{DlManagedTensor, DlManagedTensorVersioned, Element, TensorRef};
use crate::error::Error;
use crate::tensor::{Dtype, View};

/// A tensor borrowed through DLPack for the length of a call (or as long as this value lives).
pub(super) struct Borrowed<'py> {
    /// Checked description.
    pub(super) tensor: TensorRef,
    /// Keeps the memory alive.
    pub(super) capsule: Bound<'py, PyAny>,
}

impl<'py> Borrowed<'py> {
    /// Borrows any object that has `__dlpack__`, in host memory.
    pub(super) fn new(what: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let name = || object.get_type().name().map_or_else(|_| "an object".to_owned(), |n| n.to_string());
        if !object.hasattr("__dlpack__").map_err(|e| foreign(what, &e, py, ""))? {
            let expected = "an array with __dlpack__ (NumPy, PyTorch, ...)";
            return Err(PyTypeError::new_err(format!("{what}: expected {expected}, got {}", name())));
        }
        // PyTorch raises for devices that DLPack has no number for, such as meta.
        let (kind, id): (i32, i32) = object.call_method0("__dlpack_device__").and_then(|d| d.extract()).map_err(|e| {
            match e.is_instance_of::<PyException>(py) {
                true => Error::memory(what, "a tensor in host memory", format!("one on another device: {}", e.value(py))).into(),
                false => e,
            }
        })?;
        if kind != 1 {
            let got = format!("a tensor on DLPack device type {kind} (id {id})");
            return Err(Error::memory(what, "a tensor in host memory (device type 1); this version runs on CPUs", got).into());
        }
        // PyTorch exports a lazily negated tensor without its sign.
        if object.call_method0("is_neg").and_then(|n| n.extract()).unwrap_or(false) {
            let got = format!("a lazily negated one: pass {what}.resolve_neg()");
            return Err(Error::memory(what, "a tensor whose memory holds its numbers", got).into());
        }
        // NumPy's bfloat16 is ml_dtypes', which DLPack export refuses: borrow the same bytes as float16.
        let brain = object.getattr("dtype").and_then(|d| d.getattr("name")).and_then(|n| n.extract::<String>());
        let brain = brain.is_ok_and(|n| n == "bfloat16");
        let source = match brain {
            true => object.call_method1("view", ("float16",)).map_err(|e| foreign(what, &e, py, ""))?,
            false => object.clone(),
        };
        let versioned = PyDict::new(py);
        versioned.set_item("max_version", (1, 0))?;
        let capsule = match source.call_method("__dlpack__", (), Some(&versioned)) {
            Err(e) if e.is_instance_of::<PyTypeError>(py) => source.call_method0("__dlpack__"),
            other => other,
        };
        let capsule = capsule.map_err(|e| {
            let hint = match object.getattr("requires_grad").and_then(|r| r.extract::<bool>()) {
                Ok(true) => format!("; expected a tensor that needs no gradient: pass {what}.detach()"),
                _ => String::new(),
            };
            foreign(what, &e, py, &hint)
        })?;
        let handle = capsule
            .cast::<PyCapsule>()
            .map_err(|_| PyTypeError::new_err(format!("{what}: expected __dlpack__ to return a capsule, got {}", name())))?;
        let mut tensor = if let Ok(pointer) = handle.pointer_checked(Some(c"dltensor_versioned")) {
            // SAFETY: a capsule of this name holds a live DLManagedTensorVersioned until it is renamed.
            let managed = unsafe { pointer.cast::<DlManagedTensorVersioned>().as_ref() };
            if managed.major != 1 {
                let got = format!("{}.{}", managed.major, managed.minor);
                return Err(Error::value(format!("{what}: DLPack version"), "1.x", got).into());
            }
            // SAFETY: version 1 has this layout; the producer keeps shape and strides alive with the tensor.
            // Bit 1: a copy, made for this call. What is written to it is lost, so it is as good as read only.
            unsafe { TensorRef::new(what, &managed.tensor, managed.flags & 3 != 0)? }
        } else if let Ok(pointer) = handle.pointer_checked(Some(c"dltensor")) {
            // SAFETY: as above, for the unversioned form.
            unsafe { TensorRef::new(what, &pointer.cast::<DlManagedTensor>().as_ref().tensor, false)? }
        } else {
            let expected = "an unused DLPack capsule (dltensor or dltensor_versioned)";
            return Err(PyTypeError::new_err(format!("{what}: expected {expected}, got another capsule")));
        };
        if brain {
            // Whatever else its `view` gave may be narrower than what it says it is.
            if tensor.element != Element::Float(Dtype::F16) {
                return Err(Error::dtype(what, "16-bit elements of a bfloat16 array", "another type").into());
            }
            tensor.element = Element::Float(Dtype::Bf16);
        }
        Ok(Self { tensor, capsule })
    }

    /// The same for an argument that may be None.
    pub(super) fn optional(what: &str, object: Option<&Bound<'py, PyAny>>) -> PyResult<Option<Self>> {
        object.map(|o| Self::new(what, o)).transpose()
    }

    /// A `[batch, heads, tokens, dim]` view for the length of the call.
    pub(super) fn view(&self, what: &str) -> PyResult<View> {
        // SAFETY: the capsule keeps the memory alive while `self` lives, which is longer than the call that uses the view;
        // that nobody writes meanwhile is the documented contract of every function here.
        Ok(unsafe { self.tensor.view(what)? })
    }
}

/// What a producer raised, by the argument's name. What ends a program (`KeyboardInterrupt`) stays as it is.
fn foreign(what: &str, e: &PyErr, py: Python<'_>, hint: &str) -> PyErr {
    if !e.is_instance_of::<PyException>(py) {
        return e.clone_ref(py);
    }
    let named = PyTypeError::new_err(format!("{what}: DLPack export failed: {}{hint}", e.value(py)));
    named.set_cause(py, Some(e.clone_ref(py)));
    named
}

/// The bytes of an output tensor; an empty one may have a NULL address.
///
/// # Safety
/// `len` bytes at `address` must be writable and unused by others while the slice lives.
pub(super) unsafe fn output_bytes<'a>(address: usize, len: usize) -> &'a mut [u8] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: not empty, so `TensorRef::new` refused NULL; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
}
