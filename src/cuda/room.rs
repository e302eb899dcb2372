//! Memory of a cache on a device besides its rows, and tensors there.

use crate::tensor::Dtype;

/// Memory of a cache besides its rows. Sizes are those that [`super::DeviceCache::sizes`] gives.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// [`super::codec_bytes`].
    pub codec: u64,
    /// Four int32 for each sequence, zeroed.
    pub counts: u64,
    /// A u64 for each page of each sequence.
    pub table: u64,
    /// An int32 for each sequence, zeroed.
    pub arrived: u64,
    /// Exact keys and values of the first tokens.
    pub sinks: [u64; 2],
    /// Exact keys and values of the newest tokens.
    pub tail: [u64; 2],
    /// Pages that a sequence's table holds.
    pub capacity: usize,
}

/// Bytes of each part of a [`Room`] for one sequence, and of the codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Exact keys, exact values of the first tokens.
    pub sinks: [usize; 2],
    /// Exact keys, exact values of the newest tokens.
    pub tail: [usize; 2],
}

/// A strided `[batch, heads, tokens, dim]` tensor on the device.
#[derive(Debug, Clone, Copy)]
pub struct DeviceView {
    /// First element.
    pub address: u64,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: [usize; 4],
    /// Strides in elements.
    pub strides: [isize; 4],
}
