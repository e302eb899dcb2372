//! The driver, its devices, and launches.

use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::{DriverError, result, sys};

use super::kernels::{KERNELS, Kernel, SOURCES};
use crate::error::{Error, Result};

/// A stream of the caller's, as the driver's handle; 0 is the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub usize);

/// What the driver says, in one line: ready with its devices, or why not.
pub fn status() -> std::result::Result<usize, &'static str> {
    static STATUS: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    STATUS.get_or_init(probe).as_ref().copied().map_err(String::as_str)
}

fn probe() -> std::result::Result<usize, String> {
    // Every driver call of cudarc panics where the library cannot be opened, so look first.
    // SAFETY: opening the driver's library runs its initialisers, which is what any CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Err("no CUDA driver: libcuda.so.1 cannot be opened".into());
    }
    result::init().map_err(|e| format!("the CUDA driver does not start: {}", words(e)))?;
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(words)?;
    if version < 12_000 {
        return Err(format!(
            "the CUDA driver is too old: expected 12.0 or newer, got {}.{}",
            version / 1000,
            version % 1000 / 10
        ));
    }
    match result::device::get_count().map_err(words)? {
        n if n > 0 => Ok(n as usize),
        _ => Err("the CUDA driver finds no device".into()),
    }
}

/// The CUDA version that the driver speaks, 13.2 as (13, 2); None where there is no driver.
pub fn driver_version() -> Option<(i32, i32)> {
    // SAFETY: as in `probe`.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().ok()?;
    Some((version / 1000, version % 1000 / 10))
}

/// A driver error with its name, its number, and advice where there is some.
fn words(e: DriverError) -> String {
    let name = e.error_name().map_or("unknown error", |n| n.to_str().unwrap_or("unknown error"));
    let advice = match e.0 {
        sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => ": the driver is too old for this build, update it",
        sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | sys::CUresult::CUDA_ERROR_INVALID_PTX => {
            ": expected a device of compute capability 8.0 or newer"
        }
        _ => "",
    };
    format!("{name} ({}){advice}", e.0 as u32)
}

pub(super) fn error(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| Error::cuda(what, words(e))
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy)]
struct Function(sys::CUfunction);

/// A device with its primary context and kernels. There is one for each ordinal, made on first use and kept for ever: nothing
/// is released at exit, where the order among libraries is nobody's.
#[derive(Debug)]
pub struct Device {
    ordinal: usize,
    context: sys::CUcontext,
    capability: (i32, i32),
    processors: usize,
    shared_limit: usize,
    functions: OnceLock<Result<Vec<Function>>>,
}

// SAFETY: contexts and functions are handles that the driver lets any thread use.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// The device of an ordinal.
pub fn device(ordinal: usize) -> Result<&'static Device> {
    const MOST: usize = 64;
    static DEVICES: [OnceLock<Result<Device>>; MOST] = [const { OnceLock::new() }; MOST];
    let count = status().map_err(|why| Error::cuda("device", why))?;
    if ordinal >= count.min(MOST) {
        return Err(Error::value("device", format!("0 to {}", count.min(MOST) - 1), ordinal));
    }
    DEVICES[ordinal].get_or_init(|| Device::new(ordinal)).as_ref().map_err(Clone::clone)
}

impl Device {
    fn new(ordinal: usize) -> Result<Self> {
        let handle = result::device::get(ordinal as i32).map_err(error("device"))?;
        let attribute = |a| {
            // SAFETY: the handle is a device of this driver.
            unsafe { result::device::get_attribute(handle, a) }.map_err(error("device attribute"))
        };
        use sys::CUdevice_attribute as A;
        let capability = (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < (8, 0) {
            let got = format!("{}.{}", capability.0, capability.1);
            return Err(Error::cuda("device", format!("expected compute capability 8.0 or newer, got {got}")));
        }
        Ok(Self {
            ordinal,
            // SAFETY: a device of this driver. Never released.
            context: unsafe { result::primary_ctx::retain(handle) }.map_err(error("primary context"))?,
            capability,
            processors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            shared_limit: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            functions: OnceLock::new(),
        })
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Compute capability.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Multiprocessors.
    pub fn processors(&self) -> usize {
        self.processors
    }

    /// Bytes of shared memory that one block may have.
    pub fn shared_limit(&self) -> usize {
        self.shared_limit
    }

    /// Makes the primary context current on this thread: a fresh thread has none, and PyTorch's default stream needs it.
    pub fn bind(&self) -> Result<()> {
        let current = result::ctx::get_current().map_err(error("current context"))?;
        if current != Some(self.context) {
            // SAFETY: retained for ever.
            unsafe { result::ctx::set_current(self.context) }.map_err(error("context"))?;
        }
        Ok(())
    }

    /// Whether a CUDA graph is captured from a stream.
    pub fn is_captured(&self, stream: Stream) -> Result<bool> {
        self.bind()?;
        let mut state = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let stream = ptr::with_exposed_provenance_mut::<sys::CUstream_st>(stream.0);
        // SAFETY: the caller's stream; writes one number.
        unsafe { sys::cuStreamIsCapturing(stream, &raw mut state) }.result().map_err(error("stream"))?;
        Ok(state != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Refuses a stream from which a CUDA graph is captured.
    pub(crate) fn check_uncaptured(&self, stream: Stream, why: &str) -> Result<()> {
        if !self.is_captured(stream)? {
            return Ok(());
        }
        Err(Error::value("stream", format!("one that no CUDA graph is captured from ({why})"), "one under capture"))
    }

    /// Loads all kernels now, so that no later call has to: the driver compiles PTX when it first loads it.
    pub fn warm_up(&self) -> Result<()> {
        self.functions().map(drop)
    }

    fn functions(&self) -> Result<&[Function]> {
        self.functions.get_or_init(|| self.load()).as_ref().map(Vec::as_slice).map_err(Clone::clone)
    }

    fn load(&self) -> Result<Vec<Function>> {
        self.bind()?;
        let mut modules = Vec::new();
        for source in &SOURCES {
            let image = CString::new(source.ptx).map_err(|_| Error::cuda(source.name, "expected PTX without a NUL"))?;
            // SAFETY: NUL-terminated PTX.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
            modules.push(module.map_err(|e| Error::cuda(format!("loading {}", source.name), words(e)))?);
        }
        let mut functions = Vec::new();
        for kernel in KERNELS {
            let name = CString::new(kernel.name()).expect("names have no NUL");
            // SAFETY: a module that was loaded in the current context, and is never unloaded.
            let function = unsafe { result::module::get_function(modules[kernel.source()], name) };
            let function = function.map_err(|e| Error::cuda(format!("kernel {}", kernel.name()), words(e)))?;
            let shared = kernel.shared_bytes().min(self.shared_limit - 1024);
            if shared > 48 << 10 {
                let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: a loaded function.
                unsafe { result::function::set_function_attribute(function, limit, shared as i32) }
                    .map_err(error("shared memory of a kernel"))?;
            }
            functions.push(Function(function));
        }
        Ok(functions)
    }

    /// Launches a kernel on `stream`. `arguments` are copied before this returns.
    ///
    /// # Safety
    /// Every element of `arguments` points to what the kernel's parameter at its place is, and pointers among them to memory
    /// of this device that is as large as the kernel takes it, alive until the stream is past the launch.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: (usize, usize, usize),
        threads: usize,
        shared: usize,
        stream: Stream,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let function = self.functions()?[kernel as usize];
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        if grid.0 > i32::MAX as usize || grid.1 > 65535 || grid.2 > 65535 {
            return Err(Error::cuda(kernel.name(), format!("expected a grid of up to 2^31 x 65535 x 65535, got {grid:?}")));
        }
        self.bind()?;
        let grid = (grid.0 as u32, grid.1 as u32, grid.2 as u32);
        let stream = ptr::with_exposed_provenance_mut::<sys::CUstream_st>(stream.0);
        // SAFETY: the caller's promise.
        unsafe { result::launch_kernel(function.0, grid, (threads as u32, 1, 1), shared as u32, stream, arguments) }
            .map_err(|e| Error::cuda(kernel.name(), words(e)))
    }

    /// The device's name.
    pub fn name(&self) -> Result<String> {
        let mut name = [0 as std::ffi::c_char; 128];
        let handle = result::device::get(self.ordinal as i32).map_err(error("device"))?;
        // SAFETY: writes at most as many bytes, NUL-terminated.
        unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, handle) }.result().map_err(error("device name"))?;
        // SAFETY: NUL-terminated by the driver.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_device_gets_a_reason_and_no_panic() {
        match status() {
            Ok(devices) => assert!(devices > 0 && device(devices).is_err()),
            Err(why) => {
                assert!(!why.is_empty());
                assert!(device(0).unwrap_err().to_string().contains(why));
            }
        }
    }
}
