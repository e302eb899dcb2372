//! DLPack's C structs (1.x and the older unversioned form) and what this crate reads of them. No Python here.

use std::ffi::c_void;

use crate::error::{Error, Result};
use crate::tensor::{Dtype, View};

/// `DLDevice`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DlDevice {
    /// 1 is host memory.
    pub kind: i32,
    /// Ordinal.
    pub id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DlDataType {
    /// 0 int, 1 uint, 2 float, 4 bfloat, ...
    pub code: u8,
    /// Bits of an element.
    pub bits: u8,
    /// Vector lanes.
    pub lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
#[derive(Debug)]
pub struct DlTensor {
    /// Start of the memory.
    pub data: *mut c_void,
    /// Where the memory is.
    pub device: DlDevice,
    /// Dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: DlDataType,
    /// `ndim` extents.
    pub shape: *const i64,
    /// `ndim` strides in elements; NULL: row-major without gaps.
    pub strides: *const i64,
    /// First element, in bytes from `data`.
    pub byte_offset: u64,
}

/// `DLManagedTensor`, before DLPack 1.0.
#[repr(C)]
#[derive(Debug)]
pub struct DlManagedTensor {
    /// The tensor.
    pub tensor: DlTensor,
    manager: *mut c_void,
    deleter: *mut c_void,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
#[derive(Debug)]
pub struct DlManagedTensorVersioned {
    /// Major version: with another than 1, nothing else may be read.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    manager: *mut c_void,
    deleter: *mut c_void,
    /// Bit 0: read only.
    pub flags: u64,
    /// The tensor.
    pub tensor: DlTensor,
}

/// `DLPackExchangeAPI`, what a producer offers to C code (DLPack 1.3): no capsule, no Python call.
#[repr(C)]
#[derive(Debug)]
pub struct DlExchangeApi {
    /// Major version: 1 is what is written here.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    /// An older one, or NULL.
    pub previous: *const DlExchangeApi,
    allocator: *mut c_void,
    to_managed: *mut c_void,
    from_managed: *mut c_void,
    /// Describes a Python tensor; 0, or -1 with a Python exception set. Its arrays are the tensor's, for the length of a call.
    pub borrow: Option<unsafe extern "C" fn(object: *mut c_void, out: *mut DlTensor) -> i32>,
    /// The stream on which the producer works now on a device; 0 or -1.
    pub stream: Option<unsafe extern "C" fn(kind: i32, id: i32, out: *mut *mut c_void) -> i32>,
}

/// Element type of a foreign tensor, as far as this crate takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// A float.
    Float(Dtype),
    /// Bytes.
    U8,
}

/// A checked description of a foreign host tensor.
#[derive(Debug, Clone)]
pub struct TensorRef {
    /// First element.
    pub data: *mut u8,
    /// Element type.
    pub element: Element,
    /// Shape.
    pub shape: Vec<usize>,
    /// Strides in elements.
    pub strides: Vec<isize>,
    /// Whether the producer forbids writing.
    pub read_only: bool,
    /// Ordinal of the device; 0 for host memory.
    pub device: i32,
}

/// DLPack's number of host memory.
pub const HOST: i32 = 1;
/// DLPack's number of CUDA devices.
pub const CUDA: i32 = 2;

impl TensorRef {
    /// Reads and checks a `DLTensor` in host memory.
    ///
    /// # Safety
    /// `tensor` must be a live `DLTensor` whose shape and strides arrays have `ndim` entries (or NULL strides).
    pub unsafe fn new(what: &str, tensor: &DlTensor, read_only: bool) -> Result<Self> {
        // SAFETY: the caller's promise.
        unsafe { Self::on(HOST, what, tensor, read_only) }
    }

    /// Reads and checks a `DLTensor` on a device of this kind.
    ///
    /// # Safety
    /// As for [`TensorRef::new`].
    pub unsafe fn on(kind: i32, what: &str, tensor: &DlTensor, read_only: bool) -> Result<Self> {
        if tensor.device.kind != kind {
            let expected = if kind == HOST { "a tensor in host memory" } else { "a tensor on a CUDA device" };
            let got = format!("a tensor on device type {} (id {})", tensor.device.kind, tensor.device.id);
            return Err(Error::memory(what, format!("{expected} (DLPack device type {kind})"), got));
        }
        if tensor.dtype.lanes != 1 {
            return Err(Error::dtype(what, "one lane per element", format!("{} lanes", tensor.dtype.lanes)));
        }
        let element = match (tensor.dtype.code, tensor.dtype.bits) {
            (2, 64) => Element::Float(Dtype::F64),
            (2, 32) => Element::Float(Dtype::F32),
            (2, 16) => Element::Float(Dtype::F16),
            (4, 16) => Element::Float(Dtype::Bf16),
            (1, 8) => Element::U8,
            (code, bits) => {
                let kind = match code {
                    0 => "int",
                    1 => "uint",
                    2 => "float",
                    4 => "bfloat",
                    5 => "complex",
                    6 => "bool",
                    _ => "DLPack type code ",
                };
                let name = if code > 6 { format!("{kind}{code} of {bits} bits") } else { format!("{kind}{bits}") };
                return Err(Error::dtype(what, "float64, float32, float16, bfloat16 (or uint8 for codes)", name));
            }
        };
        let ndim = usize::try_from(tensor.ndim).ok().filter(|&n| n <= 64);
        let Some(ndim) = ndim.filter(|&n| n == 0 || !tensor.shape.is_null()) else {
            return Err(Error::shape(what, "0 to 64 dimensions with a shape array", tensor.ndim));
        };
        // SAFETY: the caller promises `ndim` entries; a NULL shape was refused above (an empty slice needs none).
        let shape = if ndim == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(tensor.shape, ndim) } };
        let size = match element {
            Element::Float(d) => d.bytes() as i128,
            Element::U8 => 1,
        };
        // No product of extents, and no reach of strides, may leave the address space.
        let elements: Option<i128> =
            shape.iter().try_fold(1i128, |n, &s| (s >= 0).then(|| n * i128::from(s)).filter(|&n| n * size <= isize::MAX as i128));
        let Some(elements) = elements else {
            return Err(Error::shape(what, "non-negative extents that fit in memory", format!("{shape:?}")));
        };
        let strides: Vec<isize> = if tensor.strides.is_null() {
            let mut strides = vec![1isize; ndim];
            for i in (1..ndim).rev() {
                strides[i - 1] = strides[i].saturating_mul(shape[i].max(1) as isize);
            }
            strides
        } else {
            // SAFETY: not NULL: `ndim` entries, as the caller promises.
            unsafe { std::slice::from_raw_parts(tensor.strides, ndim) }.iter().map(|&s| s as isize).collect()
        };
        if elements > 0 {
            let (mut low, mut high) = (0i128, 0i128);
            for (&s, &stride) in shape.iter().zip(&strides) {
                let reach = (i128::from(s) - 1) * stride as i128 * size;
                if reach < 0 { low += reach } else { high += reach }
            }
            let address = tensor.data as i128 + i128::from(tensor.byte_offset);
            // No user's addresses reach 2^56 on the machines that we run on.
            if tensor.data.is_null() || address + low < 0 || address + high + size > 1 << 56 {
                let got = format!("shape {shape:?}, strides {strides:?}, data {:?}", tensor.data);
                return Err(Error::memory(what, "elements inside the address space", got));
            }
        }
        let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        Ok(Self {
            data,
            element,
            shape: shape.iter().map(|&s| s as usize).collect(),
            strides,
            read_only,
            device: tensor.device.id,
        })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type, refusing bytes.
    pub fn float(&self, what: &str) -> Result<Dtype> {
        match self.element {
            Element::Float(d) => Ok(d),
            Element::U8 => Err(Error::dtype(what, "float64, float32, float16 or bfloat16", "uint8")),
        }
    }

    /// Refuses anything that is not row-major without gaps.
    pub fn check_contiguous(&self, what: &str) -> Result<()> {
        // Strides of an empty tensor mean nothing; NumPy exports zeros.
        if self.is_empty() {
            return Ok(());
        }
        let mut expected = 1isize;
        for (&s, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if s > 1 && stride != expected {
                let got = format!("shape {:?} with strides {:?}", self.shape, self.strides);
                return Err(Error::memory(what, "a contiguous (row-major) tensor", got));
            }
            expected = expected.saturating_mul(s as isize);
        }
        Ok(())
    }

    /// Refuses a tensor that cannot be an output of `shape`.
    pub fn check_output(&self, what: &str, shape: &[usize]) -> Result<()> {
        if self.shape != shape {
            return Err(Error::shape(what, format!("{shape:?}"), format!("{:?}", self.shape)));
        }
        self.check_writable(what)
    }

    /// Refuses a tensor that cannot be written to, from its first element to its last.
    pub fn check_writable(&self, what: &str) -> Result<()> {
        if self.read_only {
            return Err(Error::memory(what, "a writable tensor", "a read-only one"));
        }
        self.check_contiguous(what)
    }

    /// A `[batch, heads, tokens, dim]` view.
    ///
    /// # Safety
    /// The memory must stay alive and unwritten while the view is used.
    pub unsafe fn view(&self, what: &str) -> Result<View> {
        let dtype = self.float(what)?;
        let shape: [usize; 4] = self
            .shape
            .as_slice()
            .try_into()
            .map_err(|_| Error::shape(what, "4 dimensions [batch, heads, tokens, dim]", format!("{:?}", self.shape)))?;
        let strides = [self.strides[0], self.strides[1], self.strides[2], self.strides[3]];
        // SAFETY: `new` checked that every element lies in the address space; the producer vouches for the memory and the
        // caller for its lifetime.
        Ok(unsafe { View::new(self.data, dtype, shape, strides) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(shape: &[i64], strides: Option<&[i64]>, code: u8, bits: u8, device: i32) -> Result<TensorRef> {
        let mut memory = [0u64; 64];
        let tensor = DlTensor {
            data: memory.as_mut_ptr().cast(),
            device: DlDevice { kind: device, id: 0 },
            ndim: shape.len() as i32,
            dtype: DlDataType { code, bits, lanes: 1 },
            shape: shape.as_ptr(),
            strides: strides.map_or(std::ptr::null(), <[i64]>::as_ptr),
            byte_offset: 8,
        };
        // SAFETY: the arrays live until the end of this function, and nothing reads the elements.
        unsafe { TensorRef::new("x", &tensor, false) }
    }

    #[test]
    fn null_strides_mean_contiguous() {
        let t = describe(&[2, 3, 4], None, 2, 32, 1).unwrap();
        assert_eq!(t.strides, [12, 4, 1]);
        assert!(t.check_contiguous("x").is_ok());
    }

    #[test]
    fn hostile_descriptions_are_refused() {
        let refused = |r: Result<TensorRef>| r.unwrap_err().to_string();
        assert!(refused(describe(&[-1, 4], None, 2, 32, 1)).contains("non-negative"));
        assert!(refused(describe(&[i64::MAX, i64::MAX], None, 2, 32, 1)).contains("fit in memory"));
        assert!(refused(describe(&[2, 2], Some(&[i64::MIN, 1]), 2, 32, 1)).contains("address space"));
        assert!(refused(describe(&[2, 2], Some(&[i64::MAX, 1]), 2, 32, 1)).contains("address space"));
        assert!(refused(describe(&[2], None, 0, 32, 1)).contains("int32"));
        assert!(refused(describe(&[2], None, 2, 32, 2)).contains("device type 2"));
    }
}
