//! Vector arithmetic that attention needs, compiled once for any machine and once for AVX2: exponentials, hyperbolic
//! tangents, and a small matrix product.

/// Instructions to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Simd {
    /// Whatever the target has.
    Portable,
    /// AVX2, FMA and F16C, found at run time.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Those, and AVX-512 with 16-bit elements and VNNI for the innermost loops.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Simd {
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            let wide = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            return if wide && is_x86_feature_detected!("avx512vnni") { Self::Avx512 } else { Self::Avx2 };
        }
        Self::Portable
    }

    /// Whether there are AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn avx2(self) -> bool {
        self != Self::Portable
    }

    /// Whether the innermost loops have AVX-512.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn avx512(self) -> bool {
        self == Self::Avx512
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        }
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        match Self::detect() {
            Self::Portable => vec![Self::Portable],
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => vec![Self::Portable, Self::Avx2],
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => vec![Self::Portable, Self::Avx2, Self::Avx512],
        }
    }
}

/// e^x within 2e-7 relative, no branches; 0 below -87. Plain products and sums, so that every build gives the same bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer of x / ln 2 in the low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let clamped = if clamped > 88.0 { 88.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    // Taylor: |r| <= 0.347, the first term left out is below 6e-9. In pairs, so that few steps wait for each other.
    let s = r * r;
    let (a, b, c) = (0.5 + r * (1.0 / 6.0), 1.0 / 24.0 + r * (1.0 / 120.0), 1.0 / 720.0 + r * (1.0 / 5040.0));
    let p = 1.0 + (r + s * (a + s * (b + s * c)));
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

/// tanh(x) within 1e-6 relative, no branches: (e^2x - 1) / (e^2x + 1), the difference by its own series near 0.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let y = 2.0 * x.abs();
    let series = y * (1.0 + y * (0.5 + y * (1.0 / 6.0 + y * (1.0 / 24.0 + y * (1.0 / 120.0 + y * (1.0 / 720.0))))));
    let large = exp(if y > 40.0 { 40.0 } else { y }) - 1.0;
    let m = if y < 0.35 { series } else { large };
    let t = (m / (m + 2.0)).copysign(x);
    if x.is_nan() { x } else { t }
}

/// The body of [`soft_cap`], inlined into each of its builds.
#[inline(always)]
fn soft_cap_body(x: &mut [f32], cap: f32) {
    let inverse = 1.0 / cap;
    x.iter_mut().for_each(|v| *v = cap * tanh(*v * inverse));
}

/// Replaces each `x` by `exp(x - max)` and returns their sum: eight partial sums, added in a fixed order.
pub(super) fn exp_sum(simd: Simd, x: &mut [f32], max: f32) -> f32 {
    let (eights, rest) = x.split_at_mut(x.len() / 8 * 8);
    let mut sums = [0f32; 8];
    #[cfg(target_arch = "x86_64")]
    let done = simd.avx2();
    #[cfg(not(target_arch = "x86_64"))]
    let done = false;
    #[cfg(target_arch = "x86_64")]
    if done {
        // SAFETY: the features were found.
        sums = unsafe {
            if simd.avx512() { super::exponentials::sums_avx512(eights, max) } else { super::exponentials::sums(eights, max) }
        };
    }
    let _ = simd;
    let parts = if done { &mut [] } else { eights };
    for part in parts.chunks_exact_mut(8).chain([rest]) {
        for (v, s) in part.iter_mut().zip(&mut sums) {
            *v = exp(*v - max);
            *s += *v;
        }
    }
    ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))
}

/// The body of [`max`].
#[inline(always)]
fn max_body(x: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; 8];
    let eights = x.chunks_exact(8);
    let rest = eights.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for eight in eights {
        for (t, &v) in tops.iter_mut().zip(eight) {
            *t = if v > *t { v } else { *t };
        }
    }
    tops.into_iter().fold(rest, f32::max)
}

/// Compiles a body for AVX2 too, and chooses.
macro_rules! dispatch {
    ($(#[$doc:meta])* $name:ident, $body:ident, ($($arg:ident: $type:ty),*) $(-> $ret:ty)?) => {
        $(#[$doc])*
        pub(super) fn $name(simd: Simd, $($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $type),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if simd.avx2() {
                    // SAFETY: these exist only where these features were found.
                    return unsafe { avx2($($arg),*) };
                }
            }
            let _ = simd;
            $body($($arg),*)
        }
    };
}

dispatch!(/// Replaces scores by `cap * tanh(score / cap)`.
    soft_cap, soft_cap_body, (x: &mut [f32], cap: f32));
dispatch!(/// The largest element; minus infinity if there is none.
    max, max_body, (x: &[f32]) -> f32);

/// `c[i][j] += sum over k of a[i][k] * b[k][j]`: `rows` rows, `depth` products, `width` columns (a multiple of 16).
/// Strides are in elements.
pub(super) struct Product<'a> {
    pub(super) a: &'a [f32],
    pub(super) a_stride: usize,
    pub(super) b: &'a [f32],
    pub(super) b_stride: usize,
    pub(super) c_stride: usize,
    pub(super) rows: usize,
    pub(super) depth: usize,
    pub(super) width: usize,
}

impl Product<'_> {
    pub(super) fn run(&self, simd: Simd, c: &mut [f32]) {
        if self.rows == 0 || self.width == 0 || self.depth == 0 {
            return;
        }
        assert!(self.width / 16 * 16 == self.width && self.width <= self.c_stride.max(self.width));
        assert!((self.rows - 1) * self.a_stride + self.depth <= self.a.len());
        assert!((self.depth - 1) * self.b_stride + self.width <= self.b.len());
        assert!((self.rows - 1) * self.c_stride + self.width <= c.len());
        #[cfg(target_arch = "x86_64")]
        if simd.avx2() {
            // SAFETY: the features were found; the bounds were checked above.
            return unsafe { super::avx2::product(self, c) };
        }
        let _ = simd;
        for j in (0..self.width).step_by(16) {
            for i in 0..self.rows {
                let to = &mut c[i * self.c_stride + j..][..16];
                let mut sum: [f32; 16] = to.try_into().expect("16 columns");
                for k in 0..self.depth {
                    let (a, b) = (self.a[i * self.a_stride + k], &self.b[k * self.b_stride + j..][..16]);
                    sum.iter_mut().zip(b).for_each(|(s, &b)| *s += a * b);
                }
                to.copy_from_slice(&sum);
            }
        }
    }
}

/// Scores of tokens that lie one after the other: `c[i * c_stride + n]` is the product of row `i` of `a`, `[rows][depth]`, with row
/// `n` of `b`, `[..][depth]`.
pub(super) fn scores(simd: Simd, a: &[f32], b: &[f32], depth: usize, c: &mut [f32], c_stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if simd.avx2() {
        // SAFETY: the features were found.
        return unsafe { super::avx2::scores(a, b, depth, c, c_stride) };
    }
    let _ = simd;
    for (a, c) in a.chunks_exact(depth).zip(c.chunks_mut(c_stride)) {
        for (b, c) in b.chunks_exact(depth).zip(c) {
            *c = a.iter().zip(b).map(|(a, b)| a * b).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_and_tangents_are_close() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 2e-7 * want, "exp({x}) = {} for {want}", exp(x));
            let y = x * 0.1;
            let want = f64::from(y).tanh();
            assert!((f64::from(tanh(y)) - want).abs() <= 1e-6 * want.abs(), "tanh({y}) = {} for {want}", tanh(y));
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(0.0), tanh(0.0), tanh(1e30)), (0.0, 1.0, 0.0, 1.0));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }

    #[test]
    fn scores_are_products_of_rows() {
        for (rows, tokens, depth) in [(1, 1, 5), (4, 2, 8), (7, 9, 20), (3, 64, 33), (6, 5, 128)] {
            let of = |n: usize, s: f32| (0..n).map(|i| (i as f32 * s).sin()).collect::<Vec<_>>();
            let (a, b, stride) = (of(rows * depth, 0.7), of(tokens * depth, 0.3), tokens + 3);
            for simd in Simd::all() {
                let mut c = vec![f32::NAN; rows * stride];
                scores(simd, &a, &b, depth, &mut c, stride);
                for (i, n) in (0..rows).flat_map(|i| (0..stride).map(move |n| (i, n))) {
                    let got = c[i * stride + n];
                    let want = || (0..depth).map(|k| f64::from(a[i * depth + k]) * f64::from(b[n * depth + k])).sum::<f64>();
                    assert!(if n < tokens { (f64::from(got) - want()).abs() < 1e-4 } else { got.is_nan() }, "{rows} {i} {n}");
                }
            }
        }
    }

    #[test]
    fn every_build_gives_the_same_numbers() {
        let all: Vec<f32> = (0..1003).map(|i| (i as f32 * 0.37).sin() * 46.0).collect();
        for x in [&all[..], &all[..992]] {
            let (top, mut want) = (max(Simd::Portable, x), x.to_vec());
            let sum = exp_sum(Simd::Portable, &mut want, top);
            for simd in Simd::all() {
                let mut got = x.to_vec();
                assert!(exp_sum(simd, &mut got, top) == sum && got == want && max(simd, x) == top, "{simd:?}");
            }
        }
    }
}
