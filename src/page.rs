//! The page, version 1: THE byte layout of packed keys and values. Nobody else computes an offset.
//!
//! A **page** holds 64 tokens of one KV head, K and V together. A **pool row** holds the pages of all KV heads for the same
//! 64 token places: `pool[row][kv_head][page bytes]`. Numbers are little endian.
//!
//! ```text
//! page = | K codes | K fields | pad | V codes | V fields | pad |     each half padded to 128 bytes, copied as one piece
//!        0                          v_offset                   page_bytes
//!
//! codes  = slab 0 | slab 1 | ...            a slab is 16 STORED channels x 64 tokens of one width
//! slab   = plane | plane                    width 1, 2, 4, 8: one plane; 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, low bits first;
//!                                           width 0: no bytes. A plane of p bits is 128 p bytes: 1024 slots, p bits each,
//!                                           slot s at bit p s, low bits first
//! slot   = 32 lane + place                  lane 0..31 is the thread of an mma.m16n8k16 that needs it, so that the 16 bytes
//!                                           of a lane at 4 bits are four ready A fragments
//!   K:  lane = 4 (n%8) + (c%8)/2     place = 2 (4 (n/16) + 2 ((c/8)%2) + (n/8)%2) + c%2       n token, c stored channel
//!   V:  lane = 4 (c%8) + (n%8)/2     place = 2 (4 (n/16) + 2 ((n/8)%2) + (c/8)%2) + n%2
//!
//! so at 4 bits the byte of a code is
//!   K:  512 (c/16) + 64 (n%8) + 16 ((c%8)/2) + 4 (n/16) + 2 ((c/8)%2) + (n/8)%2     nibble c%2, low nibble = 0
//!   V:  512 (c/16) + 64 (c%8) + 16 ((n%8)/2) + 4 (n/16) + 2 ((n/8)%2) + (c/8)%2     nibble n%2
//!
//! fields = F numbers of z bytes for every block: the scale, then the mean or zero point
//!   per channel  z (F (16 (c/16) + 4 ((c%8)/2)) + 4 f + 2 ((c/8)%2) + c%2)          a group of fewer than 64 tokens repeats
//!                                                                                  the region: + z F stored (n/group)
//!   per token    z (F nb (8 (n%8) + 2 (n/16) + (n/8)%2) + nb f + b)                 nb blocks of a token in this head
//! ```
//!
//! At head size 128 and `nqkv4`: 4096 + 512 | 4096 + 256 = 8960 bytes. A head size that is no multiple of 16 is padded: the
//! padding's bytes count, it carries the code of the level nearest to 0, and it does not enter a per-token block's
//! statistics (a per-channel block of padding has fields 0). A width-0 slab keeps its fields and decodes to the mean or zero
//! point. A block that spans heads repeats its fields in each head's page: block `b` of head `h` is block `h dim / size + b`
//! of the token, and `nb` is that of the head that meets most blocks (surplus fields hold the token's next block, or 0). A
//! page-table entry carries a valid count of 1..=64; bytes of slots at or beyond it mean nothing and are never read.

use crate::error::{Error, Result};

/// Version of the layout above. Files and engines check it.
pub const PAGE_VERSION: u32 = 1;
/// Tokens of a page.
pub const PAGE_TOKENS: usize = 64;
/// Stored channels of a slab.
pub const SLAB_CHANNELS: usize = 16;
/// Alignment of each half of a page.
pub const HALF_ALIGN: usize = 128;
/// Largest head size.
pub const MAX_HEAD_DIM: usize = 256;

/// Slot of key code (token `n` of 64, channel `c` of a slab's 16).
#[inline]
pub const fn key_slot(n: usize, c: usize) -> usize {
    32 * (4 * (n % 8) + (c % 8) / 2) + 2 * (4 * (n / 16) + 2 * ((c / 8) % 2) + (n / 8) % 2) + c % 2
}

/// Slot of value code (token `n` of 64, channel `c` of a slab's 16).
#[inline]
pub const fn value_slot(n: usize, c: usize) -> usize {
    32 * (4 * (c % 8) + (n % 8) / 2) + 2 * (4 * (n / 16) + 2 * ((n / 8) % 2) + (c / 8) % 2) + n % 2
}

/// Keys or values: they differ in the order of slots inside a slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

impl Side {
    /// `key` or `value`, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Value => "value",
        }
    }

    #[inline]
    fn slot(self, n: usize, c: usize) -> usize {
        match self {
            Self::Key => key_slot(n, c),
            Self::Value => value_slot(n, c),
        }
    }
}

/// Bit planes of a code width, low bits first; empty for width 0.
pub fn planes(width: u8) -> &'static [u8] {
    match width {
        0 => &[],
        1 => &[1],
        2 => &[2],
        3 => &[2, 1],
        4 => &[4],
        5 => &[4, 1],
        6 => &[4, 2],
        8 => &[8],
        _ => unreachable!("widths are checked by SideLayout::new"),
    }
}

/// 16 stored channels of one width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slab {
    /// Bits of a code: 0..=6 or 8.
    pub width: u8,
    /// First byte, from the start of the half.
    pub offset: usize,
}

/// Which blocks the fields of one half belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldAxis {
    /// One block per stored channel and group of `group` tokens (16, 32 or 64).
    PerChannel {
        /// Tokens of a group.
        group: usize,
    },
    /// `blocks` blocks per token.
    PerToken {
        /// Blocks of one token in one head.
        blocks: usize,
    },
}

/// One half of a page: all codes and fields of the keys, or of the values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideLayout {
    /// Keys or values.
    pub side: Side,
    /// Head size as the model has it.
    pub dim: usize,
    /// Head size padded to a multiple of 16.
    pub stored: usize,
    /// Slabs in stored order, widest first.
    pub slabs: Vec<Slab>,
    /// Bytes of all codes.
    pub code_bytes: usize,
    /// The fields' blocks.
    pub axis: FieldAxis,
    /// Fields per block (1 or 2).
    pub fields: usize,
    /// Bytes of one field.
    pub field_size: usize,
    /// Bytes of all fields.
    pub field_bytes: usize,
    /// Bytes of the half, padded to 128.
    pub bytes: usize,
}

/// Refuses head sizes that pages do not have.
pub fn check_head_dim(side: Side, dim: usize) -> Result<()> {
    if dim == 0 || dim > MAX_HEAD_DIM {
        return Err(Error::value(format!("{} head size", side.name()), format!("1 to {MAX_HEAD_DIM}"), dim));
    }
    Ok(())
}

impl SideLayout {
    /// Lays out one half. `widths` has one entry per slab of 16 stored channels, widest first.
    pub fn new(side: Side, dim: usize, widths: &[u8], axis: FieldAxis, fields: usize, field_size: usize) -> Result<Self> {
        check_head_dim(side, dim)?;
        let what = side.name();
        let stored = dim.next_multiple_of(SLAB_CHANNELS);
        if widths.len() != stored / SLAB_CHANNELS {
            let expected = format!("{} (one per 16 channels of head size {dim})", stored / SLAB_CHANNELS);
            return Err(Error::value(format!("number of {what} slab widths"), expected, widths.len()));
        }
        if let Some(w) = widths.iter().find(|&&w| w > 8 || w == 7) {
            return Err(Error::value(format!("{what} slab width"), "0 to 6, or 8 bits", w));
        }
        if widths.windows(2).any(|w| w[0] < w[1]) {
            return Err(Error::value(format!("{what} slab widths"), "the widest first", format!("{widths:?}")));
        }
        let mut code_bytes = 0;
        let slabs = widths.iter().map(|&width| {
            let slab = Slab { width, offset: code_bytes };
            code_bytes += usize::from(width) * PAGE_TOKENS * SLAB_CHANNELS / 8;
            slab
        });
        let slabs: Vec<Slab> = slabs.collect();
        let field_bytes = field_size
            * fields
            * match axis {
                FieldAxis::PerChannel { group } => stored * (PAGE_TOKENS / group),
                FieldAxis::PerToken { blocks } => PAGE_TOKENS * blocks,
            };
        let bytes = (code_bytes + field_bytes).next_multiple_of(HALF_ALIGN);
        Ok(Self { side, dim, stored, slabs, code_bytes, axis, fields, field_size, field_bytes, bytes })
    }

    /// Code of token `n`, stored channel `c`, in this half's bytes. 0 in a slab of width 0.
    #[inline]
    pub fn code(&self, half: &[u8], n: usize, c: usize) -> u8 {
        let slab = self.slabs[c / SLAB_CHANNELS];
        let slot = self.side.slot(n, c % SLAB_CHANNELS);
        let (mut base, mut shift, mut code) = (slab.offset, 0, 0u8);
        for &p in planes(slab.width) {
            let bit = usize::from(p) * slot;
            let mask = ((1u16 << p) - 1) as u8;
            code |= ((half[base + bit / 8] >> (bit % 8)) & mask) << shift;
            base += usize::from(p) * 128;
            shift += p;
        }
        code
    }

    /// Writes the code of token `n`, stored channel `c`.
    #[inline]
    pub fn set_code(&self, half: &mut [u8], n: usize, c: usize, code: u8) {
        let slab = self.slabs[c / SLAB_CHANNELS];
        let slot = self.side.slot(n, c % SLAB_CHANNELS);
        let (mut base, mut shift) = (slab.offset, 0);
        for &p in planes(slab.width) {
            let bit = usize::from(p) * slot;
            let mask = ((1u16 << p) - 1) as u8;
            let byte = &mut half[base + bit / 8];
            *byte = *byte & !(mask << (bit % 8)) | ((code >> shift) & mask) << (bit % 8);
            base += usize::from(p) * 128;
            shift += p;
        }
    }

    /// Offset, in this half, of field `f` of stored channel `c` in token group `group` (per-channel fields).
    #[inline]
    pub fn channel_field(&self, group: usize, c: usize, f: usize) -> usize {
        debug_assert!(matches!(self.axis, FieldAxis::PerChannel { .. }));
        let place = self.fields * (16 * (c / 16) + 4 * ((c % 8) / 2)) + 4 * f + 2 * ((c / 8) % 2) + c % 2;
        self.code_bytes + self.field_size * (self.fields * self.stored * group + place)
    }

    /// Offset, in this half, of field `f` of block `b` of token `n` (per-token fields).
    #[inline]
    pub fn token_field(&self, n: usize, b: usize, f: usize) -> usize {
        let FieldAxis::PerToken { blocks } = self.axis else { unreachable!("per-token fields") };
        let place = self.fields * blocks * (8 * (n % 8) + 2 * (n / 16) + (n / 8) % 2) + blocks * f + b;
        self.code_bytes + self.field_size * place
    }
}

/// The whole page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageLayout {
    /// The keys' half, from byte 0.
    pub key: SideLayout,
    /// The values' half, from byte [`PageLayout::value_offset`].
    pub value: SideLayout,
}

impl PageLayout {
    /// First byte of the values' half.
    pub fn value_offset(&self) -> usize {
        self.key.bytes
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> usize {
        self.key.bytes + self.value.bytes
    }

    /// Bytes of one pool row.
    pub fn row_bytes(&self, kv_heads: usize) -> usize {
        kv_heads * self.page_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn half(side: Side, widths: &[u8], axis: FieldAxis, fields: usize, size: usize) -> SideLayout {
        SideLayout::new(side, widths.len() * 16, widths, axis, fields, size).unwrap()
    }

    #[test]
    fn nqkv4_at_head_size_128_is_8960_bytes() {
        let key = half(Side::Key, &[4; 8], FieldAxis::PerChannel { group: 64 }, 2, 2);
        let value = half(Side::Value, &[4; 8], FieldAxis::PerToken { blocks: 2 }, 1, 2);
        let page = PageLayout { key, value };
        assert_eq!((page.key.code_bytes, page.key.bytes, page.value_offset()), (4096, 4608, 4608));
        assert_eq!((page.page_bytes(), page.row_bytes(8)), (8960, 71680));
    }

    #[test]
    fn four_bit_bytes_are_the_published_formula() {
        let key = half(Side::Key, &[4; 8], FieldAxis::PerChannel { group: 64 }, 2, 2);
        let value = half(Side::Value, &[4; 8], FieldAxis::PerToken { blocks: 2 }, 1, 2);
        for n in 0..64 {
            for c in 0..128 {
                let k = 512 * (c / 16) + 64 * (n % 8) + 16 * ((c % 8) / 2) + 4 * (n / 16) + 2 * ((c / 8) % 2) + (n / 8) % 2;
                let v = 512 * (c / 16) + 64 * (c % 8) + 16 * ((n % 8) / 2) + 4 * (n / 16) + 2 * ((n / 8) % 2) + (c / 8) % 2;
                let mut bytes = vec![0u8; 4608];
                key.set_code(&mut bytes, n, c, 15);
                assert_eq!(bytes[k], 15 << (4 * (c % 2)));
                let mut bytes = vec![0u8; 4608];
                value.set_code(&mut bytes, n, c, 15);
                assert_eq!(bytes[v], 15 << (4 * (n % 2)));
            }
        }
    }

    #[test]
    fn every_slot_and_field_has_a_place_of_its_own() {
        for side in [Side::Key, Side::Value] {
            let mut seen = vec![false; 1024];
            for n in 0..64 {
                for c in 0..16 {
                    assert!(!std::mem::replace(&mut seen[side.slot(n, c)], true));
                }
            }
        }
        let k = half(Side::Key, &[4; 3], FieldAxis::PerChannel { group: 16 }, 2, 2);
        let mut seen = vec![false; k.field_bytes];
        for (g, c, f) in (0..4).flat_map(|g| (0..48).flat_map(move |c| (0..2).map(move |f| (g, c, f)))) {
            assert!(!std::mem::replace(&mut seen[k.channel_field(g, c, f) - k.code_bytes], true));
        }
        let v = half(Side::Value, &[4; 3], FieldAxis::PerToken { blocks: 3 }, 2, 4);
        let mut seen = vec![false; v.field_bytes];
        for (n, b, f) in (0..64).flat_map(|n| (0..3).flat_map(move |b| (0..2).map(move |f| (n, b, f)))) {
            assert!(!std::mem::replace(&mut seen[v.token_field(n, b, f) - v.code_bytes], true));
        }
    }

    #[test]
    fn refusals_name_the_number() {
        let axis = FieldAxis::PerChannel { group: 64 };
        let message = |r: Result<SideLayout>| r.unwrap_err().to_string();
        assert!(message(SideLayout::new(Side::Key, 257, &[4; 17], axis, 1, 2)).contains("1 to 256, got 257"));
        assert!(message(SideLayout::new(Side::Key, 32, &[4; 3], axis, 1, 2)).contains("got 3"));
        assert!(message(SideLayout::new(Side::Key, 32, &[8, 7], axis, 1, 2)).contains("got 7"));
        assert!(message(SideLayout::new(Side::Key, 32, &[2, 4], axis, 1, 2)).contains("widest first"));
    }

    proptest! {
        #[test]
        fn codes_of_any_widths_come_back(seed in any::<u64>(), mut widths in proptest::collection::vec(0u8..9, 1..6)) {
            widths.iter_mut().for_each(|w| if *w == 7 { *w = 8 });
            widths.sort_by(|a, b| b.cmp(a));
            for side in [Side::Key, Side::Value] {
                let l = half(side, &widths, FieldAxis::PerToken { blocks: 1 }, 1, 2);
                let code = |n: usize, c: usize| {
                    let h = (seed ^ (n * 256 + c) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
                    (h & ((1u64 << widths[c / 16]) - 1)) as u8
                };
                let mut bytes = vec![0xa5u8; l.bytes];
                for n in 0..64 { for c in 0..l.stored { l.set_code(&mut bytes, n, c, code(n, c)); } }
                for n in 0..64 { for c in 0..l.stored { prop_assert_eq!(l.code(&bytes, n, c), code(n, c)); } }
                prop_assert!(bytes[l.code_bytes..].iter().all(|&b| b == 0xa5));
            }
        }
    }
}
