//! **Places**: the order in which the scores, weights and fields of a page stand while its codes are read in place.

use super::lanes::Half;
use super::math::Simd;
use super::tile::read_fields;
use crate::page::{FieldAxis, PAGE_TOKENS};
use crate::seal::SideCodec;

/// Token at place `p`: `n % 8` outside `n / 8`.
pub(super) fn token_of_place(p: usize) -> usize {
    p / 8 + 8 * (p % 8)
}

/// Stored channel at place `p` of the fields' order.
pub(super) fn channel_of_place(p: usize) -> usize {
    p / 16 * 16 + 2 * (p / 4 % 4) + 8 * (p / 2 % 2) + p % 2
}

/// Per-token fields of a page as `[block][64]` in places, appended to `out`; zeros from token `count` on, so that nothing
/// unwritten is used.
pub(super) fn token_fields(codec: &SideCodec, half: &Half, fields: &mut Vec<f32>, out: &mut [Vec<f32>; 2]) {
    /// Every `N`th of `x`, from `f` on.
    #[inline(always)]
    fn every<const N: usize>(x: &[f32], f: usize, out: &mut [f32]) {
        out.iter_mut().zip(x.chunks_exact(N)).for_each(|(o, x)| *o = x[f]);
    }
    let (layout, count) = (&codec.layout, half.count);
    let FieldAxis::PerToken { blocks } = layout.axis else { unreachable!("per-token fields") };
    let stride = layout.fields * blocks;
    read_fields(Simd::Avx2, codec, half.bytes, fields);
    for (f, out) in out.iter_mut().enumerate().take(layout.fields) {
        for b in 0..blocks {
            let at = out.len();
            if stride == 1 && count == PAGE_TOKENS {
                out.extend_from_slice(&fields[..PAGE_TOKENS]);
                continue;
            }
            out.resize(at + PAGE_TOKENS, 0.0);
            let (to, from) = (&mut out[at..], f * blocks + b);
            match stride {
                1 => every::<1>(fields, from, to),
                2 => every::<2>(fields, from, to),
                4 => every::<4>(fields, from, to),
                8 => every::<8>(fields, from, to),
                _ => to.iter_mut().zip(fields.chunks_exact(stride)).for_each(|(o, x)| *o = x[from]),
            }
            if count < PAGE_TOKENS {
                for (p, x) in to.iter_mut().enumerate() {
                    *x = if token_of_place(p) < count { *x } else { 0.0 };
                }
            }
        }
    }
}
