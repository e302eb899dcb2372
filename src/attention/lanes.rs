//! 4-bit codes read where they lie, for few query columns: eight 32-bit words of a slab at a time.
//!
//! A nibble's place in its word fixes what it is: bit 0, 1, 2 of the place are `c % 2`, `n/8 % 2`, `c/8 % 2` for keys and
//! `n % 2`, `c/8 % 2`, `n/8 % 2` for values. The words of a vector are four `n / 16` for each of two neighbouring pairs. So one
//! shift and one table of 16 levels give eight factors of a fused multiply-add, whose other factor (queries times key scales,
//! or softmax weights times value scales) was laid out once for the whole page: no multiply by a scale per element, and lanes
//! are added across only at the end of a page (keys) or of a run (values).
//!
//! Scores stand in **lane places**: token `n` at `8 (n % 8) + 4 (n/8 % 2) + n / 16`.

use std::arch::x86_64::*;

use super::fast::token_of_place;
use super::math::Simd;
use super::tile::{read_fields, widen};
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS};
use crate::seal::SideCodec;

/// Columns that share one decode: what the 16 registers hold.
const SHARED: usize = 4;
/// Bytes of a 4-bit slab.
const SLAB: usize = 512;

/// Eight fp32, aligned as a register.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(32))]
struct Lane([f32; 8]);

/// Whether the keys' codes can be read in place: at most 4 bits, and no block border inside a slab.
pub(super) fn reads_keys(codec: &SideCodec, heads: usize) -> bool {
    let whole = |h: usize, slab: usize| {
        let first = slab * SLAB_CHANNELS;
        (first..first + SLAB_CHANNELS).all(|c| codec.block_of(h, c) == codec.block_of(h, first))
    };
    let slabs = codec.layout.slabs.len();
    let borders = match codec.layout.axis {
        FieldAxis::PerChannel { .. } => true,
        FieldAxis::PerToken { .. } => (0..heads).all(|h| (0..slabs).all(|s| whole(h, s))),
    };
    borders && reads_values(codec)
}

/// Whether the values' codes can be read in place: at most 4 bits (fewer are widened to 4 first, a page at a time).
pub(super) fn reads_values(codec: &SideCodec) -> bool {
    codec.layout.slabs.iter().all(|s| s.width <= 4)
}

/// One half of a page to read.
pub(super) struct Half<'a> {
    pub(super) bytes: &'a [u8],
    /// Valid tokens.
    pub(super) count: usize,
    /// The half that is read after this one, or itself.
    pub(super) next: &'a [u8],
}

/// The codes of a half at 4 bits: in place, or widened in `room`.
fn four_bits<'a>(codec: &SideCodec, half: &Half<'a>, room: &'a mut Vec<u8>) -> &'a [u8] {
    if codec.layout.slabs.iter().any(|s| s.width != 4) {
        widen(&codec.layout, half.bytes, room);
        return room;
    }
    &half.bytes[..codec.layout.slabs.len() * SLAB]
}

/// The 16 levels as two registers.
#[derive(Clone, Copy)]
struct Book(__m256, __m256);

/// Levels of one nibble of each word: `RIGHT` is its first bit, `LEFT` = 28 - `RIGHT`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn level<const RIGHT: i32, const LEFT: i32>(words: __m256i, book: Book) -> __m256 {
    // The table takes the low three bits of each index; the fourth, moved to the sign, chooses the half.
    let index = _mm256_srli_epi32::<RIGHT>(words);
    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<LEFT>(words));
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(book.0, index), _mm256_permutevar8x32_ps(book.1, index), upper)
}

/// Calls a macro for the eight nibbles of a word.
macro_rules! nibbles {
    ($step:ident) => {
        $step!(0, 0, 28);
        $step!(1, 4, 24);
        $step!(2, 8, 20);
        $step!(3, 12, 16);
        $step!(4, 16, 12);
        $step!(5, 20, 8);
        $step!(6, 24, 4);
        $step!(7, 28, 0);
    };
}

/// Products of `C` queries with the 64 tokens of some slabs, one for each of `levels`, in lane places. `q` is
/// `[slab][half][c/8, c%2][C]`. Fetches the 512 bytes per slab at `next` on the way.
///
/// # Safety
/// `codes` must have a slab for each of `levels`, `q` eight lanes per slab and column.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn key_page<const C: usize>(
    codes: *const u8,
    next: *const u8,
    levels: &[[f32; 16]],
    q: *const Lane,
    out: &mut [[f32; 64]],
) {
    for row in 0..8 {
        // With one or two columns, twice the sums hide the latency of the multiply-add.
        let mut sum = [[_mm256_setzero_ps(); C]; 4];
        for half in 0..2 * levels.len() {
            // SAFETY: half < 2 slabs, row < 8: inside the codes, and inside q. A prefetch reads nothing.
            unsafe {
                let at = SLAB * (half / 2) + 64 * row + 32 * (half % 2);
                if half % 2 == 0 {
                    // A line of each slab in turn is a pattern that no hardware guesses.
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
                }
                let words = _mm256_loadu_si256(codes.add(at).cast());
                let book = book(&levels[half / 2]);
                let q = q.add(half * 4 * C);
                macro_rules! step {
                    ($k:literal, $right:literal, $left:literal) => {
                        let x = level::<$right, $left>(words, book);
                        let s = &mut sum[($k >> 1 & 1) + if C <= 2 { 2 * ($k >> 2) } else { 0 }];
                        for c in 0..C {
                            let at = q.add((($k >> 2) * 2 + ($k & 1)) * C + c);
                            s[c] = _mm256_fmadd_ps(x, _mm256_load_ps(at.cast()), s[c]);
                        }
                    };
                }
                nibbles!(step);
            }
        }
        for c in 0..C {
            for eight in 0..2 {
                let s = if C <= 2 { _mm256_add_ps(sum[eight][c], sum[eight + 2][c]) } else { sum[eight][c] };
                let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
                // SAFETY: 8 row + 4 eight + 4 <= 64.
                unsafe { _mm_storeu_ps(out[c].as_mut_ptr().add(8 * row + 4 * eight), s) };
            }
        }
    }
}

/// Adds the values of a page to `acc`, `[stored][C]`. `w` is `[block][n%8 / 4, n/8, n%2][C]`. Fetches `next` on the way.
///
/// # Safety
/// `codes` must have a slab and `acc` C lanes for each 16 and each of `blocks`; `w` eight lanes per block and column.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn value_page<const C: usize>(
    codes: *const u8,
    next: *const u8,
    blocks: &[usize],
    w: *const Lane,
    book: Book,
    acc: *mut Lane,
) {
    for slab in 0..blocks.len() / SLAB_CHANNELS {
        for row in 0..8 {
            let c = slab * SLAB_CHANNELS + row;
            // SAFETY: c and c + 8 are channels, their blocks have weights, and each slab has 8 rows of 64 bytes.
            unsafe {
                let w = [w.add(blocks[c] * 8 * C), w.add(blocks[c + 8] * 8 * C)];
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(SLAB * slab + 64 * row).cast());
                let to = [acc.add(c * C), acc.add((c + 8) * C)];
                let mut sum = [[_mm256_setzero_ps(); C]; 2];
                for (s, to) in sum.iter_mut().zip(to) {
                    for (i, s) in s.iter_mut().enumerate() {
                        *s = _mm256_load_ps(to.add(i).cast());
                    }
                }
                for half in 0..2 {
                    let words = _mm256_loadu_si256(codes.add(SLAB * slab + 64 * row + 32 * half).cast());
                    macro_rules! step {
                        ($k:literal, $right:literal, $left:literal) => {
                            let x = level::<$right, $left>(words, book);
                            for i in 0..C {
                                let at = w[$k >> 1 & 1].add((half * 4 + ($k >> 2) * 2 + ($k & 1)) * C + i);
                                let s = &mut sum[$k >> 1 & 1][i];
                                *s = _mm256_fmadd_ps(x, _mm256_load_ps(at.cast()), *s);
                            }
                        };
                    }
                    nibbles!(step);
                }
                for (s, to) in sum.iter().zip(to) {
                    for (i, s) in s.iter().enumerate() {
                        _mm256_store_ps(to.add(i).cast(), *s);
                    }
                }
            }
        }
    }
}

/// Calls a function for a count of columns, 1 to [`SHARED`].
macro_rules! by_columns {
    ($count:expr, $name:ident($($arg:expr),*)) => {
        match $count {
            1 => $name::<1>($($arg),*),
            2 => $name::<2>($($arg),*),
            3 => $name::<3>($($arg),*),
            _ => $name::<4>($($arg),*),
        }
    };
}

/// Everything that a run of one head keeps in lanes.
#[derive(Default)]
pub(super) struct Lanes {
    columns: usize,
    /// Queries, `[column][stored]`, channels of a slab in the order `(c%8) / 2, c/8, c%2` of the fields.
    q: Vec<f32>,
    /// Queries times key scales, for each part of at most four columns.
    laid_q: Vec<Lane>,
    /// First slab, slabs, block: the keys' blocks, if fields are per token.
    ranges: Vec<(usize, usize, usize)>,
    /// Sums of each range's queries, `[range][column]`.
    q_sums: Vec<f32>,
    /// Block of each stored value channel.
    blocks: Vec<usize>,
    fields: Vec<f32>,
    codes: Vec<u8>,
    /// Scales, then zero points, `[block][64]` in lane places.
    token_fields: [Vec<f32>; 2],
    weights: Vec<Lane>,
    acc: Vec<Lane>,
    /// Zero points times weights, `[column][block]`.
    zeros: Vec<f32>,
}

/// Stored channel at place `p` of the fields' order.
fn channel_of_place(p: usize) -> usize {
    p / 16 * 16 + 2 * (p / 4 % 4) + 8 * (p / 2 % 2) + p % 2
}

/// Per-token fields as `[block][64]` in lane places; zeros from token `count` on, so that nothing unwritten is used.
fn token_fields(codec: &SideCodec, fields: &[f32], count: usize, out: &mut [Vec<f32>; 2]) {
    let FieldAxis::PerToken { blocks } = codec.layout.axis else { unreachable!("per-token fields") };
    for (f, out) in out.iter_mut().enumerate().take(codec.layout.fields) {
        out.resize(blocks * PAGE_TOKENS, 0.0);
        for (b, row) in out.chunks_exact_mut(PAGE_TOKENS).enumerate() {
            for (p, o) in row.iter_mut().enumerate() {
                // The fields' order of a token's eight: n/16, then n/8 % 2.
                let place = p / 8 * 8 + 2 * (p % 4) + p / 4 % 2;
                let x = fields[codec.layout.fields * blocks * place + blocks * f + b];
                *o = if count == PAGE_TOKENS || token_of_place(p) < count { x } else { 0.0 };
            }
        }
    }
}

impl Lanes {
    /// Starts a run: `q` is `[columns][dim]`, scaled.
    pub(super) fn begin(&mut self, key: &SideCodec, value: &SideCodec, h: usize, q: &[f32], in_place: (bool, bool)) {
        let (dim, stored) = (key.layout.dim, key.layout.stored);
        self.columns = q.len() / dim;
        if in_place.0 {
            self.q.clear();
            for row in q.chunks_exact(dim) {
                let place = |p: usize| row.get(key.channel(h, channel_of_place(p))).copied().unwrap_or(0.0);
                self.q.extend((0..stored).map(place));
            }
            self.laid_q.resize(self.columns * stored / 2, Lane::default());
            self.ranges.clear();
            self.q_sums.clear();
            if let FieldAxis::PerToken { .. } = key.layout.axis {
                for slab in 0..key.layout.slabs.len() {
                    let block = key.block_of(h, slab * SLAB_CHANNELS);
                    match self.ranges.last_mut() {
                        Some((_, slabs, b)) if *b == block => *slabs += 1,
                        _ => self.ranges.push((slab, 1, block)),
                    }
                }
                for &(first, slabs, _) in &self.ranges {
                    let rows = self.q.chunks_exact(stored);
                    let sum = |row: &[f32]| row[first * SLAB_CHANNELS..][..slabs * SLAB_CHANNELS].iter().sum::<f32>();
                    self.q_sums.extend(rows.map(sum));
                }
                // SAFETY: codes are read in place only where the features were found.
                unsafe { self.lay_queries(stored, 1, 64, None) };
            }
        }
        if in_place.1 {
            let stored = value.layout.stored;
            let FieldAxis::PerToken { blocks } = value.layout.axis else { unreachable!("per-token fields") };
            self.blocks.clear();
            self.blocks.extend((0..stored).map(|c| value.block_of(h, c)));
            self.weights.resize(self.columns.min(SHARED) * blocks * 8, Lane::default());
            self.acc.clear();
            self.acc.resize(self.columns * stored, Lane::default());
            self.zeros.clear();
            self.zeros.resize(self.columns * blocks, 0.0);
        }
    }

    /// Lays out queries, times key scales if there are per-channel fields (one or two), and returns the products with the
    /// means for each column and `n / 16`.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn lay_queries(&mut self, stored: usize, fields: usize, group: usize, scales: Option<&[f32]>) -> [[f32; 4]; 16] {
        let mut base = [[0f32; 4]; 16];
        for first in (0..self.columns).step_by(SHARED) {
            let count = SHARED.min(self.columns - first);
            let mut dots = [[_mm256_setzero_ps(); 4]; SHARED];
            let lanes = &mut self.laid_q[first * stored / 2..][..count * stored / 2];
            for (half, lanes) in lanes.chunks_exact_mut(4 * count).enumerate() {
                let mut part = [(_mm256_set1_ps(1.0), _mm256_setzero_ps()); 4];
                if let Some(scales) = scales {
                    for (g, part) in part.iter_mut().enumerate().take(PAGE_TOKENS / group) {
                        let at = &scales[fields * (g * stored + 8 * half)..][..8 * fields];
                        // SAFETY: `at` has 8 or 16 elements.
                        *part = unsafe {
                            let x = _mm256_loadu_ps(at.as_ptr());
                            if fields == 1 {
                                (x, _mm256_setzero_ps())
                            } else {
                                let y = _mm256_loadu_ps(at.as_ptr().add(8));
                                (_mm256_permute2f128_ps::<0x20>(x, y), _mm256_permute2f128_ps::<0x31>(x, y))
                            }
                        };
                    }
                }
                for i in 0..count {
                    let q = &self.q[(first + i) * stored + 8 * half..][..8];
                    // SAFETY: q has eight elements.
                    let q = unsafe { _mm256_loadu_ps(q.as_ptr()) };
                    let mut laid = [_mm256_setzero_ps(); 4];
                    for g in (0..PAGE_TOKENS / group).rev() {
                        let x = _mm256_mul_ps(q, part[g].0);
                        dots[i][g] = _mm256_fmadd_ps(q, part[g].1, dots[i][g]);
                        let all = [
                            _mm256_permute_ps::<0x00>(x),
                            _mm256_permute_ps::<0x55>(x),
                            _mm256_permute_ps::<0xaa>(x),
                            _mm256_permute_ps::<0xff>(x),
                        ];
                        for (l, x) in laid.iter_mut().zip(all) {
                            // Groups come last first: each overwrites the lanes n/16 up to its own last.
                            *l = match (g + 1) * group / 16 {
                                1 => _mm256_blend_ps::<0x11>(*l, x),
                                2 => _mm256_blend_ps::<0x33>(*l, x),
                                3 => _mm256_blend_ps::<0x77>(*l, x),
                                _ => x,
                            };
                        }
                    }
                    for (k, l) in laid.into_iter().enumerate() {
                        // SAFETY: a lane is eight aligned elements.
                        unsafe { _mm256_store_ps(lanes[k * count + i].0.as_mut_ptr(), l) };
                    }
                }
            }
            for i in 0..count {
                for (t, b) in base[first + i].iter_mut().enumerate() {
                    let mut lane = Lane::default();
                    // SAFETY: a lane is eight aligned elements.
                    unsafe { _mm256_store_ps(lane.0.as_mut_ptr(), dots[i][16 * t / group]) };
                    *b = lane.0.iter().sum();
                }
            }
        }
        base
    }

    /// Scores of a page: column `i`'s 64 go to `scores[i * stride..]`, in lane places. `levels` has 16 for each slab.
    pub(super) fn keys(&mut self, codec: &SideCodec, half: &Half, levels: &[[f32; 16]], scores: &mut [f32], stride: usize) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.keys_avx2(codec, half, levels, scores, stride) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn keys_avx2(&mut self, codec: &SideCodec, half: &Half, levels: &[[f32; 16]], scores: &mut [f32], stride: usize) {
        let layout = &codec.layout;
        read_fields(Simd::Avx2, codec, half.bytes, &mut self.fields);
        fetch(&half.next[half.next.len().min(layout.code_bytes)..]);
        let mut room = std::mem::take(&mut self.codes);
        let codes = four_bits(codec, half, &mut room);
        assert!(codes.len() == levels.len() * SLAB && levels.len() * SLAB_CHANNELS == layout.stored);
        let next = half.next.as_ptr();
        let mut products = [[0f32; PAGE_TOKENS]; SHARED];
        let per_channel = if let FieldAxis::PerChannel { group } = layout.axis {
            let fields = std::mem::take(&mut self.fields);
            let base = self.lay_queries(layout.stored, layout.fields, group, Some(&fields));
            self.fields = fields;
            Some(base)
        } else {
            token_fields(codec, &self.fields, half.count, &mut self.token_fields);
            None
        };
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            let lanes = &self.laid_q[first * layout.stored / 2..][..share * layout.stored / 2];
            if let Some(base) = &per_channel {
                // SAFETY: all slabs, and eight lanes for each slab and column.
                unsafe { by_columns!(share, key_page(codes.as_ptr(), next, levels, lanes.as_ptr(), &mut products)) };
                for (i, products) in products.iter().enumerate().take(share) {
                    let to = scores[(first + i) * stride..][..PAGE_TOKENS].chunks_exact_mut(4);
                    for (to, x) in to.zip(products.chunks_exact(4)) {
                        to.iter_mut().zip(x).zip(&base[first + i]).for_each(|((o, x), b)| *o = x + b);
                    }
                }
                continue;
            }
            for (r, &(slab, slabs, block)) in self.ranges.iter().enumerate() {
                let (codes, lanes) = (&codes[slab * SLAB..][..slabs * SLAB], &lanes[slab * 8 * share..]);
                let (next, levels) = (next.wrapping_add(slab * SLAB), &levels[slab..slab + slabs]);
                // SAFETY: the range's slabs, and eight lanes for each slab and column.
                unsafe { by_columns!(share, key_page(codes.as_ptr(), next, levels, lanes.as_ptr(), &mut products)) };
                let scale = &self.token_fields[0][block * PAGE_TOKENS..][..PAGE_TOKENS];
                for (i, products) in products.iter().enumerate().take(share) {
                    let to = &mut scores[(first + i) * stride..][..PAGE_TOKENS];
                    if r == 0 {
                        to.fill(0.0);
                    }
                    to.iter_mut().zip(products).zip(scale).for_each(|((o, x), s)| *o += x * s);
                    if layout.fields == 2 {
                        let (zero, sum) =
                            (&self.token_fields[1][block * PAGE_TOKENS..], self.q_sums[r * self.columns + first + i]);
                        to.iter_mut().zip(zero).for_each(|(o, z)| *o += z * sum);
                    }
                }
            }
        }
        self.codes = room;
    }

    /// Adds the values of a page, weighted: column `i`'s 64 weights stand at `weights[i * stride..]`, in lane places.
    pub(super) fn values(&mut self, codec: &SideCodec, half: &Half, levels: &[f32; 16], weights: &[f32], stride: usize) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.values_avx2(codec, half, levels, weights, stride) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn values_avx2(&mut self, codec: &SideCodec, half: &Half, levels: &[f32; 16], weights: &[f32], stride: usize) {
        let layout = &codec.layout;
        read_fields(Simd::Avx2, codec, half.bytes, &mut self.fields);
        fetch(&half.next[half.next.len().min(layout.code_bytes)..]);
        token_fields(codec, &self.fields, half.count, &mut self.token_fields);
        let (book, blocks) = (book(levels), self.token_fields[0].len() / PAGE_TOKENS);
        let mut room = std::mem::take(&mut self.codes);
        let codes = four_bits(codec, half, &mut room);
        assert!(codes.len() * SLAB_CHANNELS == self.blocks.len() * SLAB);
        let next = half.next.as_ptr();
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            for (b, lanes) in self.weights.chunks_exact_mut(8 * share).enumerate().take(blocks) {
                for i in 0..share {
                    let p = &weights[(first + i) * stride..][..PAGE_TOKENS];
                    let scale = &self.token_fields[0][b * PAGE_TOKENS..][..PAGE_TOKENS];
                    let mut w = [_mm256_setzero_ps(); 8];
                    for (n, w) in w.iter_mut().enumerate() {
                        // SAFETY: 8 n + 8 <= 64.
                        *w = unsafe {
                            _mm256_mul_ps(_mm256_loadu_ps(p.as_ptr().add(8 * n)), _mm256_loadu_ps(scale.as_ptr().add(8 * n)))
                        };
                    }
                    for row in 0..2 {
                        for odd in 0..2 {
                            // Rows n % 8 of one vector are two apart: its words are neighbouring pairs of tokens.
                            let (x, y) = (w[4 * row + odd], w[4 * row + 2 + odd]);
                            let at = (row * 4 + odd) * share + i;
                            // SAFETY: a lane is eight aligned elements.
                            unsafe {
                                _mm256_store_ps(lanes[at].0.as_mut_ptr(), _mm256_permute2f128_ps::<0x20>(x, y));
                                _mm256_store_ps(lanes[at + 2 * share].0.as_mut_ptr(), _mm256_permute2f128_ps::<0x31>(x, y));
                            }
                        }
                    }
                    if layout.fields == 2 {
                        let zero = &self.token_fields[1][b * PAGE_TOKENS..][..PAGE_TOKENS];
                        let sum: f32 = p.iter().zip(zero).map(|(p, z)| p * z).sum();
                        self.zeros[(first + i) * blocks + b] += sum;
                    }
                }
            }
            let acc = &mut self.acc[first * layout.stored..][..share * layout.stored];
            let w = self.weights.as_ptr();
            // SAFETY: all slabs and accumulators, and eight weights for each block and column.
            unsafe { by_columns!(share, value_page(codes.as_ptr(), next, &self.blocks, w, book, acc.as_mut_ptr())) };
        }
        self.codes = room;
    }

    /// Ends a run: adds what the pages gave to `out`, `[columns][stored]`.
    pub(super) fn finish(&mut self, out: &mut [f32]) {
        let stored = self.blocks.len();
        let blocks = self.zeros.len() / self.columns;
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            for (at, lane) in self.acc[first * stored..][..share * stored].iter().enumerate() {
                let (c, column) = (at / share, first + at % share);
                let l = &lane.0;
                let sum = ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
                out[column * stored + c] += sum + self.zeros[column * blocks + self.blocks[c]];
            }
        }
    }
}

/// Loads a codebook.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn book(levels: &[f32; 16]) -> Book {
    // SAFETY: 16 levels.
    unsafe { Book(_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels.as_ptr().add(8))) }
}

/// Asks for the lines of `bytes`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}
