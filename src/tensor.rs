//! Borrowed strided views of foreign tensors: what DLPack hands over, without DLPack.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Element types of keys, values, queries and outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE double.
    F64,
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name users know.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// By the name users know.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "float64" | "f64" => Ok(Self::F64),
            "float32" | "f32" => Ok(Self::F32),
            "float16" | "f16" => Ok(Self::F16),
            "bfloat16" | "bf16" => Ok(Self::Bf16),
            _ => Err(Error::dtype("dtype", "float64, float32, float16 or bfloat16", format!("{name:?}"))),
        }
    }

    /// Reads the element at `bytes`. Every type embeds in f64.
    #[inline]
    pub fn read(self, bytes: &[u8]) -> f64 {
        match self {
            Self::F64 => f64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")),
            Self::F32 => f64::from(f32::from_le_bytes(bytes[..4].try_into().expect("4 bytes"))),
            Self::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
            Self::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        }
    }

    /// Writes `x`, rounded once to nearest even.
    #[inline]
    pub fn write(self, bytes: &mut [u8], x: f64) {
        match self {
            Self::F64 => bytes[..8].copy_from_slice(&x.to_le_bytes()),
            Self::F32 => bytes[..4].copy_from_slice(&(x as f32).to_le_bytes()),
            Self::F16 => bytes[..2].copy_from_slice(&f16::from_f32(round_to_odd(x)).to_le_bytes()),
            Self::Bf16 => bytes[..2].copy_from_slice(&bf16::from_f32(round_to_odd(x)).to_le_bytes()),
        }
    }

    /// Reads consecutive elements as fp32 (a double is rounded once).
    pub fn read_f32(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F64 => out.iter_mut().zip(bytes.chunks_exact(8)).for_each(|(o, b)| *o = self.read(b) as f32),
            Self::F32 => out
                .iter_mut()
                .zip(bytes.chunks_exact(4))
                .for_each(|(o, b)| *o = f32::from_le_bytes(b.try_into().expect("4 bytes"))),
            Self::F16 => {
                out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = f16::from_le_bytes([b[0], b[1]]).to_f32())
            }
            Self::Bf16 => {
                out.iter_mut().zip(bytes.chunks_exact(2)).for_each(|(o, b)| *o = bf16::from_le_bytes([b[0], b[1]]).to_f32())
            }
        }
    }
}

/// f64 to f32 so that a second rounding to 16 bits decides as one from `x` would: of the two neighbours of an inexact `x`,
/// the one with an odd last bit. (`half` itself looks at the upper 32 bits of a double only.)
fn round_to_odd(x: f64) -> f32 {
    let y = x as f32;
    let bits = y.to_bits();
    if f64::from(y) == x || !y.is_finite() || bits & 1 == 1 {
        return y;
    }
    f32::from_bits(if x.abs() > f64::from(y).abs() { bits + 1 } else { bits - 1 })
}

impl Dtype {
    /// Writes consecutive elements from fp32, each rounded once to nearest even.
    pub fn write_f32(self, bytes: &mut [u8], x: &[f32]) {
        match self {
            Self::F64 => bytes.chunks_exact_mut(8).zip(x).for_each(|(b, &x)| b.copy_from_slice(&f64::from(x).to_le_bytes())),
            Self::F32 => bytes.chunks_exact_mut(4).zip(x).for_each(|(b, &x)| b.copy_from_slice(&x.to_le_bytes())),
            Self::F16 => bytes.chunks_exact_mut(2).zip(x).for_each(|(b, &x)| b.copy_from_slice(&f16::from_f32(x).to_le_bytes())),
            // Without branches, so that it vectorises: half's own conversion does not.
            Self::Bf16 => bytes.chunks_exact_mut(2).zip(x).for_each(|(b, &x)| {
                let bits = x.to_bits();
                let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
                let nan = (bits >> 16) as u16 | 0x40;
                b.copy_from_slice(&(if x.is_nan() { nan } else { rounded }).to_le_bytes());
            }),
        }
    }
}

/// A `[batch, heads, tokens, dim]` tensor in host memory, with any strides and any alignment.
#[derive(Debug, Clone, Copy)]
pub struct View {
    data: *const u8,
    dtype: Dtype,
    shape: [usize; 4],
    strides: [isize; 4],
}

// SAFETY: a View only reads; whoever makes one promises that the memory is alive and not written while the View is used.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// A view of foreign memory; strides are in elements.
    ///
    /// # Safety
    /// Every element that `shape` and `strides` reach from `data` must be readable, and unwritten by others, while the view
    /// or a copy of it is used.
    pub unsafe fn new(data: *const u8, dtype: Dtype, shape: [usize; 4], strides: [isize; 4]) -> Self {
        Self { data, dtype, shape, strides }
    }

    /// A view of a contiguous fp32 slice; panics unless the shape fits. The caller keeps the slice alive.
    #[cfg(test)]
    pub fn of(x: &[f32], shape: [usize; 4]) -> Self {
        assert_eq!(x.len(), shape.iter().product::<usize>());
        let [_, h, t, d] = shape.map(|s| s as isize);
        Self { data: x.as_ptr().cast(), dtype: Dtype::F32, shape, strides: [h * t * d, t * d, d, 1] }
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Writes the `dim` elements at `(b, h, t)` to `out` as `dtype`, each rounded once.
    pub fn copy_row(&self, b: usize, h: usize, t: usize, dtype: Dtype, out: &mut [u8]) {
        let (size, n) = (self.dtype.bytes(), self.shape[3]);
        assert!(b < self.shape[0] && h < self.shape[1] && t < self.shape[2] && out.len() == n * dtype.bytes());
        let at = b as isize * self.strides[0] + h as isize * self.strides[1] + t as isize * self.strides[2];
        // SAFETY: (b, h, t) lies inside the shape, all of which the maker of the view promised to be readable.
        let row = unsafe { self.data.offset(at * size as isize) };
        if self.strides[3] == 1 || n == 1 {
            // SAFETY: unit stride: the row's n elements are consecutive bytes.
            let bytes = unsafe { std::slice::from_raw_parts(row, n * size) };
            if dtype == self.dtype {
                out.copy_from_slice(bytes);
            } else {
                let pairs = out.chunks_exact_mut(dtype.bytes()).zip(bytes.chunks_exact(size));
                pairs.for_each(|(o, i)| dtype.write(o, self.dtype.read(i)));
            }
            return;
        }
        for (i, o) in out.chunks_exact_mut(dtype.bytes()).enumerate() {
            // SAFETY: element i of the row, inside the shape.
            let bytes = unsafe { std::slice::from_raw_parts(row.offset(i as isize * self.strides[3] * size as isize), size) };
            dtype.write(o, self.dtype.read(bytes));
        }
    }

    /// The `dim` elements at `(b, h, t)` as fp32, after rounding to `exact` as the exact part of a cache would.
    pub fn row_f32(&self, b: usize, h: usize, t: usize, exact: Dtype, scratch: &mut Vec<u8>, out: &mut [f32]) {
        scratch.resize(self.shape[3] * exact.bytes(), 0);
        self.copy_row(b, h, t, exact, scratch);
        exact.read_f32(scratch, out);
    }

    /// Refuses NaN, infinities, and numbers that `exact` cannot hold.
    pub fn check_finite(&self, what: &str, exact: Dtype) -> Result<()> {
        let [nb, nh, nt, nd] = self.shape;
        let mut row = vec![0u8; nd * exact.bytes()];
        for b in 0..nb {
            for h in 0..nh {
                for t in 0..nt {
                    self.copy_row(b, h, t, exact, &mut row);
                    let bad = row.chunks_exact(exact.bytes()).position(|x| !exact.read(x).is_finite());
                    if let Some(d) = bad {
                        let got = exact.read(&row[d * exact.bytes()..]);
                        let index = ((b * nh + h) * nt + t) * nd + d;
                        let note = if self.dtype == exact { String::new() } else { format!(" (as {})", exact.name()) };
                        return Err(Error::NonFinite { what: what.into(), index, got: format!("{got}{note}") });
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_rows_are_gathered_and_rounded() {
        let x: Vec<f32> = (0..24).map(|i| i as f32 + 0.001).collect();
        // [1, 2, 3, 4] seen with tokens and dims swapped: [1, 2, 4, 3].
        // SAFETY: the strides stay inside x.
        let v = unsafe { View::new(x.as_ptr().cast(), Dtype::F32, [1, 2, 4, 3], [24, 12, 1, 4]) };
        let mut out = [0f32; 3];
        v.row_f32(0, 1, 2, Dtype::F16, &mut Vec::new(), &mut out);
        assert_eq!(out, [14.0, 18.0, 22.0]);
        v.row_f32(0, 1, 2, Dtype::F32, &mut Vec::new(), &mut out);
        assert_eq!(out, [14.001, 18.001, 22.001]);
    }

    #[test]
    fn sixteen_bit_types_are_rounded_once() {
        let through = |d: Dtype, x: f64| {
            let mut bytes = [0; 2];
            d.write(&mut bytes, x);
            d.read(&bytes)
        };
        for (d, ulp) in [(Dtype::F16, 2f64.powi(-10)), (Dtype::Bf16, 2f64.powi(-7))] {
            for tiny in [2f64.powi(-22), 2f64.powi(-30), 2f64.powi(-52)] {
                for sign in [1.0, -1.0] {
                    assert_eq!(through(d, sign * (1.0 + ulp / 2.0 + tiny)), sign * (1.0 + ulp));
                    assert_eq!(through(d, sign * (1.0 + ulp * 1.5 - tiny)), sign * (1.0 + ulp));
                }
            }
            assert_eq!((through(d, 1.0 + ulp / 2.0), through(d, 1.0 + ulp * 1.5)), (1.0, 1.0 + ulp * 2.0));
            assert_eq!((through(d, 1e300), through(d, -1e-300)), (f64::INFINITY, 0.0));
            assert!(through(d, f64::NAN).is_nan());
        }
    }

    #[test]
    fn writing_from_fp32_rounds_as_half_does() {
        let around = |h: u16| [0, 0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(u32::from(h) << 16 | low));
        let x: Vec<f32> = (0..=u16::MAX).flat_map(around).collect();
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let z = dtype.bytes();
            let (mut fast, mut plain) = (vec![0; x.len() * z], vec![0; x.len() * z]);
            dtype.write_f32(&mut fast, &x);
            plain.chunks_exact_mut(z).zip(&x).for_each(|(b, &x)| dtype.write(b, f64::from(x)));
            for (i, v) in x.iter().enumerate() {
                let (a, b) = (dtype.read(&fast[i * z..]), dtype.read(&plain[i * z..]));
                assert!(a.to_bits() == b.to_bits() || (v.is_nan() && a.is_nan() && b.is_nan()), "{v} {a} {b}");
            }
        }
    }

    #[test]
    fn overflow_of_the_exact_dtype_is_not_finite() {
        let x = [1.0f32, 7e4, 3.0, f32::NAN];
        let v = View::of(&x, [1, 1, 2, 2]);
        let index = |d| match v.check_finite("k", d) {
            Err(Error::NonFinite { index, .. }) => index,
            other => panic!("{other:?}"),
        };
        assert_eq!((index(Dtype::F16), index(Dtype::F32)), (1, 3));
    }
}
