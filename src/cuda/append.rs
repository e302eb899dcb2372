//! A step of decoding in one launch: which appends `cuda/append.cu` and `cuda/append_slots.cu` take, and their arguments.

use std::ffi::c_void;

use super::codec::{book_offsets, kind_number, scale_dtype_number};
use super::paged::{Blocks, Pages, blocks_of, inverse};
use super::room::DeviceView;
use super::seal::in_unit_cells;
use super::transform::TransformArgument;
use super::{Kernel, Stream};
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::Result;
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS};
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// Threads that work on a half of a page, or on a sequence's single slots.
const GROUP: usize = 256;
/// Groups of a block: the launch bounds of the kernels.
const GROUPS: usize = 2;
/// Two tables of codes.
const TABLES: usize = 2 * 64 * 32 * 8;
/// Of four slabs' 96 tokens.
const STAGE: usize = 6 * 16 * 128;

/// `AppendSide` of `cuda/append.cuh`.
#[repr(C)]
struct AppendSide {
    x: u64,
    sinks: u64,
    tail: u64,
    threshold: u64,
    stride: [i64; 3],
    slabs: i32,
    domain: i32,
    block: i32,
    blocks: i32,
    groups: i32,
    lanes: i32,
    code_bytes: i32,
    half_offset: i32,
    fields: i32,
    field_size: i32,
    kind: i32,
    scale_dtype: i32,
    works: i32,
    per: i32,
    by_per: u32,
    by_slabs: u32,
    by_block: u32,
    unused: u32,
}

/// `AppendArguments` of `cuda/append.cuh`.
#[repr(C)]
struct AppendArguments {
    counts: u64,
    table: u64,
    arrived: u64,
    capacity: i64,
    tokens: i32,
    heads: i32,
    page_bytes: i32,
    sink_slots: i32,
    tail_slots: i32,
    window: i32,
    one_book: i32,
    share: i32,
    side: [AppendSide; 2],
}
/// `TransformedArguments` of `cuda/append_transformed.cuh`.
#[repr(C)]
struct TransformedArguments {
    append: AppendArguments,
    side: [TransformArgument; 2],
}
const _: () = assert!(size_of::<AppendSide>() == 128 && size_of::<AppendArguments>() == 64 + 2 * 128);

impl AppendSide {
    /// Whether kernels transform tokens on their way: what lanes exchange then are numbers of one warp.
    fn transforms(&self, how: &TransformArgument, single: bool) -> bool {
        let [dim, block] = [self.slabs, self.block].map(|slabs| slabs as usize * SLAB_CHANNELS);
        // Lanes of single slots follow their blocks: a rotation lies inside one, or is some of them without gaps.
        let beside = how.block() == 0
            || !single
            || block.is_multiple_of(how.block())
            || (block.is_power_of_two() && dim.is_multiple_of(block));
        how.by_eights() && beside
    }
}

/// What of a codec decides how a step seals.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// `cuda/append.cu` can.
    codes_fit: bool,
    /// Keys and values have the same codebook.
    one_book: bool,
}

impl Step {
    pub(super) fn new(codec: &PageCodec) -> Self {
        let sides = [&codec.key, &codec.value];
        let [key, value] = sides;
        let fp16 = sides.iter().all(|side| side.scale_dtype == ScaleDtype::Fp16);
        let kinds = (key.kind, value.kind) == (ScaleKind::MeanAbsmax, ScaleKind::Absmax);
        let per_channel = matches!(key.layout.axis, FieldAxis::PerChannel { group: PAGE_TOKENS });
        let block = codec.scheme.value.block.min(value.layout.dim.next_multiple_of(64)) == 64;
        let [keys, values] = sides.map(|side| side.books.first().and_then(|b| b.as_deref()).map_or(&[][..], |b| b.thresholds()));
        Self {
            codes_fit: fp16 && kinds && per_channel && block && in_unit_cells(keys) && in_unit_cells(values),
            one_book: keys == values,
        }
    }
}

impl Pages<'_> {
    /// Whether tokens are 16-bit numbers that are kept as they are, to be copied 16 bytes at a time.
    pub(super) fn vectors(&self, value: bool, x: &DeviceView) -> bool {
        // A stride along one element is never taken.
        let strides = (0..3).all(|i| x.shape[i] == 1 || x.strides[i] % 8 == 0) && x.strides[3] == 1;
        let parts = [x.address, self.room.sinks[usize::from(value)], self.room.tail[usize::from(value)]];
        let aligned = parts.iter().all(|address| address.is_multiple_of(16)) && x.shape[3].is_multiple_of(8);
        matches!(self.exact, Dtype::F16 | Dtype::Bf16) && x.dtype == self.exact && strides && aligned
    }

    fn append_side(&self, value: bool, x: &DeviceView) -> Option<AppendSide> {
        let side = self.side(value);
        let (layout, single) = (&side.layout, self.codec.scheme.writes_single_slots());
        let blocks = blocks_of(self, side, value)?;
        let slabs = layout.dim / SLAB_CHANNELS;
        let [sinks, tail] = [self.room.sinks, self.room.tail].map(|parts| parts[usize::from(value)]);
        if !self.vectors(value, x) {
            return None;
        }
        side.books[0].as_deref()?;
        if side.scale_dtype == ScaleDtype::E4m3 || side.kind == ScaleKind::Rms {
            return None;
        }
        let (domain, block, in_head, groups) = match blocks {
            Blocks::PerChannel { group: 64 } if !single => (slabs, 0, 0, 1),
            Blocks::PerChannel { group: 32 } if !single => (slabs, 0, 0, 2),
            Blocks::PerChannel { .. } => return None,
            Blocks::PerToken { slabs: block, spans_heads, in_head } => {
                let domain = if spans_heads { slabs * self.codec.heads } else { slabs };
                let block = block.min(domain);
                // A block over several heads is sealed by no block of threads alone. Where one ends inside a head, each head
                // holds scales of blocks that it has no part in. A warp has 256 channels.
                let fits = if single { block <= 16 && (!spans_heads || in_head == 1) } else { !spans_heads };
                if side.kind == ScaleKind::MeanAbsmax || !fits {
                    return None;
                }
                (domain, block, in_head, 0)
            }
        };
        // Single slots only: where `block` is 0 nothing asks for the rest.
        let all = slabs * self.codec.heads;
        if single && all > 1 << 12 {
            return None;
        }
        let per = domain.div_ceil(block.max(1));
        let lanes = (2 * block).next_power_of_two();
        Some(AppendSide {
            x: x.address,
            sinks,
            tail,
            threshold: self.room.codec + book_offsets(value, 4)[1] as u64,
            stride: [0, 1, 2].map(|i| if x.shape[i] == 1 { 0 } else { 2 * x.strides[i] as i64 }),
            slabs: slabs as i32,
            domain: domain as i32,
            block: block as i32,
            blocks: in_head as i32,
            groups,
            lanes: lanes as i32,
            code_bytes: layout.code_bytes as i32,
            half_offset: self.half_offset(value),
            fields: layout.fields as i32,
            field_size: layout.field_size as i32,
            kind: kind_number(side.kind) as i32,
            scale_dtype: scale_dtype_number(side.scale_dtype) as i32,
            works: (per * (all / domain) * lanes).div_ceil(32) as i32,
            per: per as i32,
            by_per: inverse(per),
            by_slabs: inverse(slabs),
            by_block: inverse(block),
            unused: 0,
        })
    }

    /// Appends few tokens to every sequence, transformed before if `how` says so, with the pages that they fill, if it can.
    ///
    /// # Safety
    /// As for [`super::DeviceCache::append_transformed`].
    pub(super) unsafe fn append(
        &self,
        k: &DeviceView,
        v: &DeviceView,
        how: Option<&[TransformArgument; 2]>,
        stream: Stream,
    ) -> Result<bool> {
        let (Some(key), Some(value)) = (self.append_side(false, k), self.append_side(true, v)) else { return Ok(false) };
        let scheme = &self.codec.scheme;
        let single = scheme.writes_single_slots();
        if how.is_some_and(|how| !key.transforms(&how[0], single) || !value.transforms(&how[1], single)) {
            return Ok(false);
        }
        let (heads, half) = (self.codec.heads, matches!(self.exact, Dtype::F16));
        let (kernels, blocks, threads, shared) = if single {
            let most = (self.device.processors() * 3 / self.batch).max(1);
            let blocks = ((key.works + value.works) as usize).div_ceil(GROUP / 32).min(most);
            let kernels = match half {
                true => [Kernel::AppendSlotsF16, Kernel::AppendSlotsTransformedF16],
                false => [Kernel::AppendSlotsBf16, Kernel::AppendSlotsTransformedBf16],
            };
            (kernels, blocks, GROUP, 0)
        } else {
            let slabs = key.slabs.max(value.slabs) as usize;
            let group = slabs.div_ceil(4) * 2 * STAGE + 512 * slabs;
            let room = self.device.shared_limit() - 1024;
            let fast = self.step.codes_fit && TABLES + group <= room;
            let common = if fast { TABLES } else { 256 };
            let groups = (room.saturating_sub(common) / group).min(GROUPS);
            if groups == 0 {
                return Ok(false);
            }
            // More than one block for a sequence costs a trip to memory: only where a page is much work.
            let blocks = (2 * heads).div_ceil(6 * groups).min((self.device.processors() / self.batch).max(1));
            let kernels = match (fast, half) {
                (true, true) => [Kernel::AppendF16, Kernel::AppendTransformedF16],
                (true, false) => [Kernel::AppendBf16, Kernel::AppendTransformedBf16],
                (false, true) => [Kernel::AppendAnyF16, Kernel::AppendAnyTransformedF16],
                (false, false) => [Kernel::AppendAnyBf16, Kernel::AppendAnyTransformedBf16],
            };
            (kernels, blocks, GROUP * groups, common + groups * group)
        };
        let a = AppendArguments {
            counts: self.room.counts,
            table: self.room.table,
            arrived: self.room.arrived,
            capacity: self.room.capacity as i64,
            tokens: k.shape[2] as i32,
            heads: heads as i32,
            page_bytes: self.codec.layout.page_bytes() as i32,
            sink_slots: scheme.sink_tokens as i32,
            tail_slots: (scheme.residual_length + PAGE_TOKENS) as i32,
            window: scheme.residual_length as i32,
            one_book: i32::from(self.step.one_book),
            share: (2 * heads).div_ceil(blocks * (threads / GROUP)) as i32,
            side: [key, value],
        };
        // A kernel without transforms takes the first part.
        let mut a = TransformedArguments { append: a, side: how.copied().unwrap_or_default() };
        let argument: *mut c_void = (&raw mut a).cast();
        let kernel = kernels[usize::from(how.is_some())];
        // SAFETY: the one parameter is this struct; the addresses in it are the room's and the caller's tensors.
        unsafe { self.device.launch(kernel, (blocks, self.batch, 1), threads, shared, stream, &mut [argument])? };
        Ok(true)
    }
}
