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
        assert_eq!(codec_bytes(&codec, Dtype::Bf16).len(), 32 + 2 * side);
    }
}
