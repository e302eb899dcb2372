//! The numbers behind the codebooks, in f64: the normal distribution, and levels of least squared error for a density.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Standard normal density.
fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// Error function, by the series whose terms are all positive.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 0.5);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= x * x / n;
        sum += term;
    }
    sum * 2.0 / PI.sqrt() * (-x * x).exp()
}

/// Complementary error function of `x >= 2`, by its continued fraction from the far end; the depth gives 1e-16.
fn erfc_fraction(x: f64) -> f64 {
    let depth = (20.0 + 100.0 / (x * x)) as i32;
    let tail = (1..=depth).rev().fold(0.0, |f, k| 0.5 * f64::from(k) / (x + f));
    (-x * x).exp() / (PI.sqrt() * (x + tail))
}

fn erf(x: f64) -> f64 {
    if x.abs() < 2.0 { erf_series(x) } else { (1.0 - erfc_fraction(x.abs())).copysign(x) }
}

/// Probability that a normal number is above `x`.
fn upper_tail(x: f64) -> f64 {
    let y = x * FRAC_1_SQRT_2;
    if y.abs() < 2.0 {
        0.5 * (1.0 - erf_series(y))
    } else if y > 0.0 {
        0.5 * erfc_fraction(y)
    } else {
        1.0 - 0.5 * erfc_fraction(-y)
    }
}

/// Quantile of the standard normal distribution for `0 < p < 1`: Newton's method on log tail probability, where the tail
/// is nearly a parabola, from a start good to a percent.
pub(super) fn quantile(p: f64) -> f64 {
    let (q, sign) = if p < 0.5 { (p, -1.0) } else { (1.0 - p, 1.0) };
    if q == 0.5 {
        return 0.0;
    }
    let t = (-2.0 * q.ln()).sqrt();
    let mut x = (t - (2.30753 + 0.27061 * t) / (1.0 + 0.99229 * t + 0.04481 * t * t)).max(0.0);
    for _ in 0..50 {
        let tail = upper_tail(x);
        let step = (tail / q).ln() * tail / density(x);
        x += step;
        if step.abs() <= 1e-15 * x.abs() {
            break;
        }
    }
    sign * x
}

/// A density seen from a point: mass and first moment below it (from any fixed origin), and its height there.
#[derive(Clone, Copy)]
struct Point {
    mass: f64,
    moment: f64,
    height: f64,
}

/// Levels of least squared error for a density: Lloyd's iteration (each level becomes the mean of its cell), which finds the
/// neighbourhood, then Newton's method on the same equations, whose Jacobian is tridiagonal.
///
/// `ends` are the points at the two ends of the support, `atoms` the masses that sit exactly on -1 and +1.
fn least_squares(mut levels: Vec<f64>, at: impl Fn(f64) -> Point, ends: [Point; 2], atoms: [f64; 2]) -> Vec<f64> {
    let n = levels.len();
    for round in 0..200 {
        let points: Vec<Point> = std::iter::once(ends[0])
            .chain(levels.windows(2).map(|w| at(0.5 * (w[0] + w[1]))))
            .chain(std::iter::once(ends[1]))
            .collect();
        // Mass and first moment of every cell.
        let cells: Vec<(f64, f64)> = (0..n)
            .map(|i| {
                let (lower, upper) = (if i == 0 { atoms[0] } else { 0.0 }, if i + 1 == n { atoms[1] } else { 0.0 });
                let (a, b) = (points[i], points[i + 1]);
                (b.mass - a.mass + lower + upper, b.moment - a.moment + upper - lower)
            })
            .collect();
        let lloyd: Vec<f64> = cells.iter().map(|(mass, moment)| moment / mass).collect();
        let next = if round < 4 { lloyd } else { newton(&levels, &points, &cells).unwrap_or(lloyd) };
        let change = levels.iter().zip(&next).fold(0f64, |m, (a, b)| m.max((a - b).abs()));
        levels = next;
        // Newton's error is the square of its step; rounding noise at 256 levels is near 1e-10.
        if change < 1e-9 {
            break;
        }
    }
    levels
}

/// One Newton step on `level * mass - moment = 0` for all cells, halved until it leaves the levels sorted; none if only a
/// tiny one would.
fn newton(levels: &[f64], points: &[Point], cells: &[(f64, f64)]) -> Option<Vec<f64>> {
    let n = levels.len();
    // What moving threshold i costs each of its two neighbours: half its distance from them times the height there.
    let slope = |i: usize| 0.25 * (levels[i] - levels[i - 1]) * points[i].height;
    let (mut diagonal, mut right) = (vec![0.0; n], vec![0.0; n]);
    for i in 0..n {
        let (lower, upper) = (if i == 0 { 0.0 } else { slope(i) }, if i + 1 == n { 0.0 } else { slope(i + 1) });
        diagonal[i] = cells[i].0 - lower - upper;
        right[i] = cells[i].1 - levels[i] * cells[i].0;
    }
    // Off-diagonal entries are -slope; forward elimination, then back substitution.
    for i in 1..n {
        let s = slope(i);
        let factor = -s / diagonal[i - 1];
        diagonal[i] += factor * s;
        right[i] -= factor * right[i - 1];
    }
    let mut next = vec![0.0; n];
    for i in (0..n).rev() {
        let above = if i + 1 == n { 0.0 } else { slope(i + 1) * next[i + 1] };
        next[i] = (right[i] + above) / diagonal[i];
    }
    (0..6).find_map(|halvings| {
        let moved: Vec<f64> = levels.iter().zip(&next).map(|(level, step)| level + step / f64::from(1 << halvings)).collect();
        moved.windows(2).all(|w| w[0] < w[1]).then_some(moved)
    })
}

/// The mean of a list and its own mirror image: takes the last rounding noise out of a symmetric fit.
fn symmetric(levels: &[f64]) -> Vec<f64> {
    levels.iter().zip(levels.iter().rev()).map(|(a, b)| 0.5 * (a - b)).collect()
}

/// Lloyd-Max levels of N(0, 1).
pub(super) fn lloyd_max(n: usize) -> Vec<f64> {
    let at = |x: f64| Point { mass: 0.5 * erf(x * FRAC_1_SQRT_2), moment: -density(x), height: density(x) };
    let ends = [-0.5, 0.5].map(|mass| Point { mass, moment: 0.0, height: 0.0 });
    // Where many levels go: quantiles of the cube root of the density, which is a normal density of variance 3.
    let start = (0..n).map(|i| 3f64.sqrt() * quantile((i as f64 + 0.5) / n as f64)).collect();
    symmetric(&least_squares(start, at, ends, [0.0, 0.0]))
}

/// Levels of least squared error for blocks of `block` independent normal numbers, each divided by the block's extreme: its
/// magnitude, or (`signed`) the element itself, so that the extreme is always +1.
///
/// The largest magnitude M of a block has density `2 B phi(m) P(m)^(B-1)` with `P(m)` the mass of [-m, m]. One element
/// lies on +-M; given M, the others are normal numbers cut off at +-M. Errors count in units of x, so z = x / M weighs M^2.
/// The integral over M is a trapezoid sum, which is accurate far beyond fp32 for an integrand that vanishes at both ends.
pub(super) fn extreme_normalised(n: usize, block: usize, signed: bool) -> Vec<f64> {
    let others = block as f64 - 1.0;
    let (mut nodes, mut atom) = (Vec::new(), 0.0);
    for j in 1..=160 {
        let m = f64::from(j) / 16.0;
        let log_inside = (-2.0 * upper_tail(m)).ln_1p();
        // The factor 2 B is common to everything and left out.
        let weight = others * density(m) * ((others - 1.0) * log_inside).exp();
        atom += density(m) * (others * log_inside).exp() * m * m;
        if weight > 1e-18 {
            nodes.push((m, weight));
        }
    }
    let at = |z: f64| {
        nodes.iter().fold(Point { mass: 0.0, moment: 0.0, height: 0.0 }, |p, &(m, weight)| {
            let (x, w) = (z * m, weight * m);
            let d = w * density(x);
            Point { mass: p.mass + w * m * 0.5 * erf(x * FRAC_1_SQRT_2), moment: p.moment - d, height: p.height + d * m * m }
        })
    };
    let atoms = if signed { [0.0, atom] } else { [0.5 * atom; 2] };
    // Many levels lie at the quantiles of the cube root of the density.
    let cells = 1024;
    let centre = |j: usize| (2 * j + 1) as f64 / f64::from(cells) - 1.0;
    let roots: Vec<f64> = (0..cells as usize).map(|j| at(centre(j)).height.cbrt()).collect();
    let total: f64 = roots.iter().sum();
    let (mut j, mut below) = (0, 0.0);
    let start = (0..n)
        .map(|i| {
            let want = (i as f64 + 0.5) / n as f64 * total;
            while j + 1 < roots.len() && below + roots[j] < want {
                below += roots[j];
                j += 1;
            }
            centre(j) + 2.0 / f64::from(cells) * ((want - below) / roots[j] - 0.5)
        })
        .collect();
    let levels = least_squares(start, at, [at(-1.0), at(1.0)], atoms);
    if signed { levels } else { symmetric(&levels) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_match_published_digits_and_invert_the_distribution() {
        for (p, x) in [
            (0.975, 1.959_963_984_540_054),
            (0.75, 0.674_489_750_196_081_7),
            (0.999, 3.090_232_306_167_813_5),
            (1e-9, -5.997_807_015_007_687),
        ] {
            assert!((quantile(p) - x).abs() < 3e-15 * x.abs().max(1.0), "quantile({p}) = {} instead of {x}", quantile(p));
        }
        for i in 1..1000 {
            let p = f64::from(i) / 1000.0;
            assert!((1.0 - upper_tail(quantile(p)) - p).abs() < 1e-15, "{p}");
        }
        assert_eq!(quantile(0.5), 0.0);
    }

    #[test]
    fn both_forms_of_the_error_function_meet() {
        for x in [2.0, 2.2, 2.5] {
            assert!((erf_series(x) + erfc_fraction(x) - 1.0).abs() < 1e-15, "{x}");
        }
    }

    #[test]
    fn every_level_is_the_mean_of_its_cell() {
        let c = lloyd_max(256);
        for w in c.windows(3).skip(1) {
            let (a, b) = (0.5 * (w[0] + w[1]), 0.5 * (w[1] + w[2]));
            let mean = (density(a) - density(b)) / (upper_tail(a) - upper_tail(b));
            assert!((mean - w[1]).abs() < 1e-9, "{mean} {}", w[1]);
        }
    }
}
