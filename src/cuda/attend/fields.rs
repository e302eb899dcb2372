//! Fields of a page that there are attention kernels for.

use super::kernels::Keys;
use super::widths::Widths;
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS};
use crate::scheme::{SideSpec, Span};
use crate::seal::PageCodec;

/// Tokens of a group, and channels of a block of values beside them: `cuda/attend_grouped.cuh`.
const GROUP: usize = 32;

/// The kernel of a page whose sides have the same head size, whole slabs and fp16 fields, or what was expected.
pub(super) fn keys_of(codec: &PageCodec) -> Result<Keys, String> {
    let (key, value) = (&codec.key.layout, &codec.value.layout);
    let FieldAxis::PerToken { blocks } = value.axis else { unreachable!("values have one scale per token") };
    let (dim, spec) = (key.dim, &codec.scheme.value);
    match (key.axis, key.fields, value.fields) {
        (FieldAxis::PerChannel { group: GROUP }, 2, 2) => {
            if spec.block != GROUP || blocks != dim.div_ceil(GROUP) {
                return Err("values in blocks of 32 channels, with zero points beside keys in groups of 32 tokens".into());
            }
            match Widths::of(codec) {
                Ok(Widths::Even(bits @ (2 | 4))) => Ok(Keys::Grouped(bits)),
                _ => Err("keys and values of 4 or of 2 bits in the model's order, with zero points".into()),
            }
        }
        (FieldAxis::PerChannel { group: GROUP }, 2, _) => {
            Err("values with a zero point, beside keys in groups of 32 tokens".into())
        }
        (_, _, 2) => Err("values with a scale and no zero point".into()),
        (FieldAxis::PerChannel { group: PAGE_TOKENS }, 2, _) => {
            if blocks != dim.div_ceil(64) || (blocks > 1 && (spec.span != Span::Head || spec.block != 64)) {
                return Err("values in blocks of 64 channels".into());
            }
            Widths::of(codec)?.keys(false)
        }
        (FieldAxis::PerChannel { .. }, ..) => Err("keys with scale and mean of 64 tokens, or scales per token".into()),
        (FieldAxis::PerToken { .. }, 2, _) => Err("keys with scales per token and no zero point".into()),
        (FieldAxis::PerToken { blocks: 1 }, ..) if blocks == 1 => Widths::of(codec)?.keys(true),
        (FieldAxis::PerToken { blocks: 2 }, ..) if blocks == 2 => split(codec),
        (FieldAxis::PerToken { blocks: of_key @ (1 | 2) }, ..) => {
            let scales = if of_key == 1 { "one scale" } else { "two scales" };
            Err(format!("values with {scales} per token and head, as keys, got {blocks}"))
        }
        (FieldAxis::PerToken { blocks }, ..) => Err(format!("keys with one or two scales per token and head, got {blocks}")),
    }
}

/// Two scales per token of either side.
fn split(codec: &PageCodec) -> Result<Keys, String> {
    let sides = [&codec.scheme.key, &codec.scheme.value];
    if let Some(side) = sides.into_iter().find(|side| side.block % SLAB_CHANNELS != 0) {
        return Err(format!("blocks of a token that end with a slab of 16 channels, got {} channels", side.block));
    }
    match Widths::of(codec) {
        Ok(Widths::Even(4)) => Ok(Keys::Split),
        _ => Err("keys and values of 4 bits in the model's order, with two scales per token and head".into()),
    }
}

/// `key_slabs` of `cuda/attend.cuh`: for two scales per token, where blocks end.
pub(super) fn key_slabs(codec: &PageCodec, keys: Keys) -> [u8; 8] {
    let layout = &codec.key.layout;
    if keys != Keys::Split {
        return [8, 6, 5, 4, 3, 2, 1, 0].map(|width| layout.slabs.iter().filter(|s| s.width == width).count() as u8);
    }
    let block = |side: &SideSpec| (side.block / SLAB_CHANNELS) as u8;
    let step = |side: &SideSpec| if side.span == Span::Heads { layout.slabs.len() as u8 } else { 0 };
    let (key, value) = (&codec.scheme.key, &codec.scheme.value);
    [block(key), block(value), step(key), step(value), 0, 0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::Scheme;

    fn codec(scheme: &Scheme, heads: usize, dim: usize) -> PageCodec {
        PageCodec::new(scheme, heads, dim, dim).unwrap()
    }

    fn nqkv(key: usize, value: usize, span: Span) -> Scheme {
        let mut scheme = Scheme::preset("nqkv").unwrap();
        (scheme.key.block, scheme.value.block, scheme.key.span, scheme.value.span) = (key, value, span, span);
        scheme
    }

    #[test]
    fn groups_and_zero_points_are_one_kind() {
        let kivi = Scheme::preset("kivi4").unwrap();
        assert_eq!(keys_of(&codec(&kivi, 8, 128)), Ok(Keys::Grouped(4)));
        assert_eq!(keys_of(&codec(&Scheme::preset("kivi2").unwrap(), 8, 64)), Ok(Keys::Grouped(2)));
        let refused = |change: &dyn Fn(&mut Scheme)| {
            let mut scheme = kivi.clone();
            change(&mut scheme);
            keys_of(&codec(&scheme, 8, 128)).unwrap_err()
        };
        assert!(refused(&|s| s.value.block = 64).contains("blocks of 32 channels"));
        assert!(refused(&|s| s.key.block = 64).contains("no zero point"));
        assert!(refused(&|s| s.value.scale = crate::codec::ScaleKind::Absmax).contains("values with a zero point"));
        assert!(refused(&|s| s.key.widths = Some(vec![4, 4, 4, 4, 4, 4, 2, 2])).contains("4 or of 2 bits"));
    }

    #[test]
    fn two_scales_end_blocks_at_a_slab() {
        // Head 2 of 96 channels holds the first block's last 64.
        let spanning = codec(&nqkv(256, 256, Span::Heads), 8, 96);
        assert_eq!(keys_of(&spanning), Ok(Keys::Split));
        assert_eq!(key_slabs(&spanning, Keys::Split), [16, 16, 6, 6, 0, 0, 0, 0]);
        let inside = codec(&nqkv(64, 112, Span::Head), 8, 128);
        assert_eq!(keys_of(&inside), Ok(Keys::Split));
        assert_eq!(key_slabs(&inside, Keys::Split), [4, 7, 0, 0, 0, 0, 0, 0]);
        assert_eq!(key_slabs(&codec(&nqkv(256, 256, Span::Heads), 8, 128), Keys::Token), [0, 0, 0, 8, 0, 0, 0, 0]);
        assert_eq!(keys_of(&codec(&nqkv(256, 256, Span::Heads), 2, 96)), Ok(Keys::Token));
        let refused = |scheme: Scheme, dim| keys_of(&codec(&scheme, 8, dim)).unwrap_err();
        assert!(refused(nqkv(100, 100, Span::Heads), 80).contains("got 100 channels"));
        assert!(refused(nqkv(32, 32, Span::Heads), 96).contains("one or two scales per token and head, got 3"));
        assert!(refused(nqkv(256, 64, Span::Heads), 128).contains("one scale per token and head, as keys, got 2"));
    }
}
