//! Rotary embedding with the caller's angles.

use crate::error::{Error, Result};

/// Cosines and sines of the angle of each pair of channels at each token, `[batch or 1][tokens][pairs]`.
#[derive(Debug, Clone, Copy)]
pub struct Rope<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// 1 if all sequences have the same positions.
    pub batch: usize,
    /// Tokens.
    pub tokens: usize,
    /// The first `2 * pairs` channels are rotated, the rest passes.
    pub pairs: usize,
    /// Pair `i` is channels `2 i` and `2 i + 1`; otherwise `i` and `pairs + i`.
    pub interleaved: bool,
}

impl Rope<'_> {
    pub(super) fn check(&self, batch: usize, tokens: usize, dim: usize) -> Result<()> {
        let fits = (self.batch == 1 || self.batch == batch) && self.tokens == tokens && 2 * self.pairs <= dim;
        let held = self.batch * self.tokens * self.pairs;
        if fits && self.cos.len() == held && self.sin.len() == held {
            return Ok(());
        }
        let expected = format!("cos and sin of [1 or {batch}, {tokens}, up to {}]", dim / 2);
        let got = format!("[{}, {}, {}], {} and {} numbers", self.batch, self.tokens, self.pairs, self.cos.len(), self.sin.len());
        Err(Error::shape("rope", expected, got))
    }

    /// Rotates the token at `(b, t)`.
    pub fn row(&self, b: usize, t: usize, x: &mut [f32]) {
        let at = (if self.batch == 1 { 0 } else { b } * self.tokens + t) * self.pairs;
        let (cos, sin) = (&self.cos[at..][..self.pairs], &self.sin[at..][..self.pairs]);
        for (i, (c, s)) in cos.iter().zip(sin).enumerate() {
            let [i, j] = if self.interleaved { [2 * i, 2 * i + 1] } else { [i, self.pairs + i] };
            let (a, b) = (x[i], x[j]);
            x[i] = a * c - b * s;
            x[j] = b * c + a * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_turn_and_the_rest_passes() {
        let rope = Rope { cos: &[0.0, 1.0], sin: &[1.0, 0.0], batch: 1, tokens: 1, pairs: 2, interleaved: false };
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        rope.row(3, 0, &mut x);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0, 5.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0];
        Rope { interleaved: true, ..rope }.row(3, 0, &mut x);
        assert_eq!(x, [-2.0, 1.0, 3.0, 4.0, 5.0]);
    }
}
