//! Decode attention on pages: which kernel takes a cache and a call, in which configuration, and its launch.
//!
//! A launch allocates nothing and waits for nothing; how much there is to do, the kernel finds in the counts on the device.
//! What no kernel takes is refused with the reason, for the caller to take another way.

mod fields;
mod kernels;
mod widths;

use std::ffi::c_void;

use cudarc::driver::result;
use half::f16;

use self::kernels::{Calls, Keys};
use super::codec::dtype_number;
use super::driver::{Device, Stream, error};
use super::paged::Pages;
use super::room::DeviceView;
use crate::codec::ScaleDtype;
use crate::error::{Error, Result};
use crate::page::{HALF_ALIGN, PAGE_TOKENS};
use crate::seal::{PageCodec, SideCodec};
use crate::tensor::Dtype;

/// Columns (queries times query heads of a KV head) of one pass over a page.
const COLUMNS: usize = 8;
/// Columns that a call may have: beyond, pages are read too often.
const MOST_COLUMNS: usize = 128;
/// Sequences whose shares are computed on the device.
const MOST_BATCH: usize = 2048;
/// Where the decoding tables begin in shared memory.
const TABLE_AT: usize = 1024;
/// Counters in front of the workspace, and how many units they serve.
const ARRIVED_BYTES: usize = 1 << 20;
const MOST_UNITS: usize = ARRIVED_BYTES / 4;

/// What to attend with.
#[derive(Debug, Clone)]
pub struct Attend {
    /// `[batch, q_heads, queries, dim]`.
    pub q: DeviceView,
    /// `[batch, queries, q_heads, dim]`, contiguous.
    pub out: (u64, Dtype),
    /// `[batch, queries, q_heads]` fp32, or 0.
    pub lse: u64,
    /// An int32 for each sequence, or 0.
    pub starts: u64,
    /// Factor of the scores.
    pub scale: f32,
    /// As for [`crate::attention::Queries`].
    pub window: Option<usize>,
    /// As for [`crate::attention::Queries`].
    pub soft_cap: Option<f32>,
    /// Device memory of [`Workspace`] bytes, zeroed once; nobody else uses it while the launch runs.
    pub workspace: u64,
}

/// What the host knows of the sequences.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    /// Pages before a sequence's last may be partial, now or once a captured graph has appended.
    pub(super) irregular: bool,
}

/// Bytes of workspace that a call takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workspace(pub usize);

/// A kernel and its launch configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    keys: Keys,
    dim: usize,
    bulk: bool,
    warps: usize,
    blocks: usize,
    shared: usize,
    passes: usize,
    /// Where, after the first stage, shared memory has room for parts of units that end in a warp; 0: they go to memory.
    parts_shared: usize,
}

/// `AttendArguments` of `cuda/attend.cuh`.
#[repr(C)]
struct AttendArguments {
    counts: u64,
    table: u64,
    sinks: [u64; 2],
    tail: [u64; 2],
    q: u64,
    out: u64,
    lse: u64,
    starts: u64,
    partial: u64,
    arrived: u64,
    capacity: i64,
    q_stride: [i64; 3],
    batch: i32,
    heads: i32,
    group: i32,
    queries: i32,
    passes: i32,
    page_bytes: i32,
    value_offset: i32,
    sink_slots: i32,
    tail_slots: i32,
    exact: i32,
    q_dtype: i32,
    out_dtype: i32,
    window: i32,
    masked: i32,
    irregular: i32,
    single: i32,
    parts_shared: i32,
    scale: f32,
    soft_cap: f32,
    level: [[u16; 16]; 2],
    codec: u64,
    key_codes: i32,
    ordered: i32,
    key_slabs: [u8; 8],
}
const _: () = assert!(size_of::<AttendArguments>() == 296);

/// Which kernel reads pages of this codec, or why none does.
fn keys_of(codec: &PageCodec, bulk: bool) -> std::result::Result<Keys, String> {
    let (key, value) = (&codec.key, &codec.value);
    let dim = key.layout.dim;
    if dim != value.layout.dim {
        return Err(format!("keys and values of one head size, got {dim} and {}", value.layout.dim));
    }
    for side in [key, value] {
        if side.layout.dim != side.layout.stored {
            return Err(format!("a head size of whole slabs of 16 channels, got {dim}"));
        }
        if side.scale_dtype != ScaleDtype::Fp16 {
            return Err("scales in fp16".into());
        }
    }
    let keys = fields::keys_of(codec)?;
    let dims = kernels::dims(keys, bulk && keys.is_staged());
    if dims.is_empty() {
        return Err("compute capability 9.0 for keys of several widths, or in an order of each head".into());
    }
    if !dims.contains(&dim) {
        return Err(format!("a head size of {dims:?}, got {dim}"));
    }
    Ok(keys)
}

/// Warps of a block that registers allow, as in `cuda/attend.cuh`.
fn most_warps(keys: Keys, dim: usize, bulk: bool) -> usize {
    let few = match keys {
        _ if keys.has_many_warps(bulk) => return 16,
        Keys::Split => !bulk && dim > 64,
        Keys::Wide(..) => keys.is_large() || (!bulk && dim >= 96),
        Keys::Channel | Keys::Grouped(_) if !bulk => dim >= 96,
        _ => bulk && (dim > 128 || dim == 96),
    };
    if few { 8 } else { 12 }
}

/// Parts of a warp that have room of their own: where there is room for a page, one part takes it.
fn parts_of_warp(bulk: bool) -> usize {
    if bulk { 1 } else { 2 }
}

/// Numbers of a column of a warp's part, as in `cuda/attend.cuh`.
fn part_row(dim: usize) -> usize {
    dim + 4
}

/// A warp's room in shared memory: a page or its fields, and queries of large heads.
fn stage_bytes(codec: &PageCodec, keys: Keys, bulk: bool) -> usize {
    let (key, value) = (&codec.key.layout, &codec.value.layout);
    let most = keys.most_bits().map(|bits| (8 * bits * key.dim + key.field_bytes).next_multiple_of(HALF_ALIGN));
    let page = if bulk { most.unwrap_or(key.bytes) + value.bytes } else { key.field_bytes + value.field_bytes };
    let shared = key.dim > 128 || most.is_some() || (keys.has_many_warps(bulk) && key.dim > 64);
    page + if shared { 16 * key.dim } else { 0 }
}

impl Plan {
    /// The configuration for a call of `columns` per KV head, or why there is none.
    pub(super) fn new(
        codec: &PageCodec,
        exact: Dtype,
        device: &Device,
        batch: usize,
        columns: usize,
    ) -> std::result::Result<Self, String> {
        let bulk = device.capability().0 == 9;
        let keys = keys_of(codec, bulk)?;
        Self::configure(
            (keys, bulk && keys.is_staged()),
            codec,
            exact,
            (device.processors(), device.shared_limit()),
            batch,
            columns,
        )
    }

    fn configure(
        (keys, bulk): (Keys, bool),
        codec: &PageCodec,
        exact: Dtype,
        (processors, shared_limit): (usize, usize),
        batch: usize,
        columns: usize,
    ) -> std::result::Result<Self, String> {
        let dim = codec.key.layout.dim;
        if !matches!(exact, Dtype::F16 | Dtype::Bf16) {
            return Err(format!("exact tokens in float16 or bfloat16, got {}", exact.name()));
        }
        if columns > MOST_COLUMNS {
            return Err(format!("at most {MOST_COLUMNS} queries times heads of a KV head, got {columns}"));
        }
        if batch > MOST_BATCH {
            return Err(format!("at most {MOST_BATCH} sequences, got {batch}"));
        }
        let passes = columns.div_ceil(COLUMNS);
        if batch * codec.heads * passes > MOST_UNITS {
            return Err(format!("at most {MOST_UNITS} sequences times heads, got {}", batch * codec.heads * passes));
        }
        // Of a warp: its room, two barriers, two parts of a merge, what it knows of its sequence. Then what is known of two units,
        // and where each sequence begins.
        let of_warp = stage_bytes(codec, keys, bulk) + 16 + 2 * 96 + 128;
        let (sequences, tables) = (32 + 4 * (batch + 1), TABLE_AT + keys.table_bytes());
        let fixed = tables + sequences.next_multiple_of(16);
        let most = most_warps(keys, dim, bulk);
        let warps = (shared_limit.saturating_sub(fixed) / of_warp).min(most);
        if warps == 0 {
            return Err(format!("{} bytes of shared memory, got {shared_limit}", fixed + of_warp));
        }
        let (parts, end) = (parts_of_warp(bulk) * warps * COLUMNS * part_row(dim) * 4, fixed + warps * of_warp);
        let fits = end + parts <= shared_limit;
        let parts_shared = if fits { end - tables } else { 0 };
        let shared = if fits { end + parts } else { end };
        Ok(Self { keys, dim, bulk, warps, blocks: processors, shared, passes, parts_shared })
    }

    /// Bytes of workspace.
    pub(super) fn workspace(&self) -> Workspace {
        let of_warps =
            if self.parts_shared > 0 { 0 } else { parts_of_warp(self.bulk) * self.warps * COLUMNS * part_row(self.dim) };
        // A merge reads up to five blocks beyond its last one.
        Workspace(ARRIVED_BYTES + 4 * (self.blocks * (2 * COLUMNS * (self.dim + 2) + of_warps) + 10 * COLUMNS * self.dim))
    }
}

fn levels(side: &SideCodec) -> [u16; 16] {
    // Of other widths, kernels find them in the codec.
    let Some(levels) = side.books[0].as_deref().map(|b| b.levels()).filter(|l| l.len() <= 16) else { return [0; 16] };
    // Codes beyond the last level mean the last.
    std::array::from_fn(|i| f16::from_f32(levels[i.min(levels.len() - 1)]).to_bits())
}

impl Pages<'_> {
    /// Launches attention.
    ///
    /// # Safety
    /// The addresses in `call` are memory of this device of the sizes that it names, alive until `stream` is past this.
    pub(super) unsafe fn attend(&self, plan: &Plan, call: &Attend, known: Known, stream: Stream) -> Result<()> {
        let [batch, q_heads, queries, _] = call.q.shape;
        let (scheme, heads, room) = (&self.codec.scheme, self.codec.heads, self.room);
        let single = scheme.writes_single_slots();
        let masked = call.window.is_some() || call.starts != 0 || queries > 1;
        let q_stride = [call.q.strides[0], call.q.strides[1], call.q.strides[2]].map(|s| 2 * s as i64);
        let mut a = AttendArguments {
            counts: room.counts,
            table: room.table,
            sinks: room.sinks,
            tail: room.tail,
            q: call.q.address,
            out: call.out.0,
            lse: call.lse,
            starts: call.starts,
            partial: call.workspace + ARRIVED_BYTES as u64,
            arrived: call.workspace,
            capacity: room.capacity as i64,
            q_stride,
            batch: batch as i32,
            heads: heads as i32,
            group: (q_heads / heads) as i32,
            queries: queries as i32,
            passes: plan.passes as i32,
            page_bytes: self.codec.layout.page_bytes() as i32,
            value_offset: self.codec.layout.value_offset() as i32,
            sink_slots: scheme.sink_tokens as i32,
            tail_slots: if single { 0 } else { scheme.residual_length + PAGE_TOKENS } as i32,
            exact: dtype_number(self.exact) as i32,
            q_dtype: dtype_number(call.q.dtype) as i32,
            out_dtype: dtype_number(call.out.1) as i32,
            window: call.window.map_or(0, |w| w.min(i32::MAX as usize) as i32),
            masked: i32::from(masked),
            irregular: i32::from(known.irregular),
            single: i32::from(single),
            parts_shared: plan.parts_shared as i32,
            scale: call.scale,
            soft_cap: call.soft_cap.unwrap_or(0.0),
            level: [levels(&self.codec.key), levels(&self.codec.value)],
            codec: room.codec,
            key_codes: self.codec.key.layout.code_bytes as i32,
            ordered: i32::from(self.codec.key.is_ordered()),
            key_slabs: fields::key_slabs(self.codec, plan.keys),
        };
        let plain = !masked && call.soft_cap.is_none() && call.lse == 0;
        let calls = match [self.exact, call.q.dtype, call.out.1] {
            _ if kernels::calls_of(plan.keys) == [Calls::Any] => Calls::Any,
            [Dtype::Bf16, Dtype::Bf16, Dtype::Bf16] if plain => Calls::PlainBf16,
            [Dtype::F16, Dtype::F16, Dtype::F16] if plain => Calls::PlainFp16,
            _ => Calls::Any,
        };
        let shared_limit = self.device.shared_limit();
        let function = kernels::function(self.device, (plan.keys, calls), plan.dim, plan.bulk, shared_limit)?;
        self.device.bind()?;
        let handle = std::ptr::with_exposed_provenance_mut(stream.0);
        let (grid, threads) = ((plan.blocks as u32, 1, 1), (32 * plan.warps as u32, 1, 1));
        let argument: *mut c_void = (&raw mut a).cast();
        // SAFETY: the one parameter is this struct; the addresses in it are the room's and the caller's.
        unsafe { result::launch_kernel(function.0, grid, threads, plan.shared as u32, handle, &mut [argument]) }
            .map_err(error("attention"))
    }
}

/// Refuses queries that do not fit the cache. Returns columns per KV head.
pub(super) fn check_queries(codec: &PageCodec, batch: usize, shortest: usize, shape: [usize; 4]) -> Result<usize> {
    let [b, q_heads, queries, dim] = shape;
    if b != batch || dim != codec.key.layout.dim {
        let expected = format!("[{batch}, q_heads, queries, {}]", codec.key.layout.dim);
        return Err(Error::shape("q", expected, format!("{shape:?}")));
    }
    if q_heads == 0 || q_heads % codec.heads != 0 {
        return Err(Error::value("q_heads", format!("a multiple of {} KV heads", codec.heads), q_heads));
    }
    if shortest < queries {
        return Err(Error::value("queries", format!("at most {shortest} (the tokens held, queries included)"), queries));
    }
    Ok(queries * (q_heads / codec.heads))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::Scheme;

    fn codec(scheme: &str, heads: usize, dim: usize) -> PageCodec {
        PageCodec::new(&Scheme::preset(scheme).unwrap(), heads, dim, dim).unwrap()
    }

    #[test]
    fn one_configuration_fits_small_shared_memory() {
        for dim in [64, 80, 96, 128, 256] {
            let codec = codec("nqkv4", 8, dim);
            let plan = |bulk, device| Plan::configure((Keys::Channel, bulk), &codec, Dtype::Bf16, device, 128, 4).unwrap();
            // Compute capability 8.6, 8.9 and 12.0: 99 KiB for a block.
            let small = plan(false, (84, 99 << 10));
            assert!(small.shared <= 99 << 10 && small.warps >= 5 && small.parts_shared == 0, "{small:?}");
            let hopper = plan(true, (132, 227 << 10));
            assert!(
                hopper.shared <= 227 << 10
                    && hopper.warps == most_warps(Keys::Channel, dim, true).min(if dim > 128 { 7 } else { 12 }),
                "{hopper:?}"
            );
            assert_eq!(hopper.parts_shared > 0, dim <= 128, "{hopper:?}");
        }
    }

    #[test]
    fn fields_and_shared_queries_count_in_a_stage() {
        for (scheme, dim, keys, staged, streamed) in [
            ("kivi4", 128, Keys::Grouped(4), 10240, 2048),
            ("kivi4", 64, Keys::Grouped(4), 5120, 1024),
            ("kivi2", 128, Keys::Grouped(2), 6144 + 2048, 2048),
            ("kivi2", 64, Keys::Grouped(2), 3072, 1024),
            ("nqkv", 96, Keys::Split, 6656, 512),
            ("nqkv", 80, Keys::Split, 5632, 512),
        ] {
            let codec = codec(scheme, 8, dim);
            assert_eq!(stage_bytes(&codec, keys, true), staged, "{scheme} {dim}");
            assert_eq!(stage_bytes(&codec, keys, false), streamed, "{scheme} {dim}");
            let plan = |bulk, device| Plan::configure((keys, bulk), &codec, Dtype::Bf16, device, 128, 4).unwrap();
            let (small, hopper) = (plan(false, (84, 99 << 10)), plan(true, (132, 227 << 10)));
            assert!(small.shared <= 99 << 10 && small.warps >= 8, "{small:?}");
            assert!(hopper.shared <= 227 << 10 && hopper.warps == if keys == Keys::Grouped(2) { 16 } else { 12 }, "{hopper:?}");
        }
    }

    #[test]
    fn what_no_kernel_takes_is_named() {
        assert_eq!(keys_of(&codec("nqkv4", 8, 128), false), Ok(Keys::Channel));
        assert_eq!(keys_of(&codec("nqkv4-signed", 2, 96), true), Ok(Keys::Channel));
        assert_eq!(keys_of(&codec("nqkv", 8, 128), true), Ok(Keys::Token));
        assert_eq!(keys_of(&codec("kivi2", 8, 128), true), Ok(Keys::Grouped(2)));
        assert_eq!(keys_of(&codec("kivi4", 8, 64), false), Ok(Keys::Grouped(4)));
        assert_eq!(keys_of(&codec("nqkv", 8, 96), true), Ok(Keys::Split));
        assert!(keys_of(&codec("kivi4", 8, 96), true).unwrap_err().contains("[64, 128], got 96"));
        assert!(keys_of(&codec("nqkv", 8, 112), true).unwrap_err().contains("got 112"));
        assert!(keys_of(&codec("nqkv4", 8, 112), true).unwrap_err().contains("got 112"));
        assert!(keys_of(&codec("nqkv4", 8, 256), false).unwrap_err().contains("got 256"));
    }
}
