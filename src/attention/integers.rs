//! The innermost loops in 16-bit integers: levels of 4-bit codes, times queries or weights rounded to 16 bits.
//!
//! Two byte tables of 16 entries give the levels of 32 codes. A byte shuffle in front brings codes of one token (keys: channels
//! `c, c + 8`) or one channel (values: tokens `n, n + 8`) side by side, so that one instruction multiplies 16 levels and adds
//! neighbours in 32 bits. Sums are 32-bit until they are added to fp32 ones, every [`FLUSH`] slabs (keys) or [`GROUP`] pages
//! (values); what was laid out is scaled so that they cannot overflow.

use std::arch::x86_64::*;
use std::sync::{Arc, Mutex, PoisonError};

use super::codes::{Lane, SLAB};

/// Slabs after which sums of keys become fp32.
pub(super) const FLUSH: usize = 2;
/// Pages after which sums of values become fp32.
pub(super) const GROUP: usize = 4;
/// What a 32-bit sum may reach, with room for rounding each factor up.
pub(super) const RANGE: f32 = 2_147_000_000.0;

/// What a line of 64 bytes is multiplied with: 16-bit integers for its first 32 bytes, then for the others. Where each 32 tokens
/// have their own, one for each of these, and another for the line's second half.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Words(pub(super) [i16; 32]);

/// 16 levels as integers: `step` times them is close to the levels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Levels {
    /// Low and high byte of each integer.
    bytes: [[u8; 16]; 2],
    /// The integers twice: a table for five bits of which the upper one says nothing.
    pub(super) twice: [i16; 32],
    pub(super) step: f32,
    /// Largest magnitude.
    pub(super) top: f32,
    /// Root mean square of the integers, and of their distance from the levels in steps.
    pub(super) rms: f32,
    pub(super) error: f32,
}

impl Levels {
    /// The best integers for these levels. Levels already seen are remembered: there are few codebooks, and searching costs
    /// more than attention over a short context.
    pub(super) fn of(levels: &[f32; 16]) -> Arc<Self> {
        type Known = Vec<([u32; 16], Arc<Levels>)>;
        static KNOWN: Mutex<Known> = Mutex::new(Vec::new());
        let bits = levels.map(f32::to_bits);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = known.iter().find(|k| k.0 == bits) {
            return found.clone();
        }
        let new = Arc::new(Self::search(levels));
        if known.len() >= 64 {
            known.remove(0);
        }
        known.push((bits, new.clone()));
        new
    }

    /// The largest integer takes what the other factor leaves of 32 bits: between the tops below, both round about equally.
    fn search(levels: &[f32; 16]) -> Self {
        let most = levels.iter().fold(0f32, |m, l| m.max(l.abs())).max(f32::MIN_POSITIVE);
        // Adding and taking away 1.5 * 2^23 rounds to an integer.
        let nearest = |x: f32| (x + 12_582_912.0) - 12_582_912.0;
        let round = |top: u16| levels.map(|l| nearest(l / most * f32::from(top)));
        let distance = |top: u16| {
            let off = |(l, r): (&f32, f32)| (l / most * f32::from(top) - r).powi(2);
            levels.iter().zip(round(top)).map(off).sum::<f32>() / 16.0
        };
        // The error relative to the levels counts; tops of the same one are as good as the first.
        let relative = |top: u16| distance(top) / f32::from(top).powi(2);
        let best = (10_000..=18_000).min_by(|&a, &b| relative(a).total_cmp(&relative(b))).expect("a range");
        let words = round(best);
        let square = words.iter().map(|w| w * w).sum::<f32>() / 16.0;
        Self {
            twice: std::array::from_fn(|i| words[i % 16] as i16),
            bytes: [0, 1].map(|byte| words.map(|w| (w as i16).to_le_bytes()[byte])),
            step: most / f32::from(best),
            top: f32::from(best),
            rms: square.sqrt(),
            error: distance(best).sqrt(),
        }
    }

    /// The integer of a code.
    #[cfg(test)]
    pub(super) fn word(&self, code: usize) -> f32 {
        f32::from(i16::from_le_bytes(self.bytes.map(|b| b[code])))
    }

    /// As registers, and a mask for nibbles.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load(&self) -> [__m256i; 3] {
        // SAFETY: each table has 16 bytes.
        let [low, high] = self.bytes.map(|t| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(t.as_ptr().cast())) });
        [low, high, _mm256_set1_epi8(15)]
    }
}

/// Products of one column: `{y}` and `{x}` are levels. One operand for both, or one for each.
macro_rules! shared {
    ($low:ident $high:ident $at:literal) => {
        concat!(
            "vpmaddwd {t}, {y}, ymmword ptr [{w} + ",
            $at,
            "]\nvpmaddwd {a}, {x}, ymmword ptr [{w} + ",
            $at,
            "]\n",
            "vpaddd {",
            stringify!($low),
            "}, {",
            stringify!($low),
            "}, {t}\n",
            "vpaddd {",
            stringify!($high),
            "}, {",
            stringify!($high),
            "}, {a}"
        )
    };
}
macro_rules! split {
    ($low:ident $high:ident $at:literal) => {
        concat!(
            "vpmaddwd {t}, {y}, ymmword ptr [{w} + ",
            $at,
            "]\nvpmaddwd {a}, {x}, ymmword ptr [{w} + ",
            $at,
            " + 32]\n",
            "vpaddd {",
            stringify!($low),
            "}, {",
            stringify!($low),
            "}, {t}\n",
            "vpaddd {",
            stringify!($high),
            "}, {",
            stringify!($high),
            "}, {a}"
        )
    };
}

/// The body of [`multiply_add`], for columns with their two sums and the places of their operands.
macro_rules! body {
    ($column:ident, $sums:ident, $codes:ident, $tables:ident, $w:ident, $($i:literal $low:ident $high:ident $even:literal $odd:literal),*) => {
        std::arch::asm!(
            "vpand {a}, {n}, {mask}",
            "vpsrlw {n}, {n}, 4",
            "vpand {n}, {n}, {mask}",
            "vpshufb {x}, {l0}, {a}",
            "vpshufb {a}, {l1}, {a}",
            "vpunpcklbw {y}, {x}, {a}",
            "vpunpckhbw {x}, {x}, {a}",
            $($column!($low $high $even),)*
            "vpshufb {x}, {l0}, {n}",
            "vpshufb {n}, {l1}, {n}",
            "vpunpcklbw {y}, {x}, {n}",
            "vpunpckhbw {x}, {x}, {n}",
            $($column!($low $high $odd),)*
            $($low = inout(ymm_reg) $sums[$i][0], $high = inout(ymm_reg) $sums[$i][1],)*
            n = inout(ymm_reg) $codes => _,
            l0 = in(ymm_reg) $tables[0],
            l1 = in(ymm_reg) $tables[1],
            mask = in(ymm_reg) $tables[2],
            w = in(reg) $w,
            a = out(ymm_reg) _,
            x = out(ymm_reg) _,
            y = out(ymm_reg) _,
            t = out(ymm_reg) _,
            options(pure, readonly, nostack, preserves_flags)
        )
    };
}

/// Adds the products of the levels of 32 bytes of codes, of low and then of high nibbles, with the half at `w` of `C` columns of
/// words each, or with `SPLIT` the whole of them, to the lower and upper sums of the columns.
///
/// In assembly because eight sums, two tables, a mask and what is at work just fit in 16 registers, and a compiler that knows what
/// the instructions do reorders the sums and runs out of them: a third of the time.
///
/// # Safety
/// There must be `2 C` words, of which `w` is the first's first or second half.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_add<const C: usize, const SPLIT: bool>(
    sums: &mut [[__m256i; 2]; C],
    codes: __m256i,
    tables: [__m256i; 3],
    w: *const u8,
) {
    // SAFETY: reads words, writes registers.
    unsafe {
        match (C, SPLIT) {
            (1, false) => body!(shared, sums, codes, tables, w, 0 s0 s1 0 64),
            (2, false) => body!(shared, sums, codes, tables, w, 0 s0 s1 0 128, 1 s2 s3 64 192),
            (3, false) => body!(shared, sums, codes, tables, w, 0 s0 s1 0 192, 1 s2 s3 64 256, 2 s4 s5 128 320),
            (_, false) => body!(shared, sums, codes, tables, w, 0 s0 s1 0 256, 1 s2 s3 64 320, 2 s4 s5 128 384, 3 s6 s7 192 448),
            (1, true) => body!(split, sums, codes, tables, w, 0 s0 s1 0 64),
            (2, true) => body!(split, sums, codes, tables, w, 0 s0 s1 0 128, 1 s2 s3 64 192),
            (3, true) => body!(split, sums, codes, tables, w, 0 s0 s1 0 192, 1 s2 s3 64 256, 2 s4 s5 128 320),
            (_, true) => body!(split, sums, codes, tables, w, 0 s0 s1 0 256, 1 s2 s3 64 320, 2 s4 s5 128 384, 3 s6 s7 192 448),
        }
    }
}

/// What becomes of the products of a page with one query.
#[derive(Clone, Copy)]
pub(super) struct Score {
    /// 64 scores, in places.
    pub(super) to: *mut f32,
    /// What to add them to: by `n / 8`, or what stands there if null.
    pub(super) start: *const [f32; 8],
}

/// Scores of `C` queries with the 64 tokens of some slabs, one for each of `levels`. `q` is `[slab][c%2][C]`, or with `SPLIT`
/// `[slab][half][c%2][C]`. `factors` is `[slab / FLUSH][C]`; products are also multiplied by `scales`, 64 or null.
/// Fetches the 512 bytes per slab at `next`, and a line of each of `fields`, on the way.
///
/// # Safety
/// `codes` must have a slab for each of `levels`, `q` two (four) words per slab and column, each score 64 places; no sum may
/// leave 32 bits.
#[allow(clippy::needless_range_loop, clippy::too_many_arguments)] // Columns index everything.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn key_page<const C: usize, const SPLIT: bool>(
    codes: *const u8,
    next: *const u8,
    fields: &[u8],
    levels: &[Arc<Levels>],
    q: *const Words,
    factors: &[f32],
    scales: *const f32,
    scores: &[Score; 4],
) {
    // Bytes of a word are n/8 % 2 inside c/8: the tokens go outside.
    let order = _mm256_setr_epi8(
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
    );
    // By slabs first: codes are read in the order in which they lie. Sums wait in memory, one fused multiply-add away.
    let mut rows = [[[_mm256_setzero_ps(); 2]; C]; 8];
    // Here, not on the way: one more thing in the loop below makes it a seventh slower.
    for line in fields.chunks(64) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
    for (g, (levels, factors)) in levels.chunks(FLUSH).zip(factors.chunks_exact(C)).enumerate() {
        for (row, wide_sums) in rows.iter_mut().enumerate() {
            let mut sums = [[_mm256_setzero_si256(); 2]; C];
            for (i, levels) in levels.iter().enumerate() {
                let tables = levels.load();
                let slab = g * FLUSH + i;
                let at = SLAB * slab + 64 * row;
                // A prefetch reads nothing.
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
                for half in 0..2 {
                    // SAFETY: inside the slab, and inside q.
                    unsafe {
                        let x = _mm256_loadu_si256(codes.add(at + 32 * half).cast());
                        let q = if SPLIT {
                            q.add((slab * 2 + half) * 2 * C).cast()
                        } else {
                            q.add(slab * 2 * C).cast::<u8>().add(32 * half)
                        };
                        multiply_add::<C, SPLIT>(&mut sums, _mm256_shuffle_epi8(x, order), tables, q);
                    }
                }
            }
            for c in 0..C {
                let factor = _mm256_set1_ps(factors[c]);
                for i in 0..2 {
                    wide_sums[c][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[c][i]), factor, wide_sums[c][i]);
                }
            }
        }
    }
    for (row, wide_sums) in rows.iter().enumerate() {
        for c in 0..C {
            let [low, high] = wide_sums[c];
            // Halves of a register hold other channels of the same four tokens.
            let halves = [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)];
            let mut all = _mm256_add_ps(halves[0], halves[1]);
            // SAFETY: eight of 64 places, eight numbers of the start.
            unsafe {
                let Score { to, start } = scores[c];
                let to = to.add(8 * row);
                let before = if start.is_null() { to.cast_const() } else { start.cast() };
                if !scales.is_null() {
                    all = _mm256_mul_ps(all, _mm256_loadu_ps(scales.add(8 * row)));
                }
                _mm256_storeu_ps(to, _mm256_add_ps(all, _mm256_loadu_ps(before)));
            }
        }
    }
}

/// Adds the values of at most [`GROUP`] pages, weighted, to `acc`, `[line][C][2]`: a line is the neighbours `c, c + 8`. `pages`
/// has the codes of each and what to fetch meanwhile. `w` is `[page][block][n%2][C]`, `blocks` the block of each line,
/// `steps` is `[block][4]`, the first `C` in use. If `fresh`, what stands in `acc` counts as 0.
///
/// # Safety
/// Each page must have 64 bytes, `acc` `2 C` lanes, for each of `blocks`; `w` two words per block, page and column; no sum may
/// leave 32 bits.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn value_pages<const C: usize>(
    pages: &[(*const u8, *const u8)],
    levels: &Levels,
    blocks: &[usize],
    w: *const Words,
    steps: &[[f32; 4]],
    acc: &mut [Lane],
    fresh: bool,
) {
    // Bytes of a chunk are c/8 inside n/8: the channels go outside.
    let order = _mm256_setr_epi8(
        0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
    );
    let tables = levels.load();
    for (line, (&block, acc)) in blocks.iter().zip(acc.chunks_exact_mut(2 * C)).enumerate() {
        let mut sum = [[_mm256_setzero_si256(); 2]; C];
        // SAFETY: the caller's bounds.
        unsafe {
            let mut w = w.add(block * 2 * C);
            for &(codes, next) in pages {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64 * line).cast());
                for half in 0..2 {
                    let x = _mm256_loadu_si256(codes.add(64 * line + 32 * half).cast());
                    multiply_add::<C, false>(&mut sum, _mm256_shuffle_epi8(x, order), tables, w.cast::<u8>().add(32 * half));
                }
                w = w.wrapping_add(steps.len() * 2 * C);
            }
        }
        for (c, (to, sums)) in acc.chunks_exact_mut(2).zip(sum).enumerate() {
            let step = _mm256_set1_ps(steps[block][c]);
            for (to, sum) in to.iter_mut().zip(sums) {
                let to = to.0.as_mut_ptr();
                // SAFETY: eight aligned elements.
                unsafe {
                    let before = if fresh { _mm256_setzero_ps() } else { _mm256_load_ps(to) };
                    _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), step, before));
                }
            }
        }
    }
}
