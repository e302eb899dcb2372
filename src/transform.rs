//! What is done to keys and values on their way in, before the codec sees them: rotary embedding, then centring, then a
//! Hadamard rotation. Attention can take all of it back: queries are rotated alike, softmax does not see a vector that is
//! subtracted from every key of a head, and the output of rotated values is rotated back.
//!
//! Everything is fp32, each operation rounded by itself in a fixed order, so that every device gives the same bits.

mod hadamard;
mod rope;

pub use self::hadamard::{block_of, rotate, unit};
pub use self::rope::Rope;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::{Dtype, View};

/// The parts of a transform; none of them leaves numbers as they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transform<'a> {
    /// Rotary embedding of the tokens.
    pub rope: Option<Rope<'a>>,
    /// Subtracted from every token, `[heads][dim]`.
    pub centre: Option<&'a [f32]>,
    /// Rotate by [`rotate`].
    pub hadamard: bool,
}

impl Transform<'_> {
    /// Refuses parts that do not fit a `[batch, heads, tokens, dim]` tensor.
    pub fn check(&self, shape: [usize; 4]) -> Result<()> {
        let [batch, heads, tokens, dim] = shape;
        if let Some(rope) = &self.rope {
            rope.check(batch, tokens, dim)?;
        }
        match self.centre {
            Some(c) if c.len() != heads * dim => {
                return Err(Error::shape("centre", format!("[{heads}, {dim}]"), format!("{} numbers", c.len())));
            }
            _ => {}
        }
        if self.hadamard && block_of(dim) < 2 {
            return Err(Error::value("head size for a Hadamard rotation", "an even number", dim));
        }
        Ok(())
    }

    /// Changes the token at `(b, h, t)`.
    pub fn row(&self, b: usize, h: usize, t: usize, x: &mut [f32]) {
        if let Some(rope) = &self.rope {
            rope.row(b, t, x);
        }
        if let Some(c) = self.centre {
            let c = &c[h * x.len()..];
            x.iter_mut().zip(c).for_each(|(x, c)| *x -= c);
        }
        if self.hadamard {
            rotate(x);
        }
    }

    /// Writes `x`, changed, to `out`: contiguous, of the same shape, each number rounded once to `dtype`.
    pub fn apply(&self, x: &View, dtype: Dtype, out: &mut [u8]) -> Result<()> {
        let [batch, heads, tokens, dim] = x.shape();
        self.check(x.shape())?;
        if out.len() != batch * heads * tokens * dim * dtype.bytes() {
            return Err(Error::shape("out", format!("{:?}", x.shape()), format!("{} bytes", out.len())));
        }
        if out.is_empty() {
            return Ok(());
        }
        // Tokens of a piece of work.
        const SHARE: usize = 64;
        let bytes = dim * dtype.bytes();
        out.par_chunks_mut(SHARE * bytes).enumerate().for_each(|(first, rows)| {
            let (mut row, mut scratch) = (vec![0f32; dim], Vec::new());
            for (i, out) in rows.chunks_exact_mut(bytes).enumerate() {
                let i = first * SHARE + i;
                let [b, h, t] = [i / tokens / heads, i / tokens % heads, i % tokens];
                x.row_f32(b, h, t, Dtype::F32, &mut scratch, &mut row);
                self.row(b, h, t, &mut row);
                dtype.write_f32(out, &row);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_come_in_order_and_scores_stay() {
        let (batch, heads, tokens, dim) = (2, 2, 3, 32);
        let k: Vec<f32> = (0..batch * heads * tokens * dim).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect();
        let angle = |i: usize| (i as f32 * 0.37).sin_cos();
        let (sin, cos): (Vec<f32>, Vec<f32>) = (0..batch * tokens * 16).map(angle).unzip();
        let rope = Rope { cos: &cos, sin: &sin, batch, tokens, pairs: 16, interleaved: false };
        let centre: Vec<f32> = (0..heads * dim).map(|i| i as f32 * 0.1).collect();
        let all = Transform { rope: Some(rope), centre: Some(&centre), hadamard: true };
        let shape = [batch, heads, tokens, dim];
        let mut out = vec![0u8; k.len() * 4];
        all.apply(&View::of(&k, shape), Dtype::F32, &mut out).unwrap();
        let mut changed = vec![0f32; k.len()];
        Dtype::F32.read_f32(&out, &mut changed);
        // The scores of a query that is changed alike differ by one constant for each query and head.
        let q: Vec<f32> = (0..dim).map(|i| ((i * 7 % 13) as f32 - 6.0) / 5.0).collect();
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        for b in 0..batch {
            for h in 0..heads {
                let (mut roped, mut query) = (q.clone(), q.clone());
                rope.row(b, 2, &mut roped);
                rope.row(b, 2, &mut query);
                rotate(&mut query);
                let constant = dot(&roped, &centre[h * dim..][..dim]);
                for t in 0..tokens {
                    let at = ((b * heads + h) * tokens + t) * dim;
                    let mut key = k[at..][..dim].to_vec();
                    rope.row(b, t, &mut key);
                    let expected = dot(&roped, &key) - constant;
                    assert!((dot(&query, &changed[at..][..dim]) - expected).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let numbers = [0f32; 64];
        let rope = |pairs| Rope { cos: &numbers[..pairs], sin: &numbers[..pairs], batch: 1, tokens: 1, pairs, interleaved: true };
        let with = |rope| Transform { rope: Some(rope), ..Transform::default() };
        assert!(with(rope(16)).check([2, 1, 1, 32]).is_ok());
        assert!(with(rope(17)).check([2, 1, 1, 32]).is_err());
        assert!(with(rope(8)).check([2, 1, 2, 32]).is_err());
        assert!(with(Rope { sin: &numbers[..3], ..rope(8) }).check([2, 1, 1, 32]).is_err());
        assert!(with(Rope { batch: 3, ..rope(8) }).check([2, 1, 1, 32]).is_err());
        assert!(Transform { centre: Some(&numbers), ..Transform::default() }.check([1, 2, 5, 32]).is_ok());
        assert!(Transform { centre: Some(&numbers), ..Transform::default() }.check([1, 2, 5, 16]).is_err());
        assert!(Transform { hadamard: true, ..Transform::default() }.check([1, 2, 5, 21]).is_err());
    }
}
