//! The fast way out of pages: the launch of `cuda/read.cu`, and its arguments.

use std::ffi::c_void;

use super::codec::{book_offsets, dtype_number, scale_dtype_number};
use super::paged::{Blocks, Pages, blocks_of};
use super::{Kernel, Stream};
use crate::codec::ScaleDtype;
use crate::error::Result;
use crate::page::{PAGE_TOKENS, SLAB_CHANNELS};
use crate::tensor::Dtype;

/// Of a block.
const WARPS: usize = 2;
/// Shared memory that a block asks for beyond its own, where a processor has much: so few blocks at a time write to fewer places,
/// which memory takes faster.
const SPARE: usize = 14 << 10;
/// Tokens of a head that one block writes where they may not all be in pages.
const EXACT_TOKENS: usize = 16;
/// Slabs that a warp takes.
const TILE: usize = 4;

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

impl Pages<'_> {
    fn read_side(&self, value: bool, out: u64) -> Option<ReadSide> {
        let side = self.side(value);
        let layout = &side.layout;
        let slabs = layout.dim / SLAB_CHANNELS;
        let blocks = blocks_of(self, side, value)?;
        let (per_token, block, group, spans_heads, blocks) = match blocks {
            Blocks::PerChannel { group } => (0, 1, group, false, 0),
            Blocks::PerToken { slabs, spans_heads, in_head } => (1, slabs, PAGE_TOKENS, spans_heads, in_head),
        };
        let book = side.books[0].as_deref()?;
        if !out.is_multiple_of(16) || side.scale_dtype == ScaleDtype::E4m3 || (value && per_token == 0) {
            return None;
        }
        let at = usize::from(value);
        Some(ReadSide {
            out,
            sinks: self.room.sinks[at],
            tail: self.room.tail[at],
            level: self.room.codec + book_offsets(value, 4)[0] as u64,
            slabs: slabs as i32,
            tiles: slabs.div_ceil(TILE) as i32,
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
        let [Some(key), Some(value)] = [false, true].map(|v| self.read_side(v, out[usize::from(v)])) else {
            return Ok(false);
        };
        let (scheme, heads) = (&self.codec.scheme, self.codec.heads);
        let first_page = from.saturating_sub(scheme.sink_tokens) / PAGE_TOKENS;
        let pages = ((from + tokens - 1) / PAGE_TOKENS + 1).min(held).saturating_sub(first_page);
        let items = self.batch * pages * heads * key.tiles.max(value.tiles) as usize;
        // Chunks that may hold exact tokens: some in front, and those from the first tail on.
        let chunks = tokens.div_ceil(EXACT_TOKENS);
        let front = sinks.saturating_sub(from).div_ceil(EXACT_TOKENS).min(chunks);
        let back = (end.saturating_sub(from) / EXACT_TOKENS).clamp(front, chunks);
        let run = front + chunks - back;
        let page_blocks = items.div_ceil(WARPS);
        let blocks = page_blocks + run * heads * self.batch;
        if items > 1 << 30 || blocks > 1 << 30 {
            return Ok(false);
        }
        let spare = if self.device.shared_limit() > 200 << 10 { SPARE } else { 0 };
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
        unsafe { self.device.launch(kernel, (blocks, 2, 1), 32 * WARPS, spare, stream, &mut [argument])? };
        Ok(true)
    }
}
