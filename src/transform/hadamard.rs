//! The orthonormal Hadamard rotation of a head, its own inverse.

/// Channels that are rotated together: the largest power of two that divides the head size.
pub fn block_of(dim: usize) -> usize {
    if dim == 0 { 0 } else { 1 << dim.trailing_zeros() }
}

/// What sums and differences of a block are multiplied by.
pub fn unit(block: usize) -> f32 {
    (1.0 / (block as f64).sqrt()) as f32
}

/// Rotates each block of [`block_of`] channels: sums and differences of neighbours at distance 1, 2, 4, ..., then one
/// multiplication.
pub fn rotate(x: &mut [f32]) {
    let block = block_of(x.len());
    for part in x.chunks_exact_mut(block.max(1)) {
        let mut distance = 1;
        while distance < block {
            for pairs in part.chunks_exact_mut(2 * distance) {
                let (low, high) = pairs.split_at_mut(distance);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            distance *= 2;
        }
        part.iter_mut().for_each(|x| *x *= unit(block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_rotation_and_its_own_inverse() {
        for dim in [2, 16, 64, 80, 96, 128, 256] {
            let x: Vec<f32> = (0..dim).map(|i| ((i * 31 % 17) as f32 - 8.0) / 3.0).collect();
            let mut y = x.clone();
            rotate(&mut y);
            let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            assert!((norm(&x) / norm(&y) - 1.0).abs() < 1e-5);
            assert!(x.iter().zip(&y).any(|(x, y)| (x - y).abs() > 0.1));
            rotate(&mut y);
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-5));
        }
    }

    #[test]
    fn an_outlier_is_spread_over_its_block() {
        let mut x = [0.0; 64];
        x[5] = 8.0;
        rotate(&mut x);
        assert!(x.iter().all(|x| x.abs() == 1.0));
    }
}
