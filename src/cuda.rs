//! CUDA: precompiled PTX, loaded through the driver that is found at run time, launched on the caller's stream.
//!
//! `driver` is a thin layer over cudarc's raw calls: the device's primary context (the one that PyTorch and CuPy use), no
//! owned streams, no owned memory, nothing that is dropped at exit. `kernels` is the table of entry points. The other modules
//! check arguments and launch. A launch neither allocates nor synchronises, and can be captured in a CUDA graph.

mod append;
mod arguments;
mod attend;
mod cache;
mod codec;
mod driver;
pub mod flat;
mod kernels;
mod paged;
mod read;
mod room;
mod seal;
mod transform;

pub use self::attend::{Attend, Workspace};
pub use self::cache::DeviceCache;
pub use self::codec::codec_bytes;
pub use self::driver::{Device, Stream, device, driver_version, status};
pub use self::kernels::Kernel;
pub use self::room::{DeviceView, Room, Sizes};
pub use self::transform::DeviceTransform;
