//! A cache on the device as the fast ways into its pages and out of them see it. What they do not take goes the way of
//! `cuda/pages.cu`, with the same bits.

use super::Device;
use super::arguments::{CacheArguments, TensorArgument};
use super::codec::dtype_number;
use super::room::{DeviceView, Room};
use crate::page::{FieldAxis, SLAB_CHANNELS};
use crate::scheme::Span;
use crate::seal::{PageCodec, SideCodec};
use crate::tensor::Dtype;

/// A cache as both ways see it.
pub(super) struct Pages<'a> {
    pub(super) device: &'static Device,
    pub(super) codec: &'a PageCodec,
    pub(super) exact: Dtype,
    pub(super) room: &'a Room,
    pub(super) batch: usize,
    pub(super) step: super::append::Step,
}

/// How a side's blocks lie, in slabs.
pub(super) enum Blocks {
    PerChannel { group: usize },
    PerToken { slabs: usize, spans_heads: bool, in_head: usize },
}

/// `None` for a half that has other slabs than 16 whole channels at 4 bits, or blocks that end inside a slab.
pub(super) fn blocks_of(pages: &Pages<'_>, side: &SideCodec, value: bool) -> Option<Blocks> {
    let (layout, scheme) = (&side.layout, &pages.codec.scheme);
    let whole = layout.dim == layout.stored && layout.slabs.iter().all(|s| s.width == 4);
    let slabs = layout.dim / SLAB_CHANNELS;
    if !whole || side.is_ordered() {
        return None;
    }
    let spec = if value { &scheme.value } else { &scheme.key };
    match layout.axis {
        FieldAxis::PerChannel { group } => Some(Blocks::PerChannel { group }),
        FieldAxis::PerToken { blocks } => {
            let block = spec.block / SLAB_CHANNELS;
            // A block that ends where heads end is one inside its head.
            let spans_heads = spec.span == Span::Heads && !slabs.is_multiple_of(block);
            (spec.block.is_multiple_of(SLAB_CHANNELS)).then_some(Blocks::PerToken { slabs: block, spans_heads, in_head: blocks })
        }
    }
}

/// What `quotient` of `cuda/strip.cuh` divides by `d` with.
pub(super) fn inverse(d: usize) -> u32 {
    (1u32 << 31).div_ceil(d.max(1) as u32)
}

impl Pages<'_> {
    /// As the general way takes an append.
    pub(super) fn arguments(&self, k: &DeviceView, v: &DeviceView) -> CacheArguments {
        let tensor = |x: &DeviceView| TensorArgument {
            data: x.address,
            stride: x.strides.map(|s| s as i64),
            dtype: dtype_number(x.dtype) as i64,
        };
        CacheArguments {
            codec: self.room.codec,
            counts: self.room.counts,
            table: self.room.table,
            sinks: self.room.sinks,
            tail: self.room.tail,
            arrived: self.room.arrived,
            x: [tensor(k), tensor(v)],
            capacity: self.room.capacity as i64,
            with_pages: 0,
            vectors: i32::from(self.vectors(false, k) && self.vectors(true, v)),
            tokens: k.shape[2] as i32,
            padding: 0,
        }
    }

    pub(super) fn side(&self, value: bool) -> &SideCodec {
        if value { &self.codec.value } else { &self.codec.key }
    }

    pub(super) fn half_offset(&self, value: bool) -> i32 {
        if value { self.codec.layout.value_offset() as i32 } else { 0 }
    }
}
