//! One block of numbers to its fields (scale, and mean or zero point), and single values to codes and back.
//!
//! The rules that CPU, CUDA and files share (all arithmetic in fp32, round to nearest even):
//! statistics are taken over the block, rounded to the scale dtype, and codes are chosen with the ROUNDED fields:
//! `code = nearest((x - zero) * (1 / scale))` with one IEEE reciprocal per block; decoding is one
//! `fma(level, scale, zero)`. A sum over a block is a fixed binary tree ([`tree_sum`]). Scale 0 (a block of zeros, or of
//! one constant) encodes every element as the code nearest to 0 and decodes to `zero` exactly.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::codebook::Codebook;

/// What a block stores beside its codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleKind {
    /// Largest magnitude.
    Absmax,
    /// The element of largest magnitude with its sign (the first one on a tie), so that the extreme always decodes to +1.
    SignedAbsmax,
    /// Half range and mid range: levels of [-1, 1] span minimum to maximum.
    Minmax,
    /// Largest magnitude around the block's mean, and the mean.
    MeanAbsmax,
    /// Root mean square.
    Rms,
}

impl ScaleKind {
    /// Fields per block: 1 (scale) or 2 (scale, then mean or zero point).
    pub fn fields(self) -> usize {
        match self {
            Self::Absmax | Self::SignedAbsmax | Self::Rms => 1,
            Self::Minmax | Self::MeanAbsmax => 2,
        }
    }
}

/// How a field is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// IEEE single.
    Fp32,
    /// IEEE half; magnitudes above 65504 saturate.
    Fp16,
    /// bfloat16.
    Bf16,
    /// OCP fp8 e4m3 (finite, no infinity); magnitudes above 448 saturate.
    E4m3,
}

impl ScaleDtype {
    /// Bytes of one field.
    pub fn bytes(self) -> usize {
        match self {
            Self::Fp32 => 4,
            Self::Fp16 | Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }

    /// `x` as this type would give it back.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::Fp32 => x,
            Self::Fp16 => f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32(),
            Self::Bf16 => {
                let max = bf16::MAX.to_f32();
                bf16::from_f32(x.clamp(-max, max)).to_f32()
            }
            Self::E4m3 => e4m3_to_f32(e4m3_from_f32(x)),
        }
    }

    /// Writes an already rounded field, little endian.
    pub fn write(self, out: &mut [u8], x: f32) {
        match self {
            Self::Fp32 => out[..4].copy_from_slice(&x.to_le_bytes()),
            Self::Fp16 => out[..2].copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            Self::Bf16 => out[..2].copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
            Self::E4m3 => out[0] = e4m3_from_f32(x),
        }
    }

    /// Reads a field.
    pub fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Self::Fp32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Self::Fp16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            Self::E4m3 => e4m3_to_f32(bytes[0]),
        }
    }
}

/// fp32 to e4m3 (sign, 4 exponent bits of bias 7, 3 mantissa bits), to nearest even, saturating at 448.
pub fn e4m3_from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let a = x.abs();
    if a.is_nan() {
        return sign | 0x7f;
    }
    if a >= 448.0 {
        return sign | 0x7e;
    }
    // Quantum of the binade (2^-9 for subnormals); a / quantum is exact, so the rounding below is the only one.
    let exponent = ((a.to_bits() >> 23) as i32 - 127).max(-6);
    let quantum = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let steps = (a / quantum).round_ties_even() as u32;
    // Normal: 8..=16 steps, of which 16 carries into the exponent by plain addition.
    let magnitude = if exponent == -6 && steps < 8 { steps } else { ((exponent + 7) as u32) * 8 + steps - 8 };
    sign | magnitude.min(0x7e) as u8
}

/// e4m3 to fp32, exactly.
pub fn e4m3_to_f32(byte: u8) -> f32 {
    let (e, m) = ((byte >> 3) & 15, f32::from(byte & 7));
    let a = if byte & 0x7f == 0x7f {
        f32::NAN
    } else if e == 0 {
        m * 2f32.powi(-9)
    } else {
        (8.0 + m) * 2f32.powi(i32::from(e) - 10)
    };
    if byte & 0x80 != 0 { -a } else { a }
}

/// What is stored for one block, already rounded to its dtype. `zero` is the mean or the zero point, 0 for one-field kinds.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Fields {
    /// The multiplier of the levels; negative only for [`ScaleKind::SignedAbsmax`].
    pub scale: f32,
    /// The offset added after scaling.
    pub zero: f32,
}

impl Fields {
    /// The value that a level stands for: one fma.
    #[inline]
    pub fn decode(self, level: f32) -> f32 {
        level.mul_add(self.scale, self.zero)
    }

    /// The number that codes are chosen by: one reciprocal per block, 0 for scale 0. Magnitudes below 1e-38 count as
    /// 1e-38, so that the reciprocal stays finite.
    #[inline]
    pub fn inverse(self) -> f32 {
        if self.scale == 0.0 { 0.0 } else { 1.0 / self.scale.abs().max(1e-38).copysign(self.scale) }
    }
}

/// Code of `x` in a block with these fields; `inverse` is [`Fields::inverse`].
#[inline]
pub fn encode(book: &Codebook, fields: Fields, inverse: f32, x: f32) -> u8 {
    book.encode((x - fields.zero) * inverse)
}

/// Sum of `f(x)` by a fixed binary tree: the list, padded with zeros to a power of two, is folded upper half onto lower half
/// until one number is left. At most 512 elements.
pub fn tree_sum(x: impl ExactSizeIterator<Item = f32>) -> f32 {
    let mut a = [0f32; 512];
    let n = x.len();
    assert!(n <= 512, "a block has at most 512 elements, got {n}");
    for (slot, v) in a.iter_mut().zip(x) {
        *slot = v;
    }
    let mut half = n.next_power_of_two() / 2;
    while half > 0 {
        for i in 0..half {
            a[i] += a[i + half];
        }
        half /= 2;
    }
    a[0]
}

/// Fields of a block of at most 512 finite numbers. An empty block has scale 0.
pub fn block_fields(x: &[f32], kind: ScaleKind, dtype: ScaleDtype) -> Fields {
    if x.is_empty() {
        return Fields::default();
    }
    let n = x.len() as f32;
    match kind {
        ScaleKind::Absmax => Fields { scale: dtype.round(x.iter().fold(0.0, |m, v| m.max(v.abs()))), zero: 0.0 },
        ScaleKind::SignedAbsmax => {
            let e = x.iter().fold(0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
            Fields { scale: dtype.round(e), zero: 0.0 }
        }
        ScaleKind::Minmax => {
            let lo = x.iter().copied().fold(f32::INFINITY, f32::min);
            let hi = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // Halved first, so that the sum cannot overflow. Half range around the ROUNDED middle, so that both ends fit.
            // Adding 0 settles the sign of a 0, which a minimum of -0 and 0 leaves open.
            let zero = dtype.round(lo * 0.5 + hi * 0.5) + 0.0;
            Fields { scale: dtype.round((hi - zero).max(zero - lo)) + 0.0, zero }
        }
        ScaleKind::MeanAbsmax => {
            let zero = dtype.round(tree_sum(x.iter().copied()) / n);
            Fields { scale: dtype.round(x.iter().fold(0.0, |m, v| m.max((v - zero).abs()))), zero }
        }
        ScaleKind::Rms => {
            // Scaled by the largest magnitude: squares neither overflow nor vanish.
            let top = x.iter().fold(0f32, |m, v| m.max(v.abs()));
            if top == 0.0 {
                return Fields::default();
            }
            // As in `Fields::inverse`: the reciprocal stays finite.
            let top = top.max(1e-38);
            let inverse = 1.0 / top;
            let mean = tree_sum(x.iter().map(|v| (v * inverse) * (v * inverse))) / n;
            Fields { scale: dtype.round(top * mean.sqrt()), zero: 0.0 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn e4m3_round_trips_every_byte() {
        for b in 0..=255u8 {
            if b & 0x7f != 0x7f {
                assert_eq!(e4m3_from_f32(e4m3_to_f32(b)), b, "byte {b:#x} is {}", e4m3_to_f32(b));
            }
        }
        assert_eq!(e4m3_to_f32(0x7e), 448.0);
        assert_eq!(e4m3_from_f32(1e9), 0x7e);
        assert_eq!(e4m3_from_f32(17.0), e4m3_from_f32(16.0)); // tie to even
        assert_eq!(e4m3_to_f32(e4m3_from_f32(19.0)), 20.0); // tie to even, upwards
        assert_eq!(e4m3_from_f32(0.0009), 0);
    }

    #[test]
    fn zero_and_constant_blocks_have_scale_zero_and_come_back_exactly() {
        for kind in [ScaleKind::Absmax, ScaleKind::SignedAbsmax, ScaleKind::Minmax, ScaleKind::MeanAbsmax, ScaleKind::Rms] {
            let f = block_fields(&[0.0; 16], kind, ScaleDtype::Fp16);
            assert_eq!((f.scale, f.zero, f.decode(1.0), f.inverse()), (0.0, 0.0, 0.0, 0.0));
        }
        for kind in [ScaleKind::Minmax, ScaleKind::MeanAbsmax] {
            let f = block_fields(&[1.5; 64], kind, ScaleDtype::Fp16);
            assert_eq!((f.scale, f.decode(0.3)), (0.0, 1.5));
        }
    }

    #[test]
    fn rms_of_subnormal_numbers_is_finite() {
        let f = block_fields(&[1e-40; 16], ScaleKind::Rms, ScaleDtype::Fp32);
        assert!((f.scale / 1e-40 - 1.0).abs() < 1e-3, "{}", f.scale);
    }

    #[test]
    fn signed_absmax_takes_the_first_extreme() {
        let f = block_fields(&[1.0, -2.0, 2.0], ScaleKind::SignedAbsmax, ScaleDtype::Fp32);
        assert_eq!(f.scale, -2.0);
    }

    proptest! {
        #[test]
        fn e4m3_is_nearest(x in -500f32..500.0) {
            let best = (0..=255u8).filter(|b| b & 0x7f != 0x7f).map(e4m3_to_f32)
                .fold(f32::INFINITY, |m, v| m.min((v - x).abs()));
            prop_assert_eq!((e4m3_to_f32(e4m3_from_f32(x)) - x).abs(), best);
        }

        #[test]
        fn statistics_match_f64(x in proptest::collection::vec(-100f32..100.0, 1..300)) {
            let n = x.len() as f64;
            let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let rms = (x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / n).sqrt();
            let m = block_fields(&x, ScaleKind::MeanAbsmax, ScaleDtype::Fp32);
            prop_assert!((f64::from(m.zero) - mean).abs() < 1e-3);
            prop_assert!((f64::from(block_fields(&x, ScaleKind::Rms, ScaleDtype::Fp32).scale) - rms).abs() < 1e-3);
            let r = block_fields(&x, ScaleKind::Minmax, ScaleDtype::Fp32);
            for v in &x { prop_assert!((v - r.zero).abs() <= r.scale * 1.000_001); }
        }
    }
}
