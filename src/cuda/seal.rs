//! The fast way into pages: which launches `cuda/seal.cu` takes, and their arguments.

use std::ffi::c_void;

use super::codec::{book_offsets, cells, kind_number, scale_dtype_number};
use super::paged::{Blocks, Pages, blocks_of};
use super::room::DeviceView;
use super::{Kernel, Stream};
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::Result;
use crate::page::{PAGE_TOKENS, SLAB_CHANNELS};
use crate::tensor::Dtype;

/// Of a block.
const WARPS: usize = 8;

/// `SealSide` of `cuda/seal.cu`.
#[repr(C)]
struct SealSide {
    x: u64,
    tail: u64,
    threshold: u64,
    stride: [i64; 3],
    slabs: i32,
    domain: i32,
    domain_tiles: i32,
    tiles: i32,
    tile: i32,
    units: i32,
    warps: i32,
    per_token: i32,
    block: i32,
    groups: i32,
    blocks: i32,
    code_bytes: i32,
    half_offset: i32,
    fields: i32,
    field_size: i32,
    kind: i32,
    scale_dtype: i32,
    levels: i32,
    cell_scale: f32,
    cell_offset: f32,
}

/// `SealArguments` of `cuda/seal.cu`.
#[repr(C)]
struct SealArguments {
    codec: u64,
    counts: u64,
    table: u64,
    capacity: i64,
    batch: i32,
    tokens: i32,
    heads: i32,
    page_bytes: i32,
    sink_slots: i32,
    tail_slots: i32,
    window: i32,
    single_slots: i32,
    side: [SealSide; 2],
}
const _: () = assert!(size_of::<SealArguments>() == 64 + 2 * 128);

impl Pages<'_> {
    fn seal_side(&self, value: bool, x: &DeviceView) -> Option<SealSide> {
        let side = self.side(value);
        let (layout, heads) = (&side.layout, self.codec.heads);
        let blocks = blocks_of(self, side, value)?;
        let slabs = layout.dim / SLAB_CHANNELS;
        let tail = self.room.tail[usize::from(value)];
        // A stride along one element is never taken.
        let aligned = (0..3).all(|i| x.shape[i] == 1 || x.strides[i] % 8 == 0);
        if !aligned || x.strides[3] != 1 || x.dtype != self.exact || !x.address.is_multiple_of(16) || !tail.is_multiple_of(16) {
            return None;
        }
        if side.scale_dtype == ScaleDtype::E4m3 || side.kind == ScaleKind::Rms {
            return None;
        }
        let book = side.books[0].as_deref()?;
        let (cell_scale, cell_offset) = cells(book.thresholds())?;
        let tokens = x.shape[2];
        let single = self.codec.scheme.writes_single_slots();
        // With a tail that is full, so many pages; one more if the first tokens go to an open page.
        let pages = tokens.div_ceil(PAGE_TOKENS) + usize::from(single);
        let (all, mut a) = (slabs * heads, (4, 0, 0, 1, slabs * heads, pages.div_ceil(4), 0));
        match blocks {
            Blocks::PerChannel { group: 64 } => a.3 = 1,
            Blocks::PerChannel { group: 32 } => a.3 = 2,
            Blocks::PerChannel { .. } => return None,
            Blocks::PerToken { slabs: block, spans_heads, in_head } => {
                let domain = if spans_heads { all } else { slabs };
                // In the end a block may be short, but then it is the only one of its head, or begins with it.
                let fits = if spans_heads { in_head == 1 } else { block >= slabs || matches!(block, 1..=4 | 8 | 16) };
                let reach = block.min(domain);
                if side.kind == ScaleKind::MeanAbsmax || !fits || reach > 16 {
                    return None;
                }
                let warps = reach.div_ceil(4).next_power_of_two();
                a = (warps, 1, block, 1, domain, pages, in_head);
            }
        }
        let (warps, per_token, block, groups, domain, units, blocks) = a;
        let tile = if per_token == 0 { 4 } else { block.min(domain) };
        let domain_tiles = domain.div_ceil(tile);
        let tiles = domain_tiles * (all / domain);
        // Numbers of steps stay integers of 32 bits.
        if self.batch * units * tiles > 1 << 28 || self.batch * self.room.capacity > i32::MAX as usize {
            return None;
        }
        Some(SealSide {
            x: x.address,
            tail,
            threshold: self.room.codec + book_offsets(value, 4)[1] as u64,
            stride: [0, 1, 2].map(|i| if x.shape[i] == 1 { 0 } else { 2 * x.strides[i] as i64 }),
            slabs: slabs as i32,
            domain: domain as i32,
            domain_tiles: domain_tiles as i32,
            tiles: tiles as i32,
            tile: tile as i32,
            units: units as i32,
            warps: warps as i32,
            per_token,
            block: block as i32,
            groups,
            blocks: blocks as i32,
            code_bytes: layout.code_bytes as i32,
            half_offset: self.half_offset(value),
            fields: layout.fields as i32,
            field_size: layout.field_size as i32,
            kind: kind_number(side.kind) as i32,
            scale_dtype: scale_dtype_number(side.scale_dtype) as i32,
            levels: book.levels().len() as i32,
            cell_scale,
            cell_offset,
        })
    }

    /// Writes the pages that an append fills, if it can; counts and tables stay as they are.
    ///
    /// # Safety
    /// As for [`super::DeviceCache::append`].
    pub(super) unsafe fn seal(&self, k: &DeviceView, v: &DeviceView, stream: Stream) -> Result<bool> {
        let [channels, keys, values] = match self.exact {
            Dtype::F16 => [Kernel::SealChannelsF16, Kernel::SealKeysF16, Kernel::SealValuesF16],
            Dtype::Bf16 => [Kernel::SealChannelsBf16, Kernel::SealKeysBf16, Kernel::SealValuesBf16],
            _ => return Ok(false),
        };
        let shared = values.shared_bytes();
        if shared + 4096 > self.device.shared_limit() {
            return Ok(false);
        }
        let (Some(key), Some(value)) = (self.seal_side(false, k), self.seal_side(true, v)) else { return Ok(false) };
        let scheme = &self.codec.scheme;
        let single = scheme.writes_single_slots();
        let steps = [&key, &value].map(|s| (self.batch * (s.units * s.tiles * 4) as usize).div_ceil(WARPS / s.warps as usize));
        let mut a = SealArguments {
            codec: self.room.codec,
            counts: self.room.counts,
            table: self.room.table,
            capacity: self.room.capacity as i64,
            batch: self.batch as i32,
            tokens: k.shape[2] as i32,
            heads: self.codec.heads as i32,
            page_bytes: self.codec.layout.page_bytes() as i32,
            sink_slots: scheme.sink_tokens as i32,
            tail_slots: if single { 0 } else { scheme.residual_length + PAGE_TOKENS } as i32,
            window: scheme.residual_length as i32,
            single_slots: i32::from(single),
            side: [key, value],
        };
        // Blocks that a multiprocessor holds: the launch bounds of the kernels.
        let kernels = [if a.side[0].per_token == 0 { (channels, 3) } else { (keys, 2) }, (values, 2)];
        let argument: *mut c_void = (&raw mut a).cast();
        for ((kernel, held), steps) in kernels.into_iter().zip(steps) {
            let blocks = (self.device.processors() * held).min(steps.max(1));
            // SAFETY: the one parameter is this struct; the addresses in it are the room's and the caller's tensors.
            unsafe { self.device.launch(kernel, (blocks, 1, 1), 32 * WARPS, shared, stream, &mut [argument])? };
        }
        Ok(true)
    }
}
