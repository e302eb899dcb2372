//! The fast ways into pages: which launches `cuda/prompt.cu` takes, which of the others `cuda/seal.cu`, and their arguments.

use std::ffi::c_void;

use super::codec::{book_offsets, cells, kind_number, scale_dtype_number};
use super::paged::{Blocks, Pages, blocks_of, inverse};
use super::room::DeviceView;
use super::{Kernel, Stream};
use crate::codec::{ScaleDtype, ScaleKind};
use crate::error::Result;
use crate::page::{PAGE_TOKENS, SLAB_CHANNELS};
use crate::tensor::Dtype;

/// Of a block.
const WARPS: usize = 8;

/// Blocks that a multiprocessor holds of the kernels of `cuda/prompt.cu`.
const PROMPT_BLOCKS: usize = 2;

/// `SealSide` of `cuda/seal_arguments.cuh`.
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
    parts: i32,
    wide: i32,
    by_slabs: u32,
    by_domain_tiles: u32,
}

/// `SealArguments` of `cuda/seal_arguments.cuh`.
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
const _: () = assert!(size_of::<SealArguments>() == 64 + 2 * 144);

/// Whether numbers within 1 of 0 find their codes in the cells of `cuda/seal.cuh`: of width 1 / 29, each with at most one
/// threshold, none of which is so small that its distance to a number could vanish.
pub(super) fn in_unit_cells(thresholds: &[f32]) -> bool {
    // How far rounding can carry a number over the border of a cell.
    const HAIR: f32 = 1e-3;
    let within = thresholds.iter().all(|t| (2f32.powi(-20)..=1.0).contains(&t.abs()));
    within
        && (-32..32).all(|cell| {
            let (from, to) = (cell as f32 / 29.0 - HAIR, (cell + 1) as f32 / 29.0 + HAIR);
            thresholds.iter().filter(|&&t| from <= t && t <= to).count() <= 1
        })
}

/// Parts of a list of pages, so that teams that take one part of one tile after the other finish together.
fn parts(tiles: usize, pages: usize, teams: usize) -> usize {
    let most = (4 * teams / tiles).clamp(1, pages.max(1));
    let least = (teams / tiles / 2).clamp(1, most);
    (least..=most).min_by_key(|&n| (tiles * n).div_ceil(teams) * pages.div_ceil(n)).unwrap_or(1)
}

impl Pages<'_> {
    /// Makes the arguments of one half those of `cuda/prompt.cu`, if it takes it: the number of blocks.
    fn prompt_side(&self, value: bool, s: &mut SealSide, pages: usize) -> Option<usize> {
        let side = self.side(value);
        let all = s.slabs as usize * self.codec.heads;
        let kind = if s.per_token == 0 { ScaleKind::MeanAbsmax } else { ScaleKind::Absmax };
        let whole = s.per_token != 0 || s.groups == 1;
        // Places in a row of pages, and eight tokens of the input, are integers of 32 bits.
        let small = all <= 1 << 13 && self.codec.row_bytes() < 1 << 31 && s.stride[2].unsigned_abs() < 1 << 28;
        let thresholds = side.books[0].as_deref()?.thresholds();
        if side.kind != kind || side.scale_dtype != ScaleDtype::Fp16 || !whole || !small || !in_unit_cells(thresholds) {
            return None;
        }
        if s.per_token == 0 {
            (s.warps, s.units) = (2, pages as i32);
        } else if s.tile > 4 && s.stride[1].unsigned_abs() < 1 << 28 {
            // Longer blocks, eight slabs for a warp: half of the exchanges. A warp's slabs reach over at most four heads.
            (s.warps, s.wide) = ((s.tile as u32).div_ceil(8).next_power_of_two() as i32, 1);
        }
        let (tiles, pages, teams) = (s.tiles as usize, self.batch * s.units as usize, WARPS / s.warps as usize);
        let blocks = (PROMPT_BLOCKS * self.device.processors()).min((tiles * pages).div_ceil(teams)).max(1);
        s.parts = parts(tiles, pages, blocks * teams) as i32;
        Some(blocks)
    }

    fn seal_side(&self, value: bool, x: &DeviceView) -> Option<SealSide> {
        let side = self.side(value);
        let (layout, heads) = (&side.layout, self.codec.heads);
        let blocks = blocks_of(self, side, value)?;
        let slabs = layout.dim / SLAB_CHANNELS;
        let tail = self.room.tail[usize::from(value)];
        if !self.vectors(value, x) {
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
            parts: 0,
            wide: 0,
            by_slabs: inverse(slabs),
            by_domain_tiles: inverse(domain_tiles),
        })
    }

    /// Writes the pages that an append fills, if it can; counts and tables stay as they are.
    ///
    /// # Safety
    /// As for [`super::DeviceCache::append`].
    pub(super) unsafe fn seal(&self, k: &DeviceView, v: &DeviceView, stream: Stream) -> Result<bool> {
        let [channels, keys, values] = match self.exact {
            Dtype::F16 => [
                [Kernel::SealChannelsF16, Kernel::PromptChannelsF16],
                [Kernel::SealKeysF16, Kernel::PromptKeysF16],
                [Kernel::SealValuesF16, Kernel::PromptValuesF16],
            ],
            Dtype::Bf16 => [
                [Kernel::SealChannelsBf16, Kernel::PromptChannelsBf16],
                [Kernel::SealKeysBf16, Kernel::PromptKeysBf16],
                [Kernel::SealValuesBf16, Kernel::PromptValuesBf16],
            ],
            _ => return Ok(false),
        };
        // Of a block, with what the kernels have beside it.
        let room = |kernel: Kernel| kernel.shared_bytes() + 4096 <= self.device.shared_limit();
        let (Some(key), Some(value)) = (self.seal_side(false, k), self.seal_side(true, v)) else { return Ok(false) };
        if !room(values[0]) {
            return Ok(false);
        }
        let scheme = &self.codec.scheme;
        let single = scheme.writes_single_slots();
        let pages = k.shape[2].div_ceil(PAGE_TOKENS) + usize::from(single);
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
        let mut launches = [(values[0], 0); 2];
        for (value, s) in a.side.iter_mut().enumerate() {
            // Blocks that a multiprocessor holds of those of cuda/seal.cu: their launch bounds.
            let ([any, prompt], held) = match (value, s.per_token) {
                (1, _) => (values, 2),
                (_, 0) => (channels, 3),
                _ => (keys, 2),
            };
            let blocks = if room(prompt) { self.prompt_side(value == 1, s, pages) } else { None };
            launches[value] = blocks.map_or_else(
                || {
                    let steps = (self.batch * (s.units * s.tiles * 4) as usize).div_ceil(WARPS / s.warps as usize);
                    (any, (self.device.processors() * held).min(steps.max(1)))
                },
                |blocks| (prompt, blocks),
            );
        }
        let argument: *mut c_void = (&raw mut a).cast();
        for (kernel, blocks) in launches {
            // SAFETY: the one parameter is this struct; the addresses in it are the room's and the caller's tensors.
            unsafe { self.device.launch(kernel, (blocks, 1, 1), 32 * WARPS, kernel.shared_bytes(), stream, &mut [argument])? };
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::BookSpec;

    #[test]
    fn cells_hold_the_thresholds_of_nf4_but_not_a_threshold_of_0() {
        let nf4 = BookSpec::Name("nf4".into()).build().unwrap().to_fp16().unwrap();
        assert!(in_unit_cells(nf4.thresholds()));
        assert!(!in_unit_cells(&[-0.5, 0.0, 0.5]) && !in_unit_cells(&[0.5, 1.1]) && !in_unit_cells(&[0.21, 0.22]));
    }

    #[test]
    fn parts_keep_all_teams_busy() {
        for (tiles, pages, teams) in [(16, 4096, 1056), (16, 4080, 2112), (1, 3, 2112), (80, 255, 1056), (3000, 40, 1056)] {
            let n = parts(tiles, pages, teams);
            let longest = (tiles * n).div_ceil(teams) * pages.div_ceil(n);
            assert!((1..=pages).contains(&n));
            assert!(
                longest <= 1 + (tiles * pages).div_ceil(teams) * 5 / 4,
                "{tiles} {pages} {teams}: {n} parts, {longest} pages"
            );
        }
    }
}
