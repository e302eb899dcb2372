//! Parameters of the kernels in `cuda/pages.cu`, as they lie in memory.

use super::transform::TransformArgument;

/// `Tensor` of `cuda/pages.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct TensorArgument {
    pub(super) data: u64,
    pub(super) stride: [i64; 4],
    pub(super) dtype: i64,
}

/// `CacheArguments` of `cuda/pages.cu`.
#[repr(C)]
pub(super) struct CacheArguments {
    pub(super) codec: u64,
    pub(super) counts: u64,
    pub(super) table: u64,
    pub(super) sinks: [u64; 2],
    pub(super) tail: [u64; 2],
    pub(super) arrived: u64,
    pub(super) x: [TensorArgument; 2],
    pub(super) capacity: i64,
    pub(super) with_pages: i32,
    pub(super) vectors: i32,
    pub(super) tokens: i32,
    pub(super) padding: i32,
}

/// `TransformedArguments` of `cuda/pages.cu`.
#[repr(C)]
pub(super) struct CacheTransformed {
    pub(super) append: CacheArguments,
    pub(super) side: [TransformArgument; 2],
    pub(super) dim: [i32; 2],
    pub(super) heads: i32,
    pub(super) padding: i32,
}

/// `ReadArguments` of `cuda/pages.cu`.
#[repr(C)]
pub(super) struct ReadArguments {
    pub(super) codec: u64,
    pub(super) counts: u64,
    pub(super) table: u64,
    pub(super) sinks: [u64; 2],
    pub(super) tail: [u64; 2],
    pub(super) out: [u64; 2],
    pub(super) capacity: i64,
    pub(super) from: i32,
    pub(super) tokens: i32,
    pub(super) dtype: i32,
    pub(super) padding: i32,
}

/// Table entries, and sequences, of one launch.
pub(super) const ENTRIES: usize = 120;

/// `TableArguments` of `cuda/pages.cu`.
#[repr(C)]
pub(super) struct TableArguments {
    pub(super) table: u64,
    pub(super) counts: u64,
    pub(super) entries: i32,
    pub(super) sequences: i32,
    pub(super) value: [u64; ENTRIES],
    pub(super) place: [i32; ENTRIES],
    pub(super) count: [[i32; 4]; ENTRIES],
    pub(super) sequence: [i32; ENTRIES],
}
const _: () = assert!(size_of::<TableArguments>() <= 4096);
