//! The fast path: which unit does what, softmax over a run, and the merge of runs.

use std::ops::Range;

use rayon::prelude::*;

use super::math::{Product, Simd, exp, exp_sum, max, soft_cap};
use super::tile::{self, Scratch, Tables};
use super::{Plan, Source, Tile};
#[cfg(target_arch = "x86_64")]
use super::{codes::Book, lanes::Half};
use crate::page::{PAGE_TOKENS, Side};
use crate::tensor::Dtype;

/// Up to this many query columns per KV head, runs are long, and codes at 4 bits are read in place.
const FEW_COLUMNS: usize = 16;
/// Tiles of a run: few columns, many columns.
const RUN_TILES: [usize; 2] = [16, 4];
/// Columns of a unit if there are many: what shares one decode of a tile.
const UNIT_COLUMNS: usize = 256;

/// What a run gives for each of its columns.
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[columns][stored]`.
    acc: Vec<f32>,
}

/// Columns of one KV head: column `c` is query `c / group`, head `c % group` of the group.
struct Unit {
    b: usize,
    h: usize,
    columns: Range<usize>,
}

/// Scratch of a worker.
#[derive(Default)]
struct Room {
    tile: Scratch,
    scores: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    lanes: super::lanes::Lanes,
}

struct Kernel<'a> {
    plan: &'a Plan<'a>,
    simd: Simd,
    key: Tables<'a>,
    value: Tables<'a>,
    /// Codes of keys, of values are read in place.
    in_place: (bool, bool),
    run_tiles: usize,
}

pub(super) fn attend(plan: &Plan, simd: Simd, out: &mut [f32], mut lse: Option<&mut [f32]>) {
    let all = plan.group * plan.count;
    if all == 0 || plan.batch == 0 {
        return;
    }
    let few = all <= FEW_COLUMNS;
    let codec = plan.cache.codec();
    let kernel = Kernel {
        plan,
        simd,
        key: Tables::new(&codec.key),
        value: Tables::new(&codec.value),
        in_place: if few { in_place(plan, simd) } else { (false, false) },
        run_tiles: RUN_TILES[usize::from(!few)],
    };
    let mut units = Vec::new();
    for (b, h) in (0..plan.batch).flat_map(|b| (0..plan.heads).map(move |h| (b, h))) {
        for first in (0..all).step_by(UNIT_COLUMNS) {
            units.push(Unit { b, h, columns: first..all.min(first + UNIT_COLUMNS) });
        }
    }
    // Merging is a left fold over runs, wherever they are computed: the split below does not change a bit.
    let enough = units.len() >= 4 * rayon::current_num_threads();
    let done: Vec<Option<Partial>> =
        units.par_iter().map_init(Room::default, |room, unit| kernel.unit(unit, enough, room)).collect();
    let (stored, dim) = (codec.value.layout.stored, plan.value_dim);
    for (unit, partial) in units.iter().zip(&done) {
        for (i, c) in unit.columns.clone().enumerate() {
            let row = plan.row(unit.b, c / plan.group, unit.h * plan.group + c % plan.group);
            let to = &mut out[row * dim..][..dim];
            let (mut log, mut scale) = (f32::NEG_INFINITY, 0.0);
            if let Some(p) = partial.as_ref().filter(|p| p.sum[i] != 0.0) {
                scale = 1.0 / p.sum[i];
                log = p.max[i] + p.sum[i].ln();
                to.iter_mut().zip(&p.acc[i * stored..]).for_each(|(o, a)| *o = a * scale);
            }
            if scale == 0.0 {
                to.fill(0.0);
            }
            if let Some(lse) = lse.as_deref_mut() {
                lse[row] = log;
            }
        }
    }
}

/// Whether the codes of keys, of values can be read in place.
fn in_place(plan: &Plan, simd: Simd) -> (bool, bool) {
    #[cfg(target_arch = "x86_64")]
    if simd == Simd::Avx2 {
        let codec = plan.cache.codec();
        return (super::lanes::reads_keys(&codec.key, codec.heads), super::lanes::reads_values(&codec.value));
    }
    let _ = (plan, simd);
    (false, false)
}

/// Token at lane place `p`: `n/16`, then `n%8 / 4`, `n % 2`, `n/2 % 2`, `n/8 % 2`.
pub(super) fn token_of_place(p: usize) -> usize {
    p / 16 * 16 + 8 * (p % 2) + 4 * (p / 8 % 2) + 2 * (p / 2 % 2) + p / 4 % 2
}

impl Partial {
    /// Adds a later run.
    fn merge(&mut self, other: &Self, stored: usize) {
        for i in 0..self.max.len() {
            let (a, b) = (self.max[i], other.max[i]);
            if other.sum[i] == 0.0 {
                continue;
            }
            let top = if b > a { b } else { a };
            // A column that has attended nothing so far has sum 0 and keeps factor 0.
            let (fa, fb) = (if self.sum[i] == 0.0 { 0.0 } else { exp(a - top) }, exp(b - top));
            self.max[i] = top;
            self.sum[i] = self.sum[i] * fa + other.sum[i] * fb;
            let rows = self.acc[i * stored..][..stored].iter_mut().zip(&other.acc[i * stored..][..stored]);
            rows.for_each(|(x, y)| *x = *x * fa + y * fb);
        }
    }
}

impl Kernel<'_> {
    /// All runs of a unit; `None` if it attends nothing.
    fn unit(&self, unit: &Unit, alone: bool, room: &mut Room) -> Option<Partial> {
        let plan = self.plan;
        let first = plan.bounds(unit.b, unit.columns.start / plan.group).0;
        let end = plan.bounds(unit.b, (unit.columns.end - 1) / plan.group).1;
        let tiles: Vec<Tile> =
            plan.tiles[unit.b].iter().filter(|t| t.start < end && t.start + t.count > first).copied().collect();
        let stored = plan.cache.codec().value.layout.stored;
        let fold = |mut a: Partial, b: Partial| {
            a.merge(&b, stored);
            a
        };
        let runs = tiles.chunks(self.run_tiles);
        if alone || tiles.len() <= self.run_tiles {
            return runs.map(|run| self.run(unit, run, room)).reduce(fold);
        }
        let parts: Vec<Partial> =
            tiles.par_chunks(self.run_tiles).map_init(Room::default, |room, run| self.run(unit, run, room)).collect();
        parts.into_iter().reduce(fold)
    }

    /// One run: scores of all its tiles, softmax, values.
    fn run(&self, unit: &Unit, tiles: &[Tile], room: &mut Room) -> Partial {
        let (plan, simd) = (self.plan, self.simd);
        let codec = plan.cache.codec();
        let (b, h, columns) = (unit.b, unit.h, unit.columns.len());
        let (dim, stored, width) = (plan.key_dim, codec.value.layout.stored, tiles.len() * PAGE_TOKENS);
        let mut q = vec![0f32; columns * dim];
        let mut bytes = Vec::new();
        for (c, row) in unit.columns.clone().zip(q.chunks_exact_mut(dim)) {
            let head = h * plan.group + c % plan.group;
            plan.queries.q.row_f32(b, head, c / plan.group, Dtype::F32, &mut bytes, row);
            row.iter_mut().for_each(|x| *x *= plan.queries.scale as f32);
        }
        room.scores.clear();
        room.scores.resize(columns * width, 0.0);
        let scores = &mut room.scores;
        #[cfg(target_arch = "x86_64")]
        room.lanes.begin(&codec.key, &codec.value, h, &q, self.in_place);
        let keys = |scratch: &Scratch, at: usize, scores: &mut [f32]| {
            let (a, b) = (&q[..], &scratch.tile[..]);
            let p = Product { a, a_stride: dim, b, b_stride: 64, c_stride: width, rows: columns, depth: dim, width: 64 };
            p.run(simd, &mut scores[at..]);
        };
        #[cfg(target_arch = "x86_64")]
        let books: Vec<Book> = self.key.sixteens().iter().map(Book::new).collect();
        let pages = |from: usize| {
            tiles[from..].iter().filter_map(|t| match t.source {
                Source::Page(p) => Some(codec.halves(plan.views[b].pages[p].0, h)),
                _ => None,
            })
        };
        for (i, tile) in tiles.iter().enumerate() {
            let at = i * PAGE_TOKENS;
            if let Source::Page(p) = tile.source {
                let half = codec.halves(plan.views[b].pages[p].0, h).0;
                #[cfg(target_arch = "x86_64")]
                if self.in_place.0 {
                    // After the last keys come the first values.
                    let next = pages(i + 1).next().map(|half| half.0).or(pages(0).next().map(|half| half.1));
                    let half = Half { bytes: half, count: tile.count, next: next.unwrap_or(half) };
                    room.lanes.keys(&codec.key, &half, &books, &mut scores[at..], width);
                    continue;
                }
                tile::keys(simd, &self.key, half, h, tile.count, &mut room.tile);
            } else {
                tile::exact(plan, b, h, tile, Side::Key, &mut room.tile);
            }
            keys(&room.tile, at, scores);
        }
        let mut partial = Partial { max: vec![f32::NEG_INFINITY; columns], sum: vec![0.0; columns], acc: Vec::new() };
        for (i, c) in unit.columns.clone().enumerate() {
            let row = &mut scores[i * width..][..width];
            if let Some(cap) = plan.queries.soft_cap {
                soft_cap(simd, row, cap as f32);
            }
            let (first, end) = plan.bounds(b, c / plan.group);
            for (tile, row) in tiles.iter().zip(row.chunks_exact_mut(PAGE_TOKENS)) {
                let attended = first.saturating_sub(tile.start)..end.saturating_sub(tile.start).min(tile.count);
                if attended != (0..PAGE_TOKENS) {
                    let lanes = self.in_place.0 && matches!(tile.source, Source::Page(_));
                    for (p, s) in row.iter_mut().enumerate() {
                        let n = if lanes { token_of_place(p) } else { p };
                        // Chosen, not multiplied: a slot beyond the count may hold anything.
                        *s = if attended.contains(&n) { *s } else { f32::NEG_INFINITY };
                    }
                }
            }
            partial.max[i] = max(simd, row);
            if partial.max[i] == f32::NEG_INFINITY {
                row.fill(0.0);
            } else {
                partial.sum[i] = exp_sum(simd, row, partial.max[i]);
            }
        }
        partial.acc = vec![0.0; columns * stored];
        self.values(unit, tiles, room, width, &mut partial.acc);
        partial
    }

    /// Adds the values of a run, weighted with what stands in `room.scores`, to `acc`.
    fn values(&self, unit: &Unit, tiles: &[Tile], room: &mut Room, width: usize, acc: &mut [f32]) {
        let (plan, simd, columns) = (self.plan, self.simd, unit.columns.len());
        let codec = plan.cache.codec();
        let (b, h, stored) = (unit.b, unit.h, codec.value.layout.stored);
        let mut natural = Vec::new();
        #[cfg(target_arch = "x86_64")]
        let book = Book::new(&self.value.sixteens()[0]);
        for (i, tile) in tiles.iter().enumerate() {
            let (mut at, mut stride) = (i * PAGE_TOKENS, width);
            let mut weights = &mut room.scores;
            if let Source::Page(p) = tile.source {
                let half = codec.halves(plan.views[b].pages[p].0, h).1;
                if self.in_place.0 != self.in_place.1 {
                    // Weights stand in the order of one reader and go to the other.
                    natural.resize(columns * PAGE_TOKENS, 0.0);
                    for c in 0..columns {
                        for place in 0..PAGE_TOKENS {
                            let (from, to) =
                                if self.in_place.0 { (place, token_of_place(place)) } else { (token_of_place(place), place) };
                            natural[c * PAGE_TOKENS + to] = weights[c * width + at + from];
                        }
                    }
                    (at, stride, weights) = (0, PAGE_TOKENS, &mut natural);
                }
                #[cfg(target_arch = "x86_64")]
                if self.in_place.1 {
                    let next = tiles[i + 1..].iter().find_map(|t| match t.source {
                        Source::Page(p) => Some(codec.halves(plan.views[b].pages[p].0, h).1),
                        _ => None,
                    });
                    let half = Half { bytes: half, count: tile.count, next: next.unwrap_or(half) };
                    room.lanes.values(&codec.value, &half, &book, &weights[at..], stride);
                    continue;
                }
                tile::values(simd, &self.value, half, h, tile.count, &mut room.tile);
            } else {
                tile::exact(plan, b, h, tile, Side::Value, &mut room.tile);
            }
            let (a, b) = (&weights[at..], &room.tile.tile[..]);
            let p = Product {
                a,
                a_stride: stride,
                b,
                b_stride: stored,
                c_stride: stored,
                rows: columns,
                depth: tile.count,
                width: stored,
            };
            p.run(simd, acc);
        }
        #[cfg(target_arch = "x86_64")]
        if self.in_place.1 {
            room.lanes.finish(acc);
        }
    }
}
