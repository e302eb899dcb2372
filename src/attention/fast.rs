//! The fast path: which task does what, softmax over a run, and the merge of runs.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::math::{Product, Simd, exp, exp_sum, max, scores, soft_cap};
use super::tile::{self, Scratch, Tables};
use super::{Plan, Source, Tile};
#[cfg(target_arch = "x86_64")]
use super::{
    integers::GROUP,
    lanes::{Books, Half, Lanes},
    places::token_of_place,
};
use crate::page::{PAGE_TOKENS, Side};
use crate::parallel;
use crate::tensor::Dtype;

/// Up to this many query columns per KV head, runs are long, and codes at 4 bits are read in place.
const FEW_COLUMNS: usize = 16;
/// Tiles of a run: few columns, many columns.
const RUN_TILES: [usize; 2] = [16, 4];
/// Columns of a unit if there are many: what shares one decode of a tile.
const UNIT_COLUMNS: usize = 256;
/// Tiles (times four columns) that are read sooner than another thread wakes up.
const ALONE: usize = 32;
/// Tasks of a unit: few columns, many columns, whose results are large.
const UNIT_TASKS: [usize; 2] = [16, 2];

/// Value halves that are fetched during softmax: those that are read together.
const VALUES_FIRST: usize = 4;

/// What a run gives for each of its columns.
#[derive(Default)]
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

/// Neighbouring runs of a unit: what one thread does.
struct Task {
    unit: usize,
    tiles: Range<usize>,
}

/// Scratch of a thread.
#[derive(Default)]
struct Room {
    /// Call and unit whose queries are laid out here.
    begun: Option<(u64, usize)>,
    /// Queries, `[columns][dim]`, scaled.
    q: Vec<f32>,
    bytes: Vec<u8>,
    tile: Scratch,
    scores: Vec<f32>,
    run: Partial,
    #[cfg(target_arch = "x86_64")]
    lanes: Lanes,
}

thread_local! {
    /// Kept from call to call: a decoding step is too short to allocate much.
    static ROOM: RefCell<Room> = RefCell::default();
}

struct Kernel<'a> {
    plan: &'a Plan<'a>,
    simd: Simd,
    /// Tells calls apart.
    call: u64,
    units: Vec<Unit>,
    /// Of keys, of values; absent where codes are read in place.
    tables: (Option<Tables<'a>>, Option<Tables<'a>>),
    #[cfg(target_arch = "x86_64")]
    books: Option<Books>,
    run_tiles: usize,
}

pub(super) fn attend(plan: &Plan, simd: Simd, out: &mut [f32], mut lse: Option<&mut [f32]>) {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let all = plan.group * plan.count;
    if all == 0 || plan.batch == 0 {
        return;
    }
    let few = all <= FEW_COLUMNS;
    let codec = plan.cache.codec();
    let in_place = if few { in_place(plan, simd) } else { (false, false) };
    let mut kernel = Kernel {
        plan,
        simd,
        call: CALLS.fetch_add(1, Ordering::Relaxed),
        units: Vec::new(),
        tables: ((!in_place.0).then(|| Tables::new(&codec.key)), (!in_place.1).then(|| Tables::new(&codec.value))),
        #[cfg(target_arch = "x86_64")]
        books: (in_place.0 || in_place.1).then(|| Books::new(&codec.key, &codec.value, simd)),
        run_tiles: RUN_TILES[usize::from(!few)],
    };
    for (b, h) in (0..plan.batch).flat_map(|b| (0..plan.heads).map(move |h| (b, h))) {
        for first in (0..all).step_by(UNIT_COLUMNS) {
            kernel.units.push(Unit { b, h, columns: first..all.min(first + UNIT_COLUMNS) });
        }
    }
    // Cut by the lengths of sequences alone, so that no bit depends on threads or on what else is in the batch.
    let mut tasks = Vec::new();
    for unit in 0..kernel.units.len() {
        let tiles = kernel.reach(&kernel.units[unit]);
        let runs = tiles.len().div_ceil(kernel.run_tiles);
        let step = kernel.run_tiles * runs.div_ceil(UNIT_TASKS[usize::from(!few)]).max(1);
        tasks.extend(tiles.clone().step_by(step).map(|at| Task { unit, tiles: at..tiles.end.min(at + step) }));
    }
    let one = |task: &Task| ROOM.with_borrow_mut(|room| kernel.task(task, room));
    let work = tasks.iter().map(|t| t.tiles.len()).sum::<usize>() * all.div_ceil(4);
    let mut done: Vec<Partial> = if work <= ALONE { tasks.iter().map(one).collect() } else { parallel::map(&tasks, one) };
    let stored = codec.value.layout.stored;
    let mut next = 0;
    for (u, unit) in kernel.units.iter().enumerate() {
        let count = tasks[next..].iter().take_while(|t| t.unit == u).count();
        let (first, later) = done[next..next + count].split_at_mut(count.min(1));
        next += count;
        let total = first.first_mut();
        let total = total.map(|total| {
            later.iter().for_each(|p| total.merge(p, stored));
            &*total
        });
        kernel.write(unit, total, out, lse.as_deref_mut());
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn token_of_place(p: usize) -> usize {
    p
}

/// Whether the codes of keys, of values can be read in place.
fn in_place(plan: &Plan, simd: Simd) -> (bool, bool) {
    #[cfg(target_arch = "x86_64")]
    if simd.avx2() {
        let codec = plan.cache.codec();
        return (super::lanes::reads_keys(&codec.key, codec.heads), super::lanes::reads_values(&codec.value));
    }
    let _ = (plan, simd);
    (false, false)
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
    /// Indices of the tiles that a unit attends.
    fn reach(&self, unit: &Unit) -> Range<usize> {
        let (plan, tiles) = (self.plan, &self.plan.tiles[unit.b]);
        let first = plan.bounds(unit.b, unit.columns.start / plan.group).0;
        let end = plan.bounds(unit.b, (unit.columns.end - 1) / plan.group).1;
        let from = tiles.partition_point(|t| t.start + t.count <= first);
        from..tiles.partition_point(|t| t.start < end).max(from)
    }

    /// Writes the result of a unit; zeros where nothing was attended.
    fn write(&self, unit: &Unit, total: Option<&Partial>, out: &mut [f32], mut lse: Option<&mut [f32]>) {
        let (plan, dim) = (self.plan, self.plan.value_dim);
        let stored = plan.cache.codec().value.layout.stored;
        for (i, c) in unit.columns.clone().enumerate() {
            let row = plan.row(unit.b, c / plan.group, unit.h * plan.group + c % plan.group);
            let to = &mut out[row * dim..][..dim];
            let mut log = f32::NEG_INFINITY;
            match total.filter(|p| p.sum[i] != 0.0) {
                Some(p) => {
                    let scale = 1.0 / p.sum[i];
                    log = p.max[i] + p.sum[i].ln();
                    to.iter_mut().zip(&p.acc[i * stored..]).for_each(|(o, a)| *o = a * scale);
                }
                None => to.fill(0.0),
            }
            if let Some(lse) = lse.as_deref_mut() {
                lse[row] = log;
            }
        }
    }

    /// All runs of a task.
    fn task(&self, task: &Task, room: &mut Room) -> Partial {
        let (plan, unit) = (self.plan, &self.units[task.unit]);
        let codec = plan.cache.codec();
        if room.begun != Some((self.call, task.unit)) {
            room.begun = None;
            room.q.resize(unit.columns.len() * plan.key_dim, 0.0);
            for (c, row) in unit.columns.clone().zip(room.q.chunks_exact_mut(plan.key_dim)) {
                let head = unit.h * plan.group + c % plan.group;
                plan.queries.q.row_f32(unit.b, head, c / plan.group, Dtype::F32, &mut room.bytes, row);
                row.iter_mut().for_each(|x| *x *= plan.queries.scale as f32);
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(books) = &self.books {
                let in_place = (self.tables.0.is_none(), self.tables.1.is_none());
                room.lanes.begin(&codec.key, &codec.value, unit.h, &room.q, books, in_place);
            }
            room.begun = Some((self.call, task.unit));
        }
        // Nobody read ahead for a task: who had the one before may be another thread.
        if let Some(half) = plan.tiles[unit.b].get(task.tiles.start).and_then(|t| self.half(unit, t, Side::Key)) {
            self.fetch(half);
        }
        let mut total: Option<Partial> = None;
        for first in task.tiles.clone().step_by(self.run_tiles) {
            let (run, after) = plan.tiles[unit.b][first..].split_at(self.run_tiles.min(task.tiles.end - first));
            self.run(unit, run, after, room);
            match &mut total {
                Some(total) => total.merge(&room.run, codec.value.layout.stored),
                None => total = Some(std::mem::take(&mut room.run)),
            }
        }
        total.expect("a task has tiles")
    }

    /// One run, into `room.run`: scores of all its tiles, softmax, values. What is read `after` is fetched ahead.
    fn run(&self, unit: &Unit, tiles: &[Tile], after: &[Tile], room: &mut Room) {
        let (plan, simd) = (self.plan, self.simd);
        let codec = plan.cache.codec();
        let (b, h, columns) = (unit.b, unit.h, unit.columns.len());
        let (dim, width) = (plan.key_dim, tiles.len() * PAGE_TOKENS);
        // Every score is written below; what is masked may be anything.
        room.scores.resize(columns * width, 0.0);
        for (i, tile) in tiles.iter().enumerate() {
            let at = i * PAGE_TOKENS;
            match (tile.source, &self.tables.0) {
                #[cfg(target_arch = "x86_64")]
                (Source::Page(p), None) => {
                    let rows = &plan.views[b].pages;
                    // After the last keys come the first values.
                    let next = match tiles.get(i + 1).map(|t| t.source) {
                        Some(Source::Page(p)) => codec.halves(rows[p].0, h).0,
                        _ => tiles.iter().find_map(|t| self.half(unit, t, Side::Value)).unwrap_or_default(),
                    };
                    let half = Half { bytes: codec.halves(rows[p].0, h).0, count: tile.count, next };
                    room.lanes.keys(&codec.key, &half, &mut room.scores[at..], width);
                    continue;
                }
                (Source::Page(p), tables) => {
                    let half = codec.halves(plan.views[b].pages[p].0, h).0;
                    let tables = tables.as_ref().expect("codes in place are only read on x86");
                    tile::keys(simd, tables, half, h, tile.count, &mut room.tile);
                }
                _ if columns <= FEW_COLUMNS => {
                    tile::exact(simd, plan, (b, h), tile, Side::Key, true, &mut room.tile);
                    let rows = &room.tile.tile[..tile.count * dim];
                    scores(simd, &room.q[..columns * dim], rows, dim, &mut room.scores[at..], width);
                    continue;
                }
                _ => tile::exact(simd, plan, (b, h), tile, Side::Key, false, &mut room.tile),
            }
            for row in room.scores[at..].chunks_mut(width).take(columns) {
                row[..PAGE_TOKENS].fill(0.0);
            }
            let (a, b) = (&room.q[..], &room.tile.tile[..]);
            let p = Product { a, a_stride: dim, b, b_stride: 64, c_stride: width, rows: columns, depth: dim, width: 64 };
            p.run(simd, &mut room.scores[at..]);
        }
        let partial = &mut room.run;
        partial.max.clear();
        partial.sum.clear();
        for (i, c) in unit.columns.clone().enumerate() {
            // Meanwhile the first values come, a few for each column.
            for tile in tiles.iter().take(VALUES_FIRST).skip(i * VALUES_FIRST / columns).take(VALUES_FIRST.div_ceil(columns)) {
                self.half(unit, tile, Side::Value).into_iter().for_each(|half| self.fetch(half));
            }
            let row = &mut room.scores[i * width..][..width];
            if let Some(cap) = plan.queries.soft_cap {
                soft_cap(simd, row, cap as f32);
            }
            let (first, end) = plan.bounds(b, c / plan.group);
            for (tile, row) in tiles.iter().zip(row.chunks_exact_mut(PAGE_TOKENS)) {
                let attended = first.saturating_sub(tile.start)..end.saturating_sub(tile.start).min(tile.count);
                if attended != (0..PAGE_TOKENS) {
                    let places = self.tables.0.is_none() && matches!(tile.source, Source::Page(_));
                    for (p, s) in row.iter_mut().enumerate() {
                        let n = if places { token_of_place(p) } else { p };
                        // Chosen, not multiplied: a slot beyond the count may hold anything.
                        *s = if attended.contains(&n) { *s } else { f32::NEG_INFINITY };
                    }
                }
            }
            let top = max(simd, row);
            partial.max.push(top);
            if top == f32::NEG_INFINITY {
                row.fill(0.0);
                partial.sum.push(0.0);
            } else {
                partial.sum.push(exp_sum(simd, row, top));
            }
        }
        self.values(unit, tiles, after, room, width);
    }

    /// Asks for a half that is read soon, if it is read in place.
    fn fetch(&self, half: &[u8]) {
        #[cfg(target_arch = "x86_64")]
        if self.books.is_some() {
            // SAFETY: books are there only where the features were found.
            unsafe { super::lanes::fetch(half) };
        }
        let _ = half;
    }

    /// The keys' or values' half of a tile that is a page.
    fn half(&self, unit: &Unit, tile: &Tile, side: Side) -> Option<&[u8]> {
        let Source::Page(p) = tile.source else { return None };
        let (k, v) = self.plan.cache.codec().halves(self.plan.views[unit.b].pages[p].0, unit.h);
        Some(if side == Side::Key { k } else { v })
    }

    /// Values of a run, weighted with what stands in `room.scores`, into `room.run.acc`.
    fn values(&self, unit: &Unit, tiles: &[Tile], after: &[Tile], room: &mut Room, width: usize) {
        let (plan, simd, columns) = (self.plan, self.simd, unit.columns.len());
        let codec = plan.cache.codec();
        let (b, h, stored) = (unit.b, unit.h, codec.value.layout.stored);
        room.run.acc.clear();
        room.run.acc.resize(columns * stored, 0.0);
        if self.tables.0.is_none() != self.tables.1.is_none() {
            // Weights stand in the order of one reader and go to the other.
            let pages = tiles.iter().enumerate().filter(|(_, t)| matches!(t.source, Source::Page(_)));
            for (row, (i, _)) in pages.flat_map(|p| (0..columns).map(move |row| (row, p))) {
                let row = &mut room.scores[row * width + i * PAGE_TOKENS..][..PAGE_TOKENS];
                let from: [f32; PAGE_TOKENS] = (&*row).try_into().expect("64 weights");
                for p in 0..PAGE_TOKENS {
                    match self.tables.0 {
                        None => row[token_of_place(p)] = from[p],
                        Some(_) => row[p] = from[token_of_place(p)],
                    }
                }
            }
        }
        let mut i = 0;
        while i < tiles.len() {
            let (tile, at) = (&tiles[i], i * PAGE_TOKENS);
            match (self.half(unit, tile, Side::Value), &self.tables.1) {
                #[cfg(target_arch = "x86_64")]
                (Some(bytes), None) => {
                    let mut halves = [Half { bytes, count: tile.count, next: &[] }; GROUP];
                    let mut count = 0;
                    for (j, to) in halves.iter_mut().enumerate() {
                        let Some((tile, bytes)) = tiles.get(i + j).and_then(|t| Some((t, self.half(unit, t, Side::Value)?)))
                        else {
                            break;
                        };
                        // After the last values come the next keys.
                        let next = match tiles.get(i + j + GROUP) {
                            Some(later) => self.half(unit, later, Side::Value),
                            None => after.get(j).and_then(|t| self.half(unit, t, Side::Key)),
                        };
                        let next = next.unwrap_or(bytes);
                        (*to, count) = (Half { bytes, count: tile.count, next }, j + 1);
                    }
                    let books = self.books.as_ref().expect("books for codes read in place");
                    room.lanes.values(&codec.value, &halves[..count], books, &room.scores[at..], width);
                    i += count;
                    continue;
                }
                (Some(half), tables) => {
                    let tables = tables.as_ref().expect("codes in place are only read on x86");
                    tile::values(simd, tables, half, h, tile.count, &mut room.tile);
                }
                _ => tile::exact(simd, plan, (b, h), tile, Side::Value, true, &mut room.tile),
            }
            let (a, b) = (&room.scores[at..], &room.tile.tile[..]);
            let (a_stride, rows, depth) = (width, columns, tile.count);
            let p = Product { a, a_stride, b, b_stride: stored, c_stride: stored, rows, depth, width: stored };
            p.run(simd, &mut room.run.acc);
            i += 1;
        }
        #[cfg(target_arch = "x86_64")]
        if self.tables.1.is_none() {
            room.lanes.finish(&mut room.run.acc);
        }
    }
}
