//! One layer's cache: page tables over a caller-owned pool, an exact tail until a page is full, exact sinks.
//!
//! A sequence is `sinks | pages | tail`, oldest first. Positions are sums of counts: there is no other index. A page is sealed
//! once and never copied or re-encoded; removing tokens lowers valid counts, and sequences may share rows with counts of
//! their own. Every call checks everything before it writes anything, so that a failed call leaves the cache as it was.

mod job;
mod parts;
mod pool;

use std::sync::Arc;

use rayon::prelude::*;

use self::job::SealJob;
pub use self::parts::{Exact, Memory, PageEntry, SequenceView};
use self::pool::{Pool, RowPtr};
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::seal::PageCodec;
use crate::tensor::{Dtype, View};

#[derive(Debug, Clone)]
struct Sequence {
    sinks: Exact,
    pages: Vec<PageEntry>,
    tail: Exact,
}

/// The cache of one layer: `batch` sequences that grow together.
#[derive(Debug)]
pub struct LayerCache {
    codec: Arc<PageCodec>,
    exact: Dtype,
    pool: Pool,
    sequences: Vec<Sequence>,
}

impl LayerCache {
    /// An empty cache for `batch` sequences. `exact` is the element type of exact tokens.
    pub fn new(codec: Arc<PageCodec>, exact: Dtype, batch: usize) -> Self {
        let exact = codec.scheme.exact_dtype.unwrap_or(exact);
        let mut cache = Self { codec, exact, pool: Pool::default(), sequences: Vec::new() };
        cache.sequences = (0..batch).map(|_| cache.empty()).collect();
        cache
    }

    /// Scheme and layout.
    pub fn codec(&self) -> &PageCodec {
        &self.codec
    }

    /// Element type of exact tokens.
    pub fn exact_dtype(&self) -> Dtype {
        self.exact
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.sequences.len()
    }

    /// Tokens of sequence `b`.
    pub fn tokens(&self, b: usize) -> usize {
        let s = &self.sequences[b];
        s.sinks.tokens + s.tail.tokens + s.pages.iter().map(|p| p.count as usize).sum::<usize>()
    }

    /// Tokens of sequence `b` that stand in pages.
    pub fn packed(&self, b: usize) -> usize {
        self.sequences[b].pages.iter().map(|p| p.count as usize).sum()
    }

    /// Page table of sequence `b`.
    pub fn table(&self, b: usize) -> &[PageEntry] {
        &self.sequences[b].pages
    }

    /// Rows that no sequence uses.
    pub fn free_rows(&self) -> usize {
        self.pool.free.len()
    }

    /// All rows.
    pub fn rows(&self) -> usize {
        self.pool.rows.len()
    }

    /// What attention reads of sequence `b`.
    pub fn view(&self, b: usize) -> SequenceView<'_> {
        let s = &self.sequences[b];
        let bytes = self.codec.row_bytes();
        let row = |e: &PageEntry| {
            // SAFETY: `add_rows` promised `row_bytes` readable bytes here for the cache's lifetime; nothing writes while
            // `self` is borrowed.
            let row = unsafe { std::slice::from_raw_parts(self.pool.rows[e.row as usize].0, bytes) };
            (row, e.count as usize)
        };
        SequenceView { sinks: &s.sinks, pages: s.pages.iter().map(row).collect(), tail: &s.tail }
    }

    /// Bytes allocated.
    pub fn memory(&self) -> Memory {
        let codes = self.codec.heads * (self.codec.key.layout.code_bytes + self.codec.value.layout.code_bytes);
        let tables: usize = self.sequences.iter().map(|s| s.pages.capacity() * size_of::<PageEntry>()).sum();
        Memory {
            codes: self.rows() * codes,
            scales: self.rows() * (self.codec.row_bytes() - codes) + tables,
            tail: self.sequences.iter().map(|s| s.tail.bytes()).sum(),
            sinks: self.sequences.iter().map(|s| s.sinks.bytes()).sum(),
        }
    }

    /// Gives the cache `count` more rows of memory.
    ///
    /// # Safety
    /// `data` must point to `count * row_bytes` bytes that stay alive while the cache does, and that nobody else reads or
    /// writes during its calls.
    pub unsafe fn add_rows(&mut self, data: *mut u8, count: usize) {
        let bytes = self.codec.row_bytes();
        for i in (0..count).rev() {
            self.pool.free.push((self.pool.rows.len() + i) as u32);
        }
        for i in 0..count {
            // SAFETY: inside the memory that the caller promised.
            self.pool.rows.push(RowPtr(unsafe { data.add(i * bytes) }));
            self.pool.owners.push(0);
        }
    }

    /// Free rows that appending `tokens` to every sequence takes.
    pub fn rows_needed(&self, tokens: usize) -> usize {
        self.sequences.iter().map(|s| self.rows_for(s, tokens)).sum()
    }

    fn rows_for(&self, s: &Sequence, tokens: usize) -> usize {
        let scheme = &self.codec.scheme;
        let tokens = tokens - tokens.min(scheme.sink_tokens - s.sinks.tokens);
        if scheme.writes_single_slots() {
            tokens.saturating_sub(self.open_slots(s)).div_ceil(PAGE_TOKENS)
        } else {
            (s.tail.tokens + tokens).saturating_sub(scheme.residual_length) / PAGE_TOKENS
        }
    }

    /// Slots that the last page of a single-slot scheme still offers: none if the row is shared.
    fn open_slots(&self, s: &Sequence) -> usize {
        match s.pages.last() {
            Some(e) if self.pool.owners[e.row as usize] == 1 => PAGE_TOKENS - e.count as usize,
            _ => 0,
        }
    }

    fn empty(&self) -> Sequence {
        let scheme = &self.codec.scheme;
        let (k, v) = self.token_bytes();
        let tail = if scheme.writes_single_slots() { 0 } else { scheme.residual_length + PAGE_TOKENS };
        Sequence { sinks: Exact::new(scheme.sink_tokens, k, v), pages: Vec::new(), tail: Exact::new(tail, k, v) }
    }

    /// Bytes of one exact token of all heads: keys, values.
    fn token_bytes(&self) -> (usize, usize) {
        let (c, z) = (&self.codec, self.exact.bytes());
        (c.heads * c.key.layout.dim * z, c.heads * c.value.layout.dim * z)
    }

    /// Refuses what [`LayerCache::append`] would refuse of its arguments, so that a caller can find out before it makes rows.
    pub fn check_append(&self, k: &View, v: &View) -> Result<()> {
        let (heads, kd, vd) = (self.codec.heads, self.codec.key.layout.dim, self.codec.value.layout.dim);
        let tokens = k.shape()[2];
        for (what, view, dim) in [("k", k, kd), ("v", v, vd)] {
            let expected = [self.batch(), heads, tokens, dim];
            if view.shape() != expected {
                return Err(Error::shape(what, format!("{expected:?}"), format!("{:?}", view.shape())));
            }
        }
        k.check_finite("k", self.exact)?;
        v.check_finite("v", self.exact)
    }

    /// Appends the same number of tokens to every sequence: `k` is `[batch, kv_heads, tokens, key_dim]`, `v` likewise.
    /// One by one or in bulk, the bytes are the same. Needs [`LayerCache::rows_needed`] free rows.
    pub fn append(&mut self, k: &View, v: &View) -> Result<()> {
        self.check_append(k, v)?;
        let (needed, free) = (self.rows_needed(k.shape()[2]), self.pool.free.len());
        if needed > free {
            return Err(Error::Exhausted { needed, free });
        }
        let mut jobs = Vec::new();
        for b in 0..self.batch() {
            self.append_one(b, k, v, &mut jobs);
        }
        let (codec, rows, exact) = (&self.codec, &self.pool.rows, self.exact);
        let run = |job: &SealJob| {
            // SAFETY: every job writes slots of its own row that no table entry of another sequence covers, and a row has
            // at most one job per call.
            let row = unsafe { std::slice::from_raw_parts_mut(rows[job.row as usize].0, codec.row_bytes()) };
            job.run(codec, row, exact, k, v);
        };
        if jobs.len() > 1 {
            jobs.par_iter().for_each(run)
        } else {
            jobs.iter().for_each(run)
        }
        Ok(())
    }

    /// Moves tables and exact tokens of one sequence; pages to be written become jobs.
    fn append_one(&mut self, b: usize, k: &View, v: &View, jobs: &mut Vec<SealJob>) {
        let scheme = &self.codec.scheme;
        let (k_bytes, v_bytes) = self.token_bytes();
        let (exact, single, window) = (self.exact, scheme.writes_single_slots(), scheme.residual_length);
        let tokens = k.shape()[2];
        let open = self.open_slots(&self.sequences[b]);
        let (s, pool) = (&mut self.sequences[b], &mut self.pool);
        let store = |part: &mut Exact, t: usize| {
            for (view, bytes, all) in [(k, &mut part.k, k_bytes), (v, &mut part.v, v_bytes)] {
                let token = &mut bytes[part.tokens * all..][..all];
                for (h, row) in token.chunks_exact_mut(all / view.shape()[1]).enumerate() {
                    view.copy_row(b, h, t, exact, row);
                }
            }
            part.tokens += 1;
        };
        let mut next = 0;
        while next < tokens && s.sinks.tokens < scheme.sink_tokens {
            store(&mut s.sinks, next);
            next += 1;
        }
        if single {
            if open > 0 && next < tokens {
                let entry = s.pages.last_mut().expect("an open page");
                let count = open.min(tokens - next);
                let job = SealJob { row: entry.row, slot: entry.count as usize, old: None, b, start: next, count };
                jobs.push(job);
                entry.count += count as u32;
                next += count;
            }
            while next < tokens {
                let count = PAGE_TOKENS.min(tokens - next);
                let row = pool.take();
                jobs.push(SealJob { row, slot: 0, old: None, b, start: next, count });
                s.pages.push(PageEntry { row, count: count as u32 });
                next += count;
            }
            return;
        }
        // Seal the oldest 64 of (tail, new tokens) while a whole page lies beyond the window.
        while s.tail.tokens + (tokens - next) >= window + PAGE_TOKENS {
            let old = s.tail.tokens.min(PAGE_TOKENS);
            let count = PAGE_TOKENS - old;
            let taken = (old > 0).then(|| (s.tail.k[..old * k_bytes].to_vec(), s.tail.v[..old * v_bytes].to_vec()));
            s.tail.shift(old, k_bytes, v_bytes);
            let row = pool.take();
            jobs.push(SealJob { row, slot: 0, old: taken, b, start: next, count });
            s.pages.push(PageEntry { row, count: PAGE_TOKENS as u32 });
            next += count;
        }
        while next < tokens {
            store(&mut s.tail, next);
            next += 1;
        }
    }

    /// Removes the newest `n` tokens of every sequence. Valid counts go down; nothing is re-encoded.
    pub fn remove_newest(&mut self, n: usize) -> Result<()> {
        if let Some(short) = (0..self.batch()).map(|b| self.tokens(b)).find(|&t| t < n) {
            return Err(Error::value("tokens to remove", format!("at most {short} (the tokens held)"), n));
        }
        for s in &mut self.sequences {
            let mut left = n;
            let mut cut = |held: usize| {
                let cut = left.min(held);
                left -= cut;
                cut
            };
            s.tail.tokens -= cut(s.tail.tokens);
            while let Some(entry) = s.pages.last_mut() {
                entry.count -= cut(entry.count as usize) as u32;
                if entry.count > 0 {
                    break;
                }
                self.pool.release(entry.row);
                s.pages.pop();
            }
            s.sinks.tokens -= cut(s.sinks.tokens);
        }
        Ok(())
    }

    /// Makes sequence `i` what sequence `indices[i]` was: reorder, repeat, select. Pages are shared, exact tokens copied.
    pub fn select(&mut self, indices: &[usize]) -> Result<()> {
        if let Some(bad) = indices.iter().find(|&&i| i >= self.batch()) {
            return Err(Error::value("sequence index", format!("0 to {}", self.batch().saturating_sub(1)), bad));
        }
        let chosen: Vec<Sequence> = indices.iter().map(|&i| self.sequences[i].clone()).collect();
        for entry in chosen.iter().flat_map(|s| &s.pages) {
            self.pool.owners[entry.row as usize] += 1;
        }
        self.reset();
        self.sequences = chosen;
        Ok(())
    }

    /// Drops every token; rows stay with the pool.
    pub fn reset(&mut self) {
        let rows: Vec<u32> = self.sequences.iter().flat_map(|s| s.pages.iter().map(|e| e.row)).collect();
        rows.into_iter().for_each(|row| self.pool.release(row));
        for s in &mut self.sequences {
            s.pages.clear();
            s.sinks.tokens = 0;
            s.tail.tokens = 0;
        }
    }

    /// Writes tokens `from..from + k_out.len() / (heads * dim)` of sequence `b` as fp32, `[heads][tokens][dim]`: for callers
    /// that cannot read pages, and for tests.
    pub fn read(&self, b: usize, from: usize, tokens: usize, k_out: &mut [f32], v_out: &mut [f32]) -> Result<()> {
        if from + tokens > self.tokens(b) {
            let got = format!("{from}..{}", from + tokens);
            return Err(Error::value("token range", format!("inside 0..{}", self.tokens(b)), got));
        }
        let view = self.view(b);
        let heads = self.codec.heads;
        let packed_end = view.sinks.tokens + view.packed();
        let starts: Vec<usize> = view
            .pages
            .iter()
            .scan(view.sinks.tokens, |at, p| {
                *at += p.1;
                Some(*at - p.1)
            })
            .collect();
        for (side, out) in [(&self.codec.key, k_out), (&self.codec.value, v_out)] {
            let dim = side.layout.dim;
            let key = std::ptr::eq(side, &self.codec.key);
            assert_eq!(out.len(), heads * tokens * dim);
            out.par_chunks_mut(tokens.max(1) * dim).enumerate().for_each(|(h, out)| {
                for (i, row) in out.chunks_exact_mut(dim).enumerate() {
                    let t = from + i;
                    if (view.sinks.tokens..packed_end).contains(&t) {
                        let page = starts.partition_point(|&s| s <= t) - 1;
                        let halves = self.codec.halves(view.pages[page].0, h);
                        side.read(if key { halves.0 } else { halves.1 }, h, t - starts[page], row);
                    } else {
                        let (part, slot) = if t < packed_end { (view.sinks, t) } else { (view.tail, t - packed_end) };
                        let bytes = if key { &part.k } else { &part.v };
                        let z = self.exact.bytes();
                        self.exact.read_f32(&bytes[(slot * heads + h) * dim * z..][..dim * z], row);
                    }
                }
            });
        }
        Ok(())
    }
}
