//! 4-bit codes read where they lie, for few query columns, by integers ([`super::integers`]) or, where 16 bits are too few for a
//! page's numbers, in fp32 ([`super::codes`]). The choice depends on the numbers of the page (the pages) alone.
//!
//! Scores stand in **places**: the order of per-token fields in a page ([`super::places`]).

use std::arch::x86_64::*;
use std::sync::Arc;

use super::codes::{self, Book, Lane, SLAB};
use super::integers::{self, GROUP, Levels, Score};
use super::integers512;
use super::lay::{self, Reading};
use super::math::Simd;
use super::places::{channel_of_place, token_fields};
use super::tile::widen;
use crate::page::{FieldAxis, PAGE_TOKENS, SLAB_CHANNELS};
use crate::seal::SideCodec;

/// Columns that share one decode: what the 16 registers hold.
pub(super) const SHARED: usize = 4;

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
#[derive(Clone, Copy)]
pub(super) struct Half<'a> {
    pub(super) bytes: &'a [u8],
    /// Valid tokens.
    pub(super) count: usize,
    /// The half that is read after this one, or itself.
    pub(super) next: &'a [u8],
}

/// Levels in both forms, of each slab of keys and of the values.
pub(super) struct Books {
    simd: Simd,
    key: Vec<(Book, Arc<Levels>)>,
    value: (Book, Arc<Levels>),
}

impl Books {
    pub(super) fn new(key: &SideCodec, value: &SideCodec, simd: Simd) -> Self {
        let both = |codec: &SideCodec, slab: usize| {
            let mut levels = [0f32; 16];
            if let Some(book) = codec.books[slab].as_deref() {
                // Wider books are not read in place.
                levels.iter_mut().zip(book.levels()).for_each(|(to, l)| *to = *l);
            }
            (Book::new(&levels), Levels::of(&levels))
        };
        let key = (0..key.books.len()).map(|slab| both(key, slab)).collect();
        Self { simd, key, value: both(value, 0) }
    }
}

/// Calls a function for a count of columns, 1 to [`SHARED`].
macro_rules! by_columns {
    ($count:expr, $module:ident :: $name:ident $(, $split:literal)? ($($arg:expr),*)) => {
        match $count {
            1 => $module::$name::<1 $(, $split)?>($($arg),*),
            2 => $module::$name::<2 $(, $split)?>($($arg),*),
            3 => $module::$name::<3 $(, $split)?>($($arg),*),
            _ => $module::$name::<4 $(, $split)?>($($arg),*),
        }
    };
}

/// Everything that a run of one head keeps.
#[derive(Default)]
pub(super) struct Lanes {
    columns: usize,
    /// Queries, `[column][stored]`, channels in the order of per-channel fields.
    q: Vec<f32>,
    /// First slab, slabs, block: the keys' blocks, if fields are per token, else one of all slabs.
    ranges: Vec<(usize, usize, usize)>,
    /// Sums of each range's queries, `[range][column]`.
    q_sums: Vec<f32>,
    /// What was laid out for keys: queries times per-channel scales.
    laid: lay::Queries,
    /// Block of each stored value channel.
    blocks: Vec<usize>,
    /// Blocks of channels that stand side by side in a vector, and which of them each line `c, c + 8` has.
    block_pairs: Vec<[usize; 2]>,
    lines: Vec<usize>,
    fields: Vec<f32>,
    codes: [Vec<u8>; GROUP],
    /// Scales, then zero points: `[page][block][64]` in places.
    token_fields: [Vec<f32>; 2],
    weights: lay::Weights,
    /// Sums of values: by integers `[part][line][share][2]`, in fp32 `[part][line][share]`, which is rare.
    acc: Vec<Lane>,
    /// Which parts of [`SHARED`] columns have sums there: the others hold anything.
    begun: Vec<bool>,
    exact: Vec<Lane>,
    exact_used: bool,
    /// Zero points times weights, `[column][block]`.
    zeros: Vec<f32>,
    has_zeros: bool,
    levels: Vec<Arc<Levels>>,
    books: Vec<Book>,
    /// Whether integers take 512 bits.
    wide: bool,
}

/// The codes of a half at 4 bits: in place, or widened in `room`.
fn four_bits<'a>(codec: &SideCodec, half: &Half<'a>, room: &'a mut Vec<u8>) -> &'a [u8] {
    if codec.layout.slabs.iter().any(|s| s.width != 4) {
        widen(&codec.layout, half.bytes, room);
        return room;
    }
    &half.bytes[..codec.layout.slabs.len() * SLAB]
}

impl Lanes {
    /// Starts a head: `q` is `[columns][dim]`, scaled.
    pub(super) fn begin(
        &mut self,
        key: &SideCodec,
        value: &SideCodec,
        h: usize,
        q: &[f32],
        books: &Books,
        in_place: (bool, bool),
    ) {
        let (dim, stored) = (key.layout.dim, key.layout.stored);
        self.columns = q.len() / dim;
        self.wide = books.simd.avx512();
        if in_place.0 {
            self.books.clear();
            self.books.extend(books.key.iter().map(|b| b.0));
            self.levels.clear();
            self.levels.extend(books.key.iter().map(|b| b.1.clone()));
            self.q.clear();
            for row in q.chunks_exact(dim) {
                let place = |p: usize| row.get(key.channel(h, channel_of_place(p))).copied().unwrap_or(0.0);
                self.q.extend((0..stored).map(place));
            }
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
                self.laid.begin(&self.q, &self.levels, &self.ranges);
                // SAFETY: codes are read in place only where the features were found.
                unsafe { self.laid.lay(None) };
            } else {
                self.ranges.push((0, key.layout.slabs.len(), 0));
                self.laid.begin(&self.q, &self.levels, &self.ranges);
            }
        }
        if in_place.1 {
            let stored = value.layout.stored;
            self.blocks.clear();
            self.blocks.extend((0..stored).map(|c| value.block_of(h, c)));
            self.block_pairs.clear();
            self.lines.clear();
            for line in 0..stored / 2 {
                let c = line / 8 * 16 + line % 8;
                let pair = [self.blocks[c], self.blocks[c + 8]];
                let known = self.block_pairs.iter().position(|p| *p == pair);
                self.lines.push(known.unwrap_or(self.block_pairs.len()));
                if known.is_none() {
                    self.block_pairs.push(pair);
                }
            }
            let blocks = 1 + self.blocks.iter().copied().max().unwrap_or(0);
            self.acc.resize(self.columns * stored, Lane::default());
            self.begun.clear();
            self.begun.resize(self.columns.div_ceil(SHARED), false);
            self.exact_used = false;
            self.weights.begin(self.columns, self.block_pairs.len());
            self.has_zeros = value.layout.fields == 2;
            self.zeros.clear();
            self.zeros.resize(self.columns * blocks, 0.0);
        }
    }

    /// Scores of a page: column `i`'s 64 go to `scores[i * stride..]`, in places.
    pub(super) fn keys(&mut self, codec: &SideCodec, half: &Half, scores: &mut [f32], stride: usize) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.keys_avx2(codec, half, scores, stride) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn keys_avx2(&mut self, codec: &SideCodec, half: &Half, scores: &mut [f32], stride: usize) {
        let layout = &codec.layout;
        let mut next_fields = &half.next[half.next.len().min(layout.code_bytes)..];
        let codes = four_bits(codec, half, &mut self.codes[0]);
        let slabs = self.levels.len();
        assert!(codes.len() == slabs * SLAB && slabs * SLAB_CHANNELS == layout.stored);
        let mut most = 1.0;
        let per_token = if let FieldAxis::PerChannel { group } = layout.axis {
            let (bytes, dtype) = (&half.bytes[layout.code_bytes..][..layout.field_bytes], codec.scale_dtype);
            self.laid.lay(Some(lay::KeyFields { bytes, dtype, fields: layout.fields, group }));
            false
        } else {
            self.token_fields.iter_mut().for_each(Vec::clear);
            token_fields(codec, half, &mut self.fields, &mut self.token_fields);
            most = self.token_fields[0].iter().fold(0f32, |m, s| m.max(s.abs()));
            true
        };
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            let by_integers = self.laid.close_enough(first, share, most);
            if !by_integers {
                self.laid.lay_exact(first, share, &self.q);
            }
            for (r, &(slab, slabs, block)) in self.ranges.iter().enumerate() {
                let codes = codes[slab * SLAB..][..slabs * SLAB].as_ptr();
                let next = half.next.as_ptr().wrapping_add(slab * SLAB);
                let scales = per_token.then(|| &self.token_fields[0][block * PAGE_TOKENS..][..PAGE_TOKENS]);
                if by_integers {
                    let (q, factors) = self.laid.integers(first, share, r);
                    let levels = &self.levels[slab..slab + slabs];
                    let mut columns = [Score { to: std::ptr::null_mut(), start: std::ptr::null() }; SHARED];
                    for (i, score) in columns.iter_mut().enumerate().take(share) {
                        score.to = scores[(first + i) * stride..][..PAGE_TOKENS].as_mut_ptr();
                        score.start = if r == 0 { self.laid.base(first + i) } else { std::ptr::null() };
                    }
                    let scales = scales.map_or(std::ptr::null(), <[f32]>::as_ptr);
                    let fields = std::mem::take(&mut next_fields);
                    // SAFETY: the range's slabs and what was laid out for them, scaled to fit; 64 places each.
                    unsafe {
                        if self.wide && !self.laid.split() {
                            let args = (codes, next, fields, levels, q);
                            by_columns!(share, integers512::key_page(args, factors, scales, &columns));
                        } else if self.laid.split() {
                            by_columns!(
                                share,
                                integers::key_page,
                                true(codes, next, fields, levels, q, factors, scales, &columns)
                            );
                        } else {
                            by_columns!(
                                share,
                                integers::key_page,
                                false(codes, next, fields, levels, q, factors, scales, &columns)
                            );
                        }
                    }
                } else {
                    let mut products = [[0f32; PAGE_TOKENS]; SHARED];
                    let (q, books) = (self.laid.exact(share, slab), &self.books[slab..slab + slabs]);
                    // SAFETY: the range's slabs, and eight lanes for each slab and column.
                    unsafe { by_columns!(share, codes::key_page(codes, next, books, q, &mut products)) };
                    for (i, products) in products.iter().enumerate().take(share) {
                        let to = &mut scores[(first + i) * stride..][..PAGE_TOKENS];
                        let base = self.laid.base(first + i);
                        for (p, (to, x)) in to.iter_mut().zip(products).enumerate() {
                            let x = scales.map_or(*x, |s| x * s[p]);
                            *to = if r == 0 { base[p % 8] + x } else { *to + x };
                        }
                    }
                }
                if layout.fields == 2 && per_token {
                    let zero = &self.token_fields[1][block * PAGE_TOKENS..][..PAGE_TOKENS];
                    for i in first..first + share {
                        let sum = self.q_sums[r * self.columns + i];
                        let to = &mut scores[i * stride..][..PAGE_TOKENS];
                        to.iter_mut().zip(zero).for_each(|(o, z)| *o += z * sum);
                    }
                }
            }
        }
    }

    /// Adds the values of at most [`GROUP`] neighbouring pages, weighted: column `i`'s 64 weights of page `j` stand at
    /// `weights[i * stride + 64 * j..]`, in places.
    pub(super) fn values(&mut self, codec: &SideCodec, halves: &[Half], books: &Books, weights: &[f32], stride: usize) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.values_avx2(codec, halves, books, weights, stride) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn values_avx2(&mut self, codec: &SideCodec, halves: &[Half], books: &Books, weights: &[f32], stride: usize) {
        let layout = &codec.layout;
        let FieldAxis::PerToken { blocks: all } = layout.axis else { unreachable!("per-token fields") };
        self.token_fields.iter_mut().for_each(Vec::clear);
        let mut pages = [(std::ptr::null(), std::ptr::null()); GROUP];
        for ((half, room), page) in halves.iter().zip(&mut self.codes).zip(&mut pages) {
            fetch(&half.next[half.next.len().min(layout.code_bytes)..]);
            token_fields(codec, half, &mut self.fields, &mut self.token_fields);
            let codes = four_bits(codec, half, room);
            assert!(codes.len() * SLAB_CHANNELS == self.blocks.len() * SLAB);
            *page = (codes.as_ptr(), half.next.as_ptr());
        }
        let pages = &pages[..halves.len()];
        let used = self.zeros.len() / self.columns;
        if layout.fields == 2 {
            for (i, zeros) in self.zeros.chunks_exact_mut(used).enumerate() {
                for j in 0..pages.len() {
                    let p = &weights[i * stride + j * PAGE_TOKENS..][..PAGE_TOKENS];
                    for (b, sum) in zeros.iter_mut().enumerate() {
                        let zero = &self.token_fields[1][(j * all + b) * PAGE_TOKENS..][..PAGE_TOKENS];
                        *sum += lay::dot(p, zero);
                    }
                }
            }
        }
        let lines = self.lines.len();
        let (book, levels) = &books.value;
        // One block for each line is what the integers want.
        let simple = self.block_pairs.iter().all(|p| p[0] == p[1]);
        for first in (0..self.columns).step_by(SHARED) {
            let share = SHARED.min(self.columns - first);
            let scales = lay::Scales { fields: &self.token_fields[0], blocks: all, pages: pages.len() };
            let weights = |i: usize, j: usize| &weights[(first + i) * stride + j * PAGE_TOKENS..][..PAGE_TOKENS];
            let (room, pairs) = (&mut self.weights, &self.block_pairs[..]);
            let reading = match share {
                _ if !simple => Reading::Apart([false; GROUP]),
                1 => room.lay::<1>(first, pairs, &scales, levels, &weights),
                2 => room.lay::<2>(first, pairs, &scales, levels, &weights),
                3 => room.lay::<3>(first, pairs, &scales, levels, &weights),
                _ => room.lay::<4>(first, pairs, &scales, levels, &weights),
            };
            let parts = if reading == Reading::Together { 1 } else { pages.len() };
            for (j, part) in pages.chunks(pages.len() / parts).enumerate() {
                if matches!(reading, Reading::Together) || matches!(reading, Reading::Apart(close) if close[j]) {
                    let acc = &mut self.acc[2 * first * lines..][..2 * share * lines];
                    let (w, steps) = room.integers(j, pairs.len(), share);
                    let fresh = !std::mem::replace(&mut self.begun[first / SHARED], true);
                    // SAFETY: all lines of each page, and what was laid out for them, scaled to fit.
                    unsafe {
                        if self.wide {
                            by_columns!(share, integers512::value_pages(part, levels, &self.lines, w, steps, acc, fresh));
                        } else {
                            by_columns!(share, integers::value_pages(part, levels, &self.lines, w, steps, acc, fresh));
                        }
                    }
                    continue;
                }
                if !self.exact_used {
                    self.exact_used = true;
                    self.exact.clear();
                    self.exact.resize(self.columns * lines, Lane::default());
                }
                let acc = self.exact[first * lines..][..share * lines].as_mut_ptr();
                let w = room.lay_exact(share, pairs, &scales, j, &weights);
                let (codes, next) = part[0];
                // SAFETY: all slabs and accumulators, and eight weights for each block and column.
                unsafe { by_columns!(share, codes::value_page(codes, next, &self.lines, w, book, acc)) };
            }
        }
    }

    /// Ends a run: adds what its pages gave to `out`, `[columns][stored]`, and begins the next.
    pub(super) fn finish(&mut self, out: &mut [f32]) {
        // SAFETY: codes are read in place only where the features were found.
        unsafe { self.finish_avx2(out) };
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn finish_avx2(&mut self, out: &mut [f32]) {
        let (stored, lines) = (self.blocks.len(), self.lines.len());
        let blocks = self.zeros.len() / self.columns;
        for (column, out) in out.chunks_exact_mut(stored).enumerate() {
            let (part, i) = (column / SHARED, column % SHARED);
            let share = SHARED.min(self.columns - part * SHARED);
            let zeros = &self.zeros[column * blocks..][..blocks];
            let at = part * SHARED * lines + i;
            for (place, out) in out.chunks_exact_mut(8).enumerate() {
                // Eight lines and one channel of each are eight neighbours.
                let (line, second) = (place / 2 * 8, place % 2);
                if self.begun[part] {
                    let lanes = &self.acc[2 * (at + line * share) + second..][..14 * share + 1];
                    lay::add_totals(lanes, 2 * share, out);
                }
                if self.exact_used {
                    for (j, out) in out.iter_mut().enumerate() {
                        let l = &self.exact[at + (line + j) * share].0;
                        *out += (l[second] + l[4 + second]) + (l[2 + second] + l[6 + second]);
                    }
                }
                if self.has_zeros {
                    for (out, block) in out.iter_mut().zip(&self.blocks[8 * place..]) {
                        *out += zeros[*block];
                    }
                }
            }
        }
        self.begun.fill(false);
        self.exact_used = false;
        self.weights.begin(self.columns, self.block_pairs.len());
        self.zeros.fill(0.0);
    }
}

/// Asks for the lines of `bytes`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn fetch(bytes: &[u8]) {
    for line in bytes.chunks(64) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}
