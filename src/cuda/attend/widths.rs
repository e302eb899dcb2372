//! Widths of codes that there are attention kernels for: `cuda/attend_widths.cuh`.

use super::kernels::{Fields, Keys};
use crate::seal::PageCodec;

/// Bytes of the decoding tables of mixed keys without 8 bits.
const MIXED_TABLES: usize = 65536 + 96 * 256;

/// Widths of a page's slabs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cuda) enum Widths {
    /// Keys and values of this many bits, keys in the model's order.
    Even(u8),
    /// Slabs of keys of up to 6 bits, at most 4 in the mean; values of `value` bits.
    Mixed {
        /// 2, 3 or 4.
        value: u8,
    },
    /// Slabs of keys of any width; values of `value` bits.
    Mixed8 {
        /// 4 or 8.
        value: u8,
    },
}

impl Widths {
    /// What a page takes, or what was expected.
    pub(super) fn of(codec: &PageCodec) -> Result<Self, String> {
        let (key, value) = (&codec.key.layout, codec.value.layout.slabs[0].width);
        let (most, least) = (key.slabs[0].width, key.slabs[key.slabs.len() - 1].width);
        if (most, least) == (value, value) && [2, 3, 4, 8].contains(&value) && !codec.key.is_ordered() {
            return Ok(Self::Even(value));
        }
        let narrow = most <= 6 && key.code_bytes <= 512 * key.slabs.len();
        match value {
            2..=4 if narrow => Ok(Self::Mixed { value }),
            4 | 8 => Ok(Self::Mixed8 { value }),
            2 | 3 => Err(format!("values of 4 or 8 bits beside keys of more than 4 (6 in a slab), got {value}")),
            _ => Err(format!("values of 2, 3, 4 or 8 bits, got {value}")),
        }
    }

    /// The kernels of these widths, with one scale for each token of keys or not.
    pub(super) fn keys(self, per_token: bool) -> Result<Keys, String> {
        match (self, per_token) {
            (Self::Even(4), false) => Ok(Keys::Channel),
            (Self::Even(4), true) => Ok(Keys::Token),
            (Self::Even(_), true) => Ok(Keys::Wide(self, Fields::Token)),
            (_, false) => Ok(Keys::Wide(self, Fields::Channel)),
            (_, true) => Err("keys and values of one width in the model's order, with one scale per token".into()),
        }
    }
}

impl Keys {
    /// Bytes of the decoding tables.
    pub(super) fn table_bytes(self) -> usize {
        match self {
            Self::Wide(Widths::Mixed { .. }, _) => MIXED_TABLES,
            Self::Wide(Widths::Mixed8 { .. }, _) => MIXED_TABLES + 65536,
            _ => 65536,
        }
    }

    /// Bits of keys that a warp has room for, if that depends on the kernel only.
    pub(super) fn most_bits(self) -> Option<usize> {
        match self {
            Self::Wide(Widths::Mixed { .. }, _) => Some(4),
            Self::Wide(Widths::Mixed8 { .. }, _) => Some(8),
            _ => None,
        }
    }

    /// Whether the kernel has many warps, of few registers, with queries in shared memory: decoding, not memory, takes its time.
    pub(super) fn has_many_warps(self, bulk: bool) -> bool {
        bulk && matches!(self, Self::Wide(Widths::Even(2 | 3), _) | Self::Grouped(2))
    }

    /// Whether pages come by bulk copies, on devices that have them: at 8 bits shared memory has room for few, and registers for more.
    pub(super) fn is_staged(self) -> bool {
        !matches!(self, Self::Wide(Widths::Even(8), _))
    }

    /// Whether the kernel has few warps, of many registers.
    pub(super) fn is_large(self) -> bool {
        matches!(self, Self::Wide(Widths::Mixed8 { .. }, _))
    }
}
