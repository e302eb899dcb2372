//! Tiles as fp32: keys channel-major `[dim][64]`, values token-major `[64][stored]`, so that scores and outputs are the same
//! matrix product. One tile at a time: it fits the innermost caches.

use super::math::Simd;
use super::{Plan, Source, Tile};
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS, Side, SideLayout, key_slot, planes, value_slot};
use crate::seal::SideCodec;
use crate::tensor::Dtype;

/// Slots of a slab.
const SLOTS: usize = PAGE_TOKENS * SLAB_CHANNELS;

/// What decoding one side needs, made once per call.
pub(super) struct Tables<'a> {
    pub(super) codec: &'a SideCodec,
    /// 256 levels for each slab, zeros beyond the codebook.
    levels: Vec<[f32; 256]>,
    /// Slots in the order in which a tile is written: keys `[channel][token]`, values `[token][channel]`.
    slots: Vec<u16>,
}

impl<'a> Tables<'a> {
    pub(super) fn new(codec: &'a SideCodec) -> Self {
        let mut levels = vec![[0f32; 256]; codec.books.len()];
        for (to, book) in levels.iter_mut().zip(&codec.books) {
            if let Some(book) = book {
                to[..book.levels().len()].copy_from_slice(book.levels());
            }
        }
        let slots = (0..SLOTS).map(|i| match codec.layout.side {
            Side::Key => key_slot(i % PAGE_TOKENS, i / PAGE_TOKENS),
            Side::Value => value_slot(i / SLAB_CHANNELS, i % SLAB_CHANNELS),
        });
        Self { codec, levels, slots: slots.map(|s| s as u16).collect() }
    }
}

/// Room for one tile and what it is made from.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) tile: Vec<f32>,
    /// Fields in the order of the page, as fp32.
    pub(super) fields: Vec<f32>,
    codes: Vec<u8>,
    bytes: Vec<u8>,
    row: Vec<f32>,
}

/// Reads all fields of a half, in the order of the page.
pub(super) fn read_fields(simd: Simd, codec: &SideCodec, half: &[u8], out: &mut Vec<f32>) {
    let (layout, z) = (&codec.layout, codec.layout.field_size);
    let bytes = &half[layout.code_bytes..][..layout.field_bytes];
    out.resize(layout.field_bytes / z, 0.0);
    #[cfg(target_arch = "x86_64")]
    if simd.avx2() && codec.scale_dtype == crate::codec::ScaleDtype::Fp16 {
        // SAFETY: the features were found.
        return unsafe { super::avx2::read_f16(bytes, out) };
    }
    let _ = simd;
    out.iter_mut().zip(bytes.chunks_exact(z)).for_each(|(o, b)| *o = codec.scale_dtype.read(b));
}

/// Unpacks one plane of `P` bits onto the codes, from bit `shift` on.
fn plane<const P: usize>(bytes: &[u8], shift: u8, codes: &mut [u8]) {
    for (to, &byte) in codes.chunks_exact_mut(8 / P).zip(bytes) {
        for (i, code) in to.iter_mut().enumerate() {
            *code |= ((byte >> (i * P)) & ((1u16 << P) - 1) as u8) << shift;
        }
    }
}

/// Codes of a slab in slot order.
fn unpack(layout: &SideLayout, half: &[u8], slab: usize, codes: &mut Vec<u8>) {
    codes.clear();
    codes.resize(SLOTS, 0);
    let (mut at, mut shift) = (layout.slabs[slab].offset, 0);
    for &p in planes(layout.slabs[slab].width) {
        let bytes = &half[at..at + usize::from(p) * 128];
        match p {
            1 => plane::<1>(bytes, shift, codes),
            2 => plane::<2>(bytes, shift, codes),
            4 => plane::<4>(bytes, shift, codes),
            _ => plane::<8>(bytes, shift, codes),
        }
        at += bytes.len();
        shift += p;
    }
}

/// Codes of slabs of at most 4 bits, widened to 4 bits in the same order: 512 bytes for each slab.
pub(super) fn widen(layout: &SideLayout, half: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.resize(layout.slabs.len() * SLOTS / 2, 0);
    for (slab, to) in layout.slabs.iter().zip(out.chunks_exact_mut(SLOTS / 2)) {
        let (mut at, mut shift) = (slab.offset, 0);
        for &p in planes(slab.width) {
            let bytes = &half[at..at + usize::from(p) * 128];
            match p {
                1 => {
                    for (o, &b) in to.chunks_exact_mut(4).zip(bytes) {
                        // Eight bits move to the lowest places of eight nibbles, by halves.
                        let x = u32::from(b);
                        let x = (x | x << 12) & 0x000f_000f;
                        let x = (x | x << 6) & 0x0303_0303;
                        let x = (x | x << 3) & 0x1111_1111;
                        o.iter_mut().zip((x << shift).to_le_bytes()).for_each(|(o, x)| *o |= x);
                    }
                }
                2 => {
                    for (o, &b) in to.chunks_exact_mut(2).zip(bytes) {
                        let x = u16::from(b);
                        let x = (x | x << 4) & 0x0f0f;
                        let x = (x | x << 2) & 0x3333;
                        o.iter_mut().zip((x << shift).to_le_bytes()).for_each(|(o, x)| *o |= x);
                    }
                }
                _ => to.copy_from_slice(bytes),
            }
            at += bytes.len();
            shift += p;
        }
    }
}

/// Decodes the first `count` tokens of head `h`'s keys to `[dim][64]`; the columns beyond hold anything.
pub(super) fn keys(simd: Simd, tables: &Tables, half: &[u8], h: usize, count: usize, s: &mut Scratch) {
    let (codec, layout) = (tables.codec, &tables.codec.layout);
    read_fields(simd, codec, half, &mut s.fields);
    s.tile.resize(layout.dim * PAGE_TOKENS, 0.0);
    let field = |at: usize| (at - layout.code_bytes) / layout.field_size;
    let two = layout.fields == 2;
    for (slab, levels) in tables.levels.iter().enumerate() {
        unpack(layout, half, slab, &mut s.codes);
        for c in slab * SLAB_CHANNELS..(slab + 1) * SLAB_CHANNELS {
            let channel = codec.channel(h, c);
            if channel >= layout.dim {
                continue;
            }
            let slots = &tables.slots[c % SLAB_CHANNELS * PAGE_TOKENS..][..count];
            let row = &mut s.tile[channel * PAGE_TOKENS..][..count];
            match layout.axis {
                FieldAxis::PerChannel { group } => {
                    for (g, (row, slots)) in row.chunks_mut(group).zip(slots.chunks(group)).enumerate() {
                        let scale = s.fields[field(layout.channel_field(g, c, 0))];
                        let zero = if two { s.fields[field(layout.channel_field(g, c, 1))] } else { 0.0 };
                        for (o, &slot) in row.iter_mut().zip(slots) {
                            *o = levels[usize::from(s.codes[usize::from(slot)])] * scale + zero;
                        }
                    }
                }
                FieldAxis::PerToken { .. } => {
                    let block = codec.block_of(h, c);
                    for (n, (o, &slot)) in row.iter_mut().zip(slots).enumerate() {
                        let scale = s.fields[field(layout.token_field(n, block, 0))];
                        let zero = if two { s.fields[field(layout.token_field(n, block, 1))] } else { 0.0 };
                        *o = levels[usize::from(s.codes[usize::from(slot)])] * scale + zero;
                    }
                }
            }
        }
    }
}

/// Decodes the first `count` tokens of head `h`'s values to `[64][stored]`, zeros in the padding; rows beyond hold anything.
pub(super) fn values(simd: Simd, tables: &Tables, half: &[u8], h: usize, count: usize, s: &mut Scratch) {
    let (codec, layout) = (tables.codec, &tables.codec.layout);
    read_fields(simd, codec, half, &mut s.fields);
    s.tile.resize(layout.stored * PAGE_TOKENS, 0.0);
    let field = |at: usize| (at - layout.code_bytes) / layout.field_size;
    let two = layout.fields == 2;
    for (slab, levels) in tables.levels.iter().enumerate() {
        unpack(layout, half, slab, &mut s.codes);
        let first = slab * SLAB_CHANNELS;
        for n in 0..count {
            let slots = &tables.slots[n * SLAB_CHANNELS..][..SLAB_CHANNELS];
            let row = &mut s.tile[n * layout.stored + first..][..SLAB_CHANNELS];
            for (c, (o, &slot)) in row.iter_mut().zip(slots).enumerate() {
                let block = codec.block_of(h, first + c);
                let scale = s.fields[field(layout.token_field(n, block, 0))];
                let zero = if two { s.fields[field(layout.token_field(n, block, 1))] } else { 0.0 };
                let x = levels[usize::from(s.codes[usize::from(slot)])] * scale + zero;
                *o = if codec.channel(h, first + c) < layout.dim { x } else { 0.0 };
            }
        }
    }
}

/// Exact numbers, which are finite.
fn read_exact(simd: Simd, dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    match dtype {
        // SAFETY: the features were found.
        Dtype::Bf16 if simd.avx2() => return unsafe { super::avx2::read_bf16(bytes, out) },
        // SAFETY: as above.
        Dtype::F16 if simd.avx2() => return unsafe { super::avx2::read_f16(bytes, out) },
        _ => {}
    }
    let _ = simd;
    dtype.read_f32(bytes, out);
}

/// An exact tile's keys or values of KV head `h`: keys `[dim][64]`, or with `rows` `[token][dim]`; values `[64][stored]`.
pub(super) fn exact(simd: Simd, plan: &Plan, (b, h): (usize, usize), tile: &Tile, side: Side, rows: bool, s: &mut Scratch) {
    let (codec, dtype) = (plan.cache.codec(), plan.cache.exact_dtype());
    let layout = if side == Side::Key { &codec.key.layout } else { &codec.value.layout };
    let (dim, stride) = (layout.dim, if side == Side::Key { layout.dim } else { layout.stored });
    s.tile.resize(PAGE_TOKENS * stride, 0.0);
    let part = if tile.source == Source::Sinks { plan.views[b].sinks } else { plan.views[b].tail };
    let (held, z) = (if side == Side::Key { &part.k } else { &part.v }, dtype.bytes());
    let across = side == Side::Key && !rows;
    s.row.resize(dim, 0.0);
    for n in 0..tile.count {
        let t = tile.slot + n;
        let row = if across { &mut s.row[..] } else { &mut s.tile[n * stride..][..dim] };
        match (tile.source, &plan.queries.fresh) {
            (Source::Fresh, Some((k, v))) => {
                let view = if side == Side::Key { k } else { v };
                view.row_f32(b, h, t, Dtype::F32, &mut s.bytes, row);
            }
            _ => read_exact(simd, dtype, &held[(t * plan.heads + h) * dim * z..][..dim * z], row),
        }
        if across {
            s.row.iter().enumerate().for_each(|(c, &x)| s.tile[c * PAGE_TOKENS + n] = x);
        } else {
            s.tile[n * stride + dim..(n + 1) * stride].fill(0.0);
        }
    }
}
