//! The fast ways into pages and out of them: which launches `cuda/seal.cu` and `cuda/read.cu` take, and their arguments. What
//! they do not take goes the way of `cuda/pages.cu`, with the same bits.

use std::ffi::c_void;

use super::codec::{book_offsets, cells, dtype_number, kind_number, scale_dtype_number};
use super::room::{DeviceView, Room};
use super::{Device, Kernel, Stream};
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::Result;
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS};
use crate::scheme::Span;
use crate::seal::{PageCodec, SideCodec};
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

/// `ReadSide` of `cuda/read.cu`.
#[repr(C)]
struct ReadSide {
    out: u64,
    sinks: u64,
    tail: u64,
    level: u64,
    slabs: i32,
    tiles: i32,
    per_token: i32,
    block: i32,
    group: i32,
    spans_heads: i32,
    blocks: i32,
    code_bytes: i32,
    half_offset: i32,
    fields: i32,
    field_size: i32,
    scale_dtype: i32,
    levels: i32,
    padding: i32,
}

/// `ReadArguments` of `cuda/read.cu`.
#[repr(C)]
struct ReadArguments {
    counts: u64,
    table: u64,
    capacity: i64,
    batch: i32,
    heads: i32,
    page_bytes: i32,
    exact: i32,
    sink_slots: i32,
    tail_slots: i32,
    from: i32,
    tokens: i32,
    first_page: i32,
    pages: i32,
    page_blocks: i32,
    chunks: i32,
    front: i32,
    gap: i32,
    side: [ReadSide; 2],
}
const _: () = assert!(size_of::<ReadArguments>() == 80 + 2 * 88);

/// A cache as both ways see it.
pub(super) struct Pages<'a> {
    pub(super) device: &'static Device,
    pub(super) codec: &'a PageCodec,
    pub(super) exact: Dtype,
    pub(super) room: &'a Room,
    pub(super) batch: usize,
}

/// How a side's blocks lie, in slabs.
enum Blocks {
    PerChannel { group: usize },
    PerToken { slabs: usize, spans_heads: bool, in_head: usize },
}

/// `None` for a half that has other slabs than 16 whole channels at 4 bits, or blocks that end inside a slab.
fn blocks_of(pages: &Pages<'_>, side: &SideCodec, value: bool) -> Option<Blocks> {
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

impl Pages<'_> {
    fn side(&self, value: bool) -> &SideCodec {
        if value { &self.codec.value } else { &self.codec.key }
    }

    fn half_offset(&self, value: bool) -> i32 {
        if value { self.codec.layout.value_offset() as i32 } else { 0 }
    }

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

    fn read_side(&self, value: bool, element: usize, out: u64) -> Option<ReadSide> {
        let side = self.side(value);
        let layout = &side.layout;
        let slabs = layout.dim / SLAB_CHANNELS;
        let blocks = blocks_of(self, side, value)?;
        let (per_token, block, group, spans_heads, blocks) = match blocks {
            Blocks::PerChannel { group } => (0, 1, group, false, 0),
            Blocks::PerToken { slabs, spans_heads, in_head } => (1, slabs, PAGE_TOKENS, spans_heads, in_head),
        };
        let book = side.books[0].as_deref()?;
        let wide = side.scale_dtype == ScaleDtype::Fp32 && per_token == 0;
        if !out.is_multiple_of(16) || wide || side.scale_dtype == ScaleDtype::E4m3 || (value && per_token == 0) {
            return None;
        }
        let at = usize::from(value);
        Some(ReadSide {
            out,
            sinks: self.room.sinks[at],
            tail: self.room.tail[at],
            level: self.room.codec + book_offsets(value, 4)[0] as u64,
            slabs: slabs as i32,
            tiles: (slabs * SLAB_CHANNELS * element).div_ceil(128) as i32,
            per_token,
            block: block as i32,
            group: group as i32,
            spans_heads: i32::from(spans_heads),
            blocks: blocks as i32,
            code_bytes: layout.code_bytes as i32,
            half_offset: self.half_offset(value),
            fields: layout.fields as i32,
            field_size: layout.field_size as i32,
            scale_dtype: scale_dtype_number(side.scale_dtype) as i32,
            levels: book.levels().len() as i32,
            padding: 0,
        })
    }

    /// Writes tokens `from..from + tokens` of every sequence, if it can. `held` are the pages of the sequence that has most,
    /// `sinks` the exact first tokens of the one that has most, `end` the tokens before the tail of the one that has least.
    /// All pages but a sequence's last are full.
    ///
    /// # Safety
    /// As for [`super::DeviceCache::read`].
    pub(super) unsafe fn read(
        &self,
        range: std::ops::Range<usize>,
        dtype: Dtype,
        out: [u64; 2],
        [held, sinks, end]: [usize; 3],
        stream: Stream,
    ) -> Result<bool> {
        let (from, tokens) = (range.start, range.len());
        let kernel = match dtype {
            Dtype::F32 => Kernel::ReadF32,
            Dtype::F16 => Kernel::ReadF16,
            Dtype::Bf16 => Kernel::ReadBf16,
            Dtype::F64 => return Ok(false),
        };
        if kernel.shared_bytes() + 4096 > self.device.shared_limit() {
            return Ok(false);
        }
        let [Some(key), Some(value)] = [false, true].map(|v| self.read_side(v, dtype.bytes(), out[usize::from(v)])) else {
            return Ok(false);
        };
        let (scheme, heads) = (&self.codec.scheme, self.codec.heads);
        let first_page = from.saturating_sub(scheme.sink_tokens) / PAGE_TOKENS;
        let pages = ((from + tokens - 1) / PAGE_TOKENS + 1).min(held).saturating_sub(first_page);
        let items = self.batch * pages * heads * key.tiles.max(value.tiles) as usize;
        // Chunks that may hold exact tokens: some in front, and those from the first tail on.
        let chunks = tokens.div_ceil(PAGE_TOKENS);
        let front = sinks.saturating_sub(from).div_ceil(PAGE_TOKENS).min(chunks);
        let back = (end.saturating_sub(from) / PAGE_TOKENS).clamp(front, chunks);
        let run = front + chunks - back;
        let page_blocks = items.div_ceil(WARPS);
        let blocks = page_blocks + run * heads * self.batch;
        if items > 1 << 30 || blocks > 1 << 30 {
            return Ok(false);
        }
        let single = scheme.writes_single_slots();
        let mut a = ReadArguments {
            counts: self.room.counts,
            table: self.room.table,
            capacity: self.room.capacity as i64,
            batch: self.batch as i32,
            heads: heads as i32,
            page_bytes: self.codec.layout.page_bytes() as i32,
            exact: dtype_number(self.exact) as i32,
            sink_slots: scheme.sink_tokens as i32,
            tail_slots: if single { 0 } else { scheme.residual_length + PAGE_TOKENS } as i32,
            from: from as i32,
            tokens: tokens as i32,
            first_page: first_page as i32,
            pages: pages.max(1) as i32,
            page_blocks: page_blocks as i32,
            chunks: run.max(1) as i32,
            front: front as i32,
            gap: (back - front) as i32,
            side: [key, value],
        };
        let argument: *mut c_void = (&raw mut a).cast();
        // SAFETY: the one parameter is this struct; the addresses in it are the room's and the caller's.
        unsafe { self.device.launch(kernel, (blocks, 2, 1), 32 * WARPS, kernel.shared_bytes(), stream, &mut [argument])? };
        Ok(true)
    }
}
