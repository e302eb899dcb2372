//! 4-bit codes read where they lie, for few query columns: eight 32-bit words of a slab at a time.
//!
//! Scores stand in **lane places**: the order in which values want their weights ([`token_of_place`]).

use std::arch::x86_64::*;

use super::codes::{Book, Lane, SLAB, key_page, value_page};
use super::fast::token_of_place;
use super::math::Simd;
use super::tile::{read_fields, widen};
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS};
use crate::seal::SideCodec;

/// Columns that share one decode: what the 16 registers hold.
const SHARED: usize = 4;
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
    /// Queries times key scales, for each part of at most four columns and each token group.
    laid_q: Vec<Lane>,
    /// First slab, slabs, block: the keys' blocks, if fields are per token.
    ranges: Vec<(usize, usize, usize)>,
    /// Sums of each range's queries, `[range][column]`.
    q_sums: Vec<f32>,
    /// Block of each stored value channel.
    blocks: Vec<usize>,
    /// Blocks of channels that stand side by side in a vector, and which of them each `c, c + 8` are.
    block_pairs: Vec<[usize; 2]>,
    pairs: Vec<usize>,
    fields: Vec<f32>,
    codes: Vec<u8>,
    key_places: Vec<u32>,
    value_places: Vec<u32>,
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

/// Where per-token fields stand among a half's fields: `[field][block][64]`, tokens in lane places.
fn token_places(codec: &SideCodec, out: &mut Vec<u32>) {
    let FieldAxis::PerToken { blocks } = codec.layout.axis else { unreachable!("per-token fields") };
    let layout = &codec.layout;
    out.clear();
    for (f, b) in (0..layout.fields).flat_map(|f| (0..blocks).map(move |b| (f, b))) {
        let place = |p: usize| (layout.token_field(token_of_place(p), b, f) - layout.code_bytes) / layout.field_size;
        out.extend((0..PAGE_TOKENS).map(|p| place(p) as u32));
    }
}

/// Per-token fields as `[block][64]` in lane places; zeros from token `count` on, so that nothing unwritten is used.
fn token_fields(places: &[u32], fields: &[f32], kinds: usize, count: usize, out: &mut [Vec<f32>; 2]) {
    for (out, places) in out.iter_mut().zip(places.chunks_exact(places.len() / kinds)) {
        out.clear();
        out.extend(places.iter().map(|&p| fields[p as usize]));
        if count < PAGE_TOKENS {
            for (i, x) in out.iter_mut().enumerate() {
                *x = if token_of_place(i % PAGE_TOKENS) < count { *x } else { 0.0 };
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
            let groups = if let FieldAxis::PerChannel { group } = key.layout.axis { PAGE_TOKENS / group } else { 1 };
            self.laid_q.resize(groups * self.columns * stored / 4, Lane::default());
            self.ranges.clear();
            self.q_sums.clear();
            if let FieldAxis::PerToken { .. } = key.layout.axis {
                token_places(key, &mut self.key_places);
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
            token_places(value, &mut self.value_places);
            self.blocks.clear();
            self.blocks.extend((0..stored).map(|c| value.block_of(h, c)));
            self.block_pairs.clear();
            self.pairs.clear();
            for line in 0..stored / 2 {
                let c = line / 8 * 16 + line % 8;
                let pair = [self.blocks[c], self.blocks[c + 8]];
                let known = self.block_pairs.iter().position(|p| *p == pair);
                self.pairs.push(known.unwrap_or(self.block_pairs.len()));
                if known.is_none() {
                    self.block_pairs.push(pair);
                }
            }
            self.weights.resize(self.columns.min(SHARED) * self.block_pairs.len() * 16, Lane::default());
            self.acc.clear();
            self.acc.resize(self.columns * stored / 2, Lane::default());
            self.zeros.clear();
            self.zeros.resize(self.columns * blocks, 0.0);
        }
    }

    /// Lays out queries, times key scales if there are per-channel fields (one or two), and returns the products with the
    /// means for each column and `n / 16`.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn lay_queries(&mut self, stored: usize, fields: usize, group: usize, scales: Option<&[f32]>) -> [[f32; 4]; 16] {
        let mut base = [[0f32; 4]; 16];
        let groups = PAGE_TOKENS / group;
        for first in (0..self.columns).step_by(SHARED) {
            let count = SHARED.min(self.columns - first);
            let all = &mut self.laid_q[groups * first * stored / 4..][..groups * count * stored / 4];
            for (g, lanes) in all.chunks_exact_mut(count * stored / 4).enumerate() {
                let mut dots = [_mm256_setzero_ps(); SHARED];
                for (half, lanes) in lanes.chunks_exact_mut(2 * count).enumerate() {
                    let (mut scale, mut mean) = (_mm256_set1_ps(1.0), _mm256_setzero_ps());
                    if let Some(scales) = scales {
                        let at = &scales[fields * (g * stored + 8 * half)..][..8 * fields];
                        // SAFETY: `at` has 8 or 16 elements.
                        unsafe {
                            scale = _mm256_loadu_ps(at.as_ptr());
                            if fields == 2 {
                                let y = _mm256_loadu_ps(at.as_ptr().add(8));
                                mean = _mm256_permute2f128_ps::<0x31>(scale, y);
                                scale = _mm256_permute2f128_ps::<0x20>(scale, y);
                            }
                        }
                    }
                    for i in 0..count {
                        let q = &self.q[(first + i) * stored + 8 * half..][..8];
                        // SAFETY: q and a lane have eight elements.
                        unsafe {
                            let q = _mm256_loadu_ps(q.as_ptr());
                            dots[i] = _mm256_fmadd_ps(q, mean, dots[i]);
                            let x = _mm256_mul_ps(q, scale);
                            // Even channels, then odd ones, each for both n/8.
                            _mm256_store_ps(lanes[i].0.as_mut_ptr(), _mm256_moveldup_ps(x));
                            _mm256_store_ps(lanes[count + i].0.as_mut_ptr(), _mm256_movehdup_ps(x));
                        }
                    }
                }
                for i in 0..count {
                    let mut lane = Lane::default();
                    // SAFETY: a lane is eight aligned elements.
                    unsafe { _mm256_store_ps(lane.0.as_mut_ptr(), dots[i]) };
                    let dot = lane.0.iter().sum::<f32>();
                    base[first + i][g * group / 16..(g + 1) * group / 16].fill(dot);
                }
            }
        }
        base
    }

    /// Scores of a page: column `i`'s 64 go to `scores[i * stride..]`, in lane places. `books` has one for each slab.
    pub(super) fn keys(&mut self, codec: &SideCodec, half: &Half, books: &[Book], scores: &mut [f32], stride: usize) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.keys_avx2(codec, half, books, scores, stride) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn keys_avx2(&mut self, codec: &SideCodec, half: &Half, books: &[Book], scores: &mut [f32], stride: usize) {
        let layout = &codec.layout;
        read_fields(Simd::Avx2, codec, half.bytes, &mut self.fields);
        fetch(&half.next[half.next.len().min(layout.code_bytes)..]);
        let mut room = std::mem::take(&mut self.codes);
        let codes = four_bits(codec, half, &mut room);
        assert!(codes.len() == books.len() * SLAB && books.len() * SLAB_CHANNELS == layout.stored);
        let next = half.next.as_ptr();
        let mut products = [[0f32; PAGE_TOKENS]; SHARED];
        let per_channel = if let FieldAxis::PerChannel { group } = layout.axis {
            let fields = std::mem::take(&mut self.fields);
            let base = self.lay_queries(layout.stored, layout.fields, group, Some(&fields));
            self.fields = fields;
            Some(base)
        } else {
            token_fields(&self.key_places, &self.fields, layout.fields, half.count, &mut self.token_fields);
            None
        };
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            let groups = per_channel.as_ref().map_or(1, |_| self.laid_q.len() * 4 / (self.columns * layout.stored));
            let lanes = &self.laid_q[groups * first * layout.stored / 4..][..groups * share * layout.stored / 4];
            let q = [0, 1, 2, 3].map(|i| lanes[i * groups / 4 * (share * layout.stored / 4)..].as_ptr());
            if let Some(base) = &per_channel {
                // SAFETY: all slabs, and eight lanes for each slab and column.
                unsafe { by_columns!(share, key_page(codes.as_ptr(), next, books, q, &mut products)) };
                for (i, products) in products.iter().enumerate().take(share) {
                    let to = scores[(first + i) * stride..][..PAGE_TOKENS].chunks_exact_mut(16);
                    for ((to, x), b) in to.zip(products.chunks_exact(16)).zip(&base[first + i]) {
                        to.iter_mut().zip(x).for_each(|(o, x)| *o = x + b);
                    }
                }
                continue;
            }
            for (r, &(slab, slabs, block)) in self.ranges.iter().enumerate() {
                let codes = &codes[slab * SLAB..][..slabs * SLAB];
                let q = [lanes[slab * 4 * share..].as_ptr(); 4];
                let (next, books) = (next.wrapping_add(slab * SLAB), &books[slab..slab + slabs]);
                // SAFETY: the range's slabs, and eight lanes for each slab and column.
                unsafe { by_columns!(share, key_page(codes.as_ptr(), next, books, q, &mut products)) };
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
    pub(super) fn values(&mut self, codec: &SideCodec, half: &Half, book: &Book, weights: &[f32], stride: usize) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.values_avx2(codec, half, book, weights, stride) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn values_avx2(&mut self, codec: &SideCodec, half: &Half, book: &Book, weights: &[f32], stride: usize) {
        let layout = &codec.layout;
        read_fields(Simd::Avx2, codec, half.bytes, &mut self.fields);
        fetch(&half.next[half.next.len().min(layout.code_bytes)..]);
        token_fields(&self.value_places, &self.fields, layout.fields, half.count, &mut self.token_fields);
        let blocks = self.token_fields[0].len() / PAGE_TOKENS;
        let mut room = std::mem::take(&mut self.codes);
        let codes = four_bits(codec, half, &mut room);
        assert!(codes.len() * SLAB_CHANNELS == self.blocks.len() * SLAB);
        let next = half.next.as_ptr();
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            let pairs = self.block_pairs.iter().zip(self.weights.chunks_exact_mut(16 * share));
            for (pair, lanes) in pairs {
                let scale = pair.map(|b| &self.token_fields[0][b * PAGE_TOKENS..][..PAGE_TOKENS]);
                for at in 0..16 {
                    // SAFETY: 4 at + 4 <= 64; a lane is eight aligned elements.
                    unsafe {
                        let x = scale.map(|s| _mm_loadu_ps(s.as_ptr().add(4 * at)));
                        let x = _mm256_set_m128(_mm_unpackhi_ps(x[0], x[1]), _mm_unpacklo_ps(x[0], x[1]));
                        for i in 0..share {
                            let p = &weights[(first + i) * stride..][..PAGE_TOKENS];
                            let p = _mm_loadu_ps(p.as_ptr().add(4 * at));
                            let p = _mm256_set_m128(_mm_unpackhi_ps(p, p), _mm_unpacklo_ps(p, p));
                            _mm256_store_ps(lanes[at * share + i].0.as_mut_ptr(), _mm256_mul_ps(p, x));
                        }
                    }
                }
            }
            if layout.fields == 2 {
                for i in first..first + share {
                    let p = &weights[i * stride..][..PAGE_TOKENS];
                    for (b, zero) in self.token_fields[1].chunks_exact(PAGE_TOKENS).enumerate() {
                        self.zeros[i * blocks + b] += p.iter().zip(zero).map(|(p, z)| p * z).sum::<f32>();
                    }
                }
            }
            let acc = &mut self.acc[first * layout.stored / 2..][..share * layout.stored / 2];
            let w = self.weights.as_ptr();
            // SAFETY: all slabs and accumulators, and eight weights for each block and column.
            unsafe { by_columns!(share, value_page(codes.as_ptr(), next, &self.pairs, w, book, acc.as_mut_ptr())) };
        }
        self.codes = room;
    }

    /// Ends a run: adds what the pages gave to `out`, `[columns][stored]`.
    pub(super) fn finish(&mut self, out: &mut [f32]) {
        let stored = self.blocks.len();
        let blocks = self.zeros.len() / self.columns;
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            for (at, lane) in self.acc[first * stored / 2..][..share * stored / 2].iter().enumerate() {
                let (line, column) = (at / share, first + at % share);
                let l = &lane.0;
                for eight in 0..2 {
                    let c = line / 8 * 16 + line % 8 + 8 * eight;
                    let sum = (l[eight] + l[4 + eight]) + (l[2 + eight] + l[6 + eight]);
                    out[column * stored + c] += sum + self.zeros[column * blocks + self.blocks[c]];
                }
            }
        }
    }
}

/// Asks for the lines of `bytes`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}
