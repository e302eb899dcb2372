//! A page codec as the bytes that kernels read: the structs of `cuda/page.cuh`, to be copied to the device once.

use crate::codec::{ScaleDtype, ScaleKind};
use crate::page::{FieldAxis, PAGE_TOKENS};
use crate::scheme::Span;
use crate::seal::{PageCodec, SideCodec};
use crate::tensor::Dtype;

/// Little-endian words, one after the other.
#[derive(Default)]
struct Words(Vec<u8>);

impl Words {
    fn int(&mut self, x: usize) {
        self.0.extend((x as i32).to_le_bytes());
    }

    fn floats(&mut self, x: &[f32], padding: f32) {
        let padded = (0..256).map(|i| x.get(i).copied().unwrap_or(padding));
        self.0.extend(padded.flat_map(f32::to_le_bytes));
    }
}

/// Number of a scale kind in `cuda/codec.cuh`.
pub(super) fn kind_number(kind: ScaleKind) -> usize {
    match kind {
        ScaleKind::Absmax => 0,
        ScaleKind::SignedAbsmax => 1,
        ScaleKind::Minmax => 2,
        ScaleKind::MeanAbsmax => 3,
        ScaleKind::Rms => 4,
    }
}

/// Number of a scale dtype in `cuda/codec.cuh`.
pub(super) fn scale_dtype_number(dtype: ScaleDtype) -> usize {
    match dtype {
        ScaleDtype::Fp32 => 0,
        ScaleDtype::Fp16 => 1,
        ScaleDtype::Bf16 => 2,
        ScaleDtype::E4m3 => 3,
    }
}

/// Number of an element type in `cuda/codec.cuh`.
pub(super) fn dtype_number(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 => 0,
        Dtype::F32 => 1,
        Dtype::F16 => 2,
        Dtype::Bf16 => 3,
    }
}

/// Cells of the table in `cuda/codec.cuh`: cell `c` is what lies nearest to `c` of 63.
const CELLS: usize = 64;
/// How far rounding can carry a number over the border of a cell, in table units.
const HAIR: f32 = 1e-4;

/// Scale and offset of the table of cells of a codebook; `None` if a cell would hold two thresholds.
pub(super) fn cells(thresholds: &[f32]) -> Option<(f32, f32)> {
    let (&low, &high) = (thresholds.first()?, thresholds.last()?);
    let margin = (high - low) / 48.0;
    let scale = 1.0 / (high - low + 2.0 * margin);
    let offset = (margin - low) * scale;
    let at = |t: f32| t * scale + offset;
    let single = (0..CELLS).all(|cell| {
        let ends = [cell as f32 - 0.5, cell as f32 + 0.5].map(|e| e / (CELLS - 1) as f32);
        let (from, to) = (ends[0] - HAIR, ends[1] + HAIR);
        thresholds.iter().filter(|&&t| from <= at(t) && at(t) <= to).count() <= 1
    });
    // Over the smallest scale, which counts as 1e-38, it has to stay finite.
    (single && scale <= 3.0).then_some((scale, offset))
}

/// Where in [`codec_bytes`] the levels of a side's codebook of this width stand, and their thresholds.
pub(super) fn book_offsets(value: bool, width: usize) -> [usize; 2] {
    const BOOK: usize = 4 * (1 + 512);
    const SIDE: usize = 4 * (15 + 32) + 9 * BOOK;
    let levels = 32 + usize::from(value) * SIDE + 4 * (15 + 32) + width * BOOK + 4;
    [levels, levels + 1024]
}

/// `Codec` of `cuda/page.cuh`.
pub fn codec_bytes(codec: &PageCodec, exact: Dtype) -> Vec<u8> {
    let scheme = &codec.scheme;
    let single = scheme.writes_single_slots();
    let mut words = Words::default();
    for x in [codec.heads, codec.layout.page_bytes(), codec.layout.value_offset(), dtype_number(exact)] {
        words.int(x);
    }
    let tail = if single { 0 } else { scheme.residual_length + PAGE_TOKENS };
    for x in [scheme.sink_tokens, tail, scheme.residual_length, usize::from(single)] {
        words.int(x);
    }
    side(&mut words, codec, &codec.key, false);
    side(&mut words, codec, &codec.value, true);
    if codec.key.is_ordered() {
        for h in 0..codec.heads {
            for c in 0..codec.key.layout.stored {
                words.0.extend((codec.key.channel(h, c) as u16).to_le_bytes());
            }
        }
    }
    words.0
}

fn side(words: &mut Words, codec: &PageCodec, side: &SideCodec, is_value: bool) {
    let layout = &side.layout;
    let spec = if is_value { &codec.scheme.value } else { &codec.scheme.key };
    let (per_token, group, blocks) = match layout.axis {
        FieldAxis::PerChannel { group } => (0, group, 0),
        FieldAxis::PerToken { blocks } => (1, 0, blocks),
    };
    for x in [usize::from(is_value), layout.dim, layout.stored, layout.bytes, layout.code_bytes, per_token, group, blocks] {
        words.int(x);
    }
    for x in [spec.block, usize::from(spec.span == Span::Heads), usize::from(side.is_ordered())] {
        words.int(x);
    }
    for x in [layout.fields, layout.field_size, kind_number(side.kind), scale_dtype_number(side.scale_dtype)] {
        words.int(x);
    }
    for i in 0..16 {
        words.int(layout.slabs.get(i).map_or(0, |s| usize::from(s.width)));
    }
    for i in 0..16 {
        words.int(layout.slabs.get(i).map_or(0, |s| s.offset));
    }
    for width in 0..9 {
        let slab = layout.slabs.iter().position(|s| usize::from(s.width) == width);
        let book = slab.and_then(|i| side.books[i].as_deref());
        words.int(book.map_or(0, |b| b.levels().len()));
        words.floats(book.map_or(&[], |b| b.levels()), 0.0);
        words.floats(book.map_or(&[], |b| b.thresholds()), f32::INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::Scheme;

    #[test]
    fn sizes_are_those_of_the_structs() {
        let codec = PageCodec::new(&Scheme::preset("nqkv4").unwrap(), 8, 128, 128).unwrap();
        let side = 4 * (15 + 32) + 9 * 4 * (1 + 512);
        let bytes = codec_bytes(&codec, Dtype::Bf16);
        assert_eq!(bytes.len(), 32 + 2 * side);
        for (value, half) in [(false, &codec.key), (true, &codec.value)] {
            let book = half.books[0].as_ref().unwrap();
            let first = book_offsets(value, 4).map(|at| f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
            assert_eq!(first, [book.levels()[0], book.thresholds()[0]]);
        }
    }
}
