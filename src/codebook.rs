//! Codebooks: the sorted levels that codes stand for, and the thresholds between them.
//!
//! Levels are computed in f64 and rounded to f32 once. A threshold is the exact midpoint of its two f32 levels, stored as
//! the largest f32 that is not above it, so that `x > threshold` decides exactly for every f32 `x`: a code is the nearest
//! level, and a tie goes to the lower one.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use half::f16;

use crate::error::{Error, Result};

mod fit;

/// How the levels of a codebook come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// NF-k: normal quantiles with an exact zero, for block-wise absmax scales ("nf4").
    NormalQuantile,
    /// Least squared error for normal blocks of this size, divided by their absmax ("l2absmax4-64").
    L2Absmax {
        /// Elements per block that the fit assumes.
        block: usize,
    },
    /// Least squared error for normal blocks of this size, divided by their extreme with its sign ("l2signed4-64").
    L2SignedAbsmax {
        /// Elements per block that the fit assumes.
        block: usize,
    },
    /// Least squared error for N(0, 1) itself, in units of its standard deviation ("lloyd4").
    LloydMax,
    /// 2^b levels evenly over [-1, 1], for minimum to maximum scales ("uniform4").
    Uniform,
    /// 2^b - 1 levels i / (2^(b-1) - 1): signed integers without the lowest one ("int4").
    UniformSymmetric,
    /// The 15 numbers of the OCP format fp4 e2m1, divided by 6 ("e2m1"); codes are their rank, not the format's bits.
    E2m1,
    /// Levels given by the caller.
    Custom,
}

/// NF4 as published: the construction in fp32 with its offset printed to 7 digits, within 2e-7 of ours in f64. Used as
/// "nf4", so that codes and values are those of other implementations.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Up to this many levels a code is found by counting the thresholds below, without branches; above, by bisection.
const COUNTED: usize = 32;

/// 2 to 256 ascending levels and the thresholds between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    family: Family,
    name: String,
    bits: u8,
    levels: Vec<f32>,
    thresholds: Vec<f32>,
    fp16: bool,
}

/// The next f32 below a finite number.
fn step_down(x: f32) -> f32 {
    if x == 0.0 {
        return -f32::from_bits(1);
    }
    f32::from_bits(if x > 0.0 { x.to_bits() - 1 } else { x.to_bits() + 1 })
}

/// The largest f32 that is not above the midpoint of `a < b`.
fn midpoint(a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    let middle = (a + b) * 0.5;
    // What the sum lost, if the two are more than 29 binary digits apart.
    let lost = if a.abs() > b.abs() { b - (a + b - a) } else { a - (a + b - b) };
    let t = middle as f32;
    if f64::from(t) > middle || (f64::from(t) == middle && lost < 0.0) { step_down(t) } else { t }
}

impl Codebook {
    /// The codebook of a name: "nf2".."nf8", "l2absmax4-64" and "l2signed4-64" (1 to 8 bits, block of 2 to 65536),
    /// "lloyd1".."lloyd8", "uniform1".."uniform8", "int2".."int8", "e2m1", and "nf4-bnb" ([`Codebook::nf4_bitsandbytes`]).
    pub fn parse(name: &str) -> Result<Self> {
        let unknown = || {
            let known = "nf2..nf8, l2absmax<bits>-<block>, l2signed<bits>-<block>, lloyd1..lloyd8, uniform1..uniform8, \
                         int2..int8, e2m1 or nf4-bnb";
            Error::value("codebook", known, format!("{name:?}"))
        };
        if name == "e2m1" {
            return Self::build(Family::E2m1, 4);
        }
        if name == "nf4-bnb" {
            return Ok(Self::nf4_bitsandbytes());
        }
        let digits = name.find(|c: char| c.is_ascii_digit() && !name.starts_with("l2")).or_else(|| {
            // "l2absmax4-64": the bits stand after the word, whose own digit does not count.
            name.strip_prefix("l2").and_then(|rest| rest.find(|c: char| c.is_ascii_digit())).map(|i| i + 2)
        });
        let (word, rest) = name.split_at(digits.ok_or_else(unknown)?);
        let (bits, block) = match rest.split_once('-') {
            Some((bits, block)) => (bits, Some(block.parse::<usize>().map_err(|_| unknown())?)),
            None => (rest, None),
        };
        let family = match (word, block) {
            ("nf", None) => Family::NormalQuantile,
            ("l2absmax", Some(block)) => Family::L2Absmax { block },
            ("l2signed", Some(block)) => Family::L2SignedAbsmax { block },
            ("lloyd", None) => Family::LloydMax,
            ("uniform", None) => Family::Uniform,
            ("int", None) => Family::UniformSymmetric,
            _ => return Err(unknown()),
        };
        let book = Self::build(family, bits.parse().map_err(|_| unknown())?)?;
        // "nf04" would be a second name of the same book.
        if book.name == name { Ok(book) } else { Err(unknown()) }
    }

    /// A codebook of the caller's levels: 2 to 256, finite, strictly ascending. Its width is ceil(log2(count)).
    pub fn custom(levels: &[f32]) -> Result<Self> {
        let n = levels.len();
        if !(2..=256).contains(&n) {
            return Err(Error::value("levels", "2 to 256 levels", n));
        }
        if let Some(i) = levels.iter().position(|v| !v.is_finite()) {
            return Err(Error::value("levels", "finite numbers", format!("{} at index {i}", levels[i])));
        }
        if let Some(i) = levels.windows(2).position(|w| w[0] >= w[1]) {
            let got = format!("{} then {} at index {i}", levels[i], levels[i + 1]);
            return Err(Error::value("levels", "strictly ascending numbers", got));
        }
        let thresholds = levels.windows(2).map(|w| midpoint(w[0], w[1])).collect();
        let bits = n.next_power_of_two().trailing_zeros() as u8;
        Ok(Self { family: Family::Custom, name: "custom".into(), bits, levels: levels.to_vec(), thresholds, fp16: false })
    }

    /// NF4 with the thresholds of bitsandbytes: the same levels, but midpoints rounded to nearest in fp32. Six of the 15
    /// lie one step above the exact ones, which decides differently for exactly those six numbers.
    pub fn nf4_bitsandbytes() -> Self {
        let thresholds = NF4.windows(2).map(|w| (w[0] + w[1]) * 0.5).collect();
        let (family, name) = (Family::NormalQuantile, "nf4-bnb".into());
        Self { family, name, bits: 4, levels: NF4.to_vec(), thresholds, fp16: false }
    }

    /// A named family at a width.
    fn build(family: Family, bits: u8) -> Result<Self> {
        let (lowest, highest) = match family {
            Family::NormalQuantile | Family::UniformSymmetric => (2, 8),
            Family::E2m1 => (4, 4),
            _ => (1, 8),
        };
        if !(lowest..=highest).contains(&bits) {
            return Err(Error::value("codebook bits", format!("{lowest} to {highest} for {family:?}"), bits));
        }
        if let Family::L2Absmax { block } | Family::L2SignedAbsmax { block } = family
            && !(2..=65536).contains(&block)
        {
            return Err(Error::value("codebook block", "2 to 65536 elements", block));
        }
        let n = 1usize << bits;
        let evenly =
            |count: usize| (0..count).map(|i| (2.0 * i as f64 - (count - 1) as f64) / (count - 1) as f64).collect::<Vec<_>>();
        let (name, levels): (String, Vec<f32>) = match family {
            Family::NormalQuantile if bits == 4 => ("nf4".into(), NF4.to_vec()),
            Family::NormalQuantile => (format!("nf{bits}"), round(&normal_quantile(bits, outermost(bits)))),
            Family::L2Absmax { block } => (format!("l2absmax{bits}-{block}"), fitted(family, bits)),
            Family::L2SignedAbsmax { block } => (format!("l2signed{bits}-{block}"), fitted(family, bits)),
            Family::LloydMax => (format!("lloyd{bits}"), fitted(family, bits)),
            Family::Uniform => (format!("uniform{bits}"), round(&evenly(n))),
            Family::UniformSymmetric => (format!("int{bits}"), round(&evenly(n - 1))),
            Family::E2m1 => {
                let halves = [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12];
                ("e2m1".into(), round(&halves.map(|h| f64::from(h) / 12.0)))
            }
            Family::Custom => return Err(Error::unsupported("building a custom codebook by width", "its levels are given")),
        };
        Ok(Self { family, name, bits, ..Self::custom(&levels)? })
    }

    /// The same codebook with levels rounded to fp16, as pages use it, and the thresholds of the rounded levels. An error
    /// if two levels become one.
    pub fn to_fp16(&self) -> Result<Self> {
        let levels: Vec<f32> = self.levels.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
        let book = Self::custom(&levels).map_err(|_| {
            Error::value("codebook", "levels that stay finite and apart in fp16", format!("{} {:?}", self.name, self.levels))
        })?;
        Ok(Self { family: self.family, name: self.name.clone(), bits: self.bits, fp16: true, ..book })
    }

    /// The same family at another width (rounded to fp16 if this one is). Custom levels exist at their own width only.
    pub fn with_bits(&self, bits: u8) -> Result<Self> {
        if bits == self.bits {
            return Ok(self.clone());
        }
        if self.family == Family::Custom {
            return Err(Error::value("codebook bits", format!("{} (custom levels have one width)", self.bits), bits));
        }
        let book = Self::build(self.family, bits)?;
        if self.fp16 { book.to_fp16() } else { Ok(book) }
    }

    /// The levels, ascending. There may be fewer than 2^bits.
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }

    /// The thresholds, ascending, one fewer than levels: code `i` holds the `x` with `thresholds[i-1] < x <= thresholds[i]`.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Bits of a code, 1 to 8.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// The name that [`Codebook::parse`] takes, or "custom".
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the levels came about.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Code of the level nearest to `x`: the number of thresholds below it. A tie goes to the lower code, NaN to the code
    /// of 0.
    #[inline]
    pub fn encode(&self, x: f32) -> u8 {
        let x = if x.is_nan() { 0.0 } else { x };
        if self.levels.len() <= COUNTED {
            self.thresholds.iter().map(|&t| u8::from(x > t)).sum()
        } else {
            self.thresholds.partition_point(|&t| x > t) as u8
        }
    }

    /// [`Codebook::encode`] of every element. Panics if the lengths differ.
    pub fn encode_slice(&self, x: &[f32], out: &mut [u8]) {
        assert_eq!(x.len(), out.len(), "as many codes as numbers");
        if self.levels.len() > COUNTED {
            for (code, &v) in out.iter_mut().zip(x) {
                *code = self.encode(v);
            }
            return;
        }
        // Eight numbers against one threshold at a time: the compiler keeps numbers and counts in registers.
        let (heads, codes) = (x.chunks_exact(8), out.chunks_exact_mut(8));
        for (numbers, out) in heads.zip(codes) {
            let numbers: [f32; 8] = std::array::from_fn(|i| if numbers[i].is_nan() { 0.0 } else { numbers[i] });
            let mut counts = [0u32; 8];
            for &t in &self.thresholds {
                for (count, &v) in counts.iter_mut().zip(&numbers) {
                    *count += u32::from(v > t);
                }
            }
            for (code, count) in out.iter_mut().zip(counts) {
                *code = count as u8;
            }
        }
        let done = x.len() / 8 * 8;
        for (code, &v) in out[done..].iter_mut().zip(&x[done..]) {
            *code = self.encode(v);
        }
    }

    /// Code of the level nearest to 0.
    pub fn zero_code(&self) -> u8 {
        self.encode(0.0)
    }
}

fn round(levels: &[f64]) -> Vec<f32> {
    // Adding 0 turns a -0 into the 0 that other code compares with.
    levels.iter().map(|&v| v as f32 + 0.0).collect()
}

/// The outermost probability of NF-k: 1 - (1/2^(b+1) + 1/(2 (2^b - 1))) / 2, the mean of half a cell of 2^b and half a cell
/// of 2^b - 1. At 4 bits the published 0.9677083; for other widths nothing is published, and this is the same rule.
fn outermost(bits: u8) -> f64 {
    let n = f64::from(1u32 << bits);
    1.0 - (0.5 / n + 0.5 / (n - 1.0)) / 2.0
}

/// NF-k in f64: 2^(b-1) positive quantiles, 2^(b-1) - 1 negative ones and 0, divided by the largest.
fn normal_quantile(bits: u8, outermost: f64) -> Vec<f64> {
    let half = 1u32 << (bits - 1);
    let side =
        |count: u32| (0..count).map(move |i| fit::quantile(outermost + (0.5 - outermost) * f64::from(i) / f64::from(count)));
    let top = fit::quantile(outermost);
    let negative = side(half - 1).map(|v| -v / top);
    let positive: Vec<f64> = side(half).map(|v| v / top).collect();
    negative.chain(std::iter::once(0.0)).chain(positive.into_iter().rev()).collect()
}

/// Levels by family and width.
type Fits = HashMap<(Family, u8), Vec<f32>>;

/// The fitted families, each fitted once per process.
fn fitted(family: Family, bits: u8) -> Vec<f32> {
    static FITS: OnceLock<Mutex<Fits>> = OnceLock::new();
    // A panic inside a fit leaves the map as it was, so a poisoned lock is still good.
    let mut fits = FITS.get_or_init(Mutex::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let n = 1usize << bits;
    let fit = || match family {
        Family::L2Absmax { block } => round(&fit::extreme_normalised(n, block, false)),
        Family::L2SignedAbsmax { block } => round(&fit::extreme_normalised(n, block, true)),
        _ => round(&fit::lloyd_max(n)),
    };
    fits.entry((family, bits)).or_insert_with(fit).clone()
}

#[cfg(test)]
mod tests;
