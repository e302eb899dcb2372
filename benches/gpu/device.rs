//! Memory, events and graphs on a device, through the driver's raw calls, for benches only: what the library itself never
//! allocates, its callers do.

use std::cell::RefCell;
use std::ffi::{CStr, c_void};
use std::time::Duration;

use cudarc::driver::{result, sys};
use nqkv_rs::cuda::{self, Stream};

/// Reads 16 bytes a thread and step and writes nothing that anybody has: it empties the L2 cache without leaving lines in it
/// that have to be written back, and shows what reading alone takes.
const READ: &CStr = c"
.version 8.0
.target sm_80
.address_size 64
.visible .entry stream(.param .u64 from, .param .u64 bytes) {
  .reg .pred p; .reg .b32 x<5>, t<4>; .reg .b64 a, end, step;
  ld.param.u64 a, [from]; ld.param.u64 end, [bytes]; add.u64 end, end, a;
  mov.u32 t0, %ctaid.x; mov.u32 t1, %ntid.x; mov.u32 t2, %tid.x; mov.u32 t3, %nctaid.x;
  mad.lo.u32 t0, t0, t1, t2; mul.wide.u32 step, t0, 16; add.u64 a, a, step;
  mul.lo.u32 t3, t3, t1; mul.wide.u32 step, t3, 16; mov.u32 x4, 0;
again:
  setp.ge.u64 p, a, end; @p bra done;
  ld.global.nc.L1::no_allocate.v4.u32 {x0, x1, x2, x3}, [a];
  xor.b32 x0, x0, x1; xor.b32 x2, x2, x3; xor.b32 x0, x0, x2; mad.lo.u32 x4, x4, 31, x0;
  add.u64 a, a, step; bra again;
done:
  setp.ne.u32 p, x4, 0x12345678; @p ret;
  ld.param.u64 a, [from]; st.global.u32 [a], x4;
  ret;
}";

/// Larger than the L2 cache of any device.
const FLUSH: usize = 256 << 20;

/// A device, a stream on it and two events.
pub struct Gpu {
    pub device: &'static cuda::Device,
    stream: sys::CUstream,
    events: [sys::CUevent; 2],
    read: sys::CUfunction,
    flush: u64,
    times: RefCell<Vec<f64>>,
}

impl Gpu {
    /// The first device, or why there is none.
    pub fn new() -> Result<Self, String> {
        cuda::status()?;
        let device = cuda::device(0).map_err(|e| e.to_string())?;
        device.bind().and_then(|()| device.warm_up()).map_err(|e| e.to_string())?;
        let make = || {
            let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
            // SAFETY: NUL-terminated PTX; the module is never unloaded.
            let module = unsafe { result::module::load_data(READ.as_ptr().cast())? };
            // SAFETY: a function of that module.
            let read = unsafe { result::module::get_function(module, c"stream".into())? };
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
            // SAFETY: the context is current; the memory is kept to the end of the process.
            let flush = unsafe { result::malloc_sync(FLUSH)? };
            Ok(Self { device, stream, events: [event()?, event()?], read, flush, times: RefCell::default() })
        };
        make().map_err(|e: cudarc::driver::DriverError| e.to_string())
    }

    pub fn stream(&self) -> Stream {
        Stream(self.stream.expose_provenance())
    }

    /// So many bytes, each of its four-byte words one of `pattern` in turn.
    pub fn filled(&self, bytes: usize, pattern: &[u8]) -> u64 {
        let part = pattern.len().min(bytes);
        // SAFETY: as many bytes are allocated as are written, in pieces that double.
        unsafe {
            let to = result::malloc_sync(bytes.max(16)).expect("device memory");
            result::memcpy_htod_sync(to, &pattern[..part]).expect("a copy to the device");
            let mut done = part;
            while done < bytes && done > 0 {
                let count = done.min(bytes - done);
                result::memcpy_dtod_async(to + done as u64, to, count, self.stream).expect("a copy");
                done += count;
            }
            result::stream::synchronize(self.stream).expect("the copies");
            to
        }
    }

    /// So many zeroed bytes.
    pub fn zeroed(&self, bytes: usize) -> u64 {
        // SAFETY: as many bytes are allocated as are written.
        unsafe {
            let to = result::malloc_sync(bytes.max(16)).expect("device memory");
            result::memset_d8_sync(to, 0, bytes.max(16)).expect("zeros");
            to
        }
    }

    pub fn free(&self, address: u64) {
        // SAFETY: from one of the functions above, and nothing is in flight.
        unsafe {
            result::stream::synchronize(self.stream).expect("the work before");
            result::free_sync(address).expect("memory of this device");
        }
    }

    /// A copy, by the driver.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) {
        // SAFETY: the caller's two allocations are as large.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.expect("a copy");
    }

    /// Reads so many bytes.
    pub fn read(&self, from: u64, bytes: usize) {
        let (mut from, mut bytes) = (from, bytes as u64);
        let mut arguments: [*mut c_void; 2] = [(&raw mut from).cast(), (&raw mut bytes).cast()];
        let grid = (8 * self.device.processors() as u32, 1, 1);
        // SAFETY: two parameters, as in the PTX above.
        unsafe { result::launch_kernel(self.read, grid, (256, 1, 1), 0, self.stream, &mut arguments) }.expect("a launch");
    }

    /// Time on the device of `work` after an empty L2 cache; it stands in [`Gpu::median`], too.
    pub fn time(&self, work: impl FnOnce()) -> Duration {
        self.read(self.flush, FLUSH);
        // SAFETY: this device's events and stream.
        let ms = unsafe {
            result::event::record(self.events[0], self.stream).expect("an event");
            work();
            result::event::record(self.events[1], self.stream).expect("an event");
            result::event::synchronize(self.events[1]).expect("the work");
            result::event::elapsed(self.events[0], self.events[1]).expect("a time")
        };
        self.times.borrow_mut().push(f64::from(ms) * 1e3);
        Duration::from_secs_f32(ms / 1e3)
    }

    /// Microseconds, the median of all times since the last call.
    pub fn median(&self) -> Option<f64> {
        let mut times = self.times.take();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied()
    }

    /// What `work` launches, as a graph.
    pub fn graph(&self, work: impl FnOnce()) -> sys::CUgraphExec {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a capture of this thread's on this stream, begun and ended here.
        unsafe {
            sys::cuStreamBeginCapture_v2(self.stream, mode).result().expect("a capture");
            work();
            let mut graph = std::ptr::null_mut();
            sys::cuStreamEndCapture(self.stream, &raw mut graph).result().expect("a graph");
            let mut executable = std::ptr::null_mut();
            sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0).result().expect("an executable graph");
            executable
        }
    }

    pub fn replay(&self, graph: sys::CUgraphExec) {
        // SAFETY: from `graph`.
        unsafe { sys::cuGraphLaunch(graph, self.stream) }.result().expect("a replay");
    }
}
