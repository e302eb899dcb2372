//! Appending: tail writes, seals, and which rows they take.

use std::sync::Arc;

use super::LayerCache;
use super::parts::{Exact, Page, Sequence};
use super::pool::Row;
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::parallel;
use crate::seal::PageCodec;
use crate::tensor::{Dtype, View};

impl LayerCache {
    /// Free rows that appending `tokens` to every sequence takes.
    pub fn rows_needed(&self, tokens: usize) -> usize {
        self.sequences.iter().map(|s| self.rows_for(s, tokens)).sum()
    }

    /// Rows that must be added before `tokens` can be appended to every sequence.
    pub fn rows_missing(&self, tokens: usize) -> usize {
        match self.rows_needed(tokens) {
            0 => 0,
            needed => needed.saturating_sub(self.free_rows()),
        }
    }

    fn rows_for(&self, s: &Sequence, tokens: usize) -> usize {
        let scheme = &self.codec.scheme;
        let tokens = tokens - tokens.min(scheme.sink_tokens - s.sinks.tokens);
        if scheme.writes_single_slots() {
            tokens.saturating_sub(open_slots(s)).div_ceil(PAGE_TOKENS)
        } else {
            (s.tail.tokens + tokens).saturating_sub(scheme.residual_length) / PAGE_TOKENS
        }
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
        let needed = self.rows_needed(k.shape()[2]);
        if needed > 0 && needed > self.free_rows() {
            return Err(Error::Exhausted { needed, free: self.free_rows() });
        }
        if k.shape()[2] > 0 {
            let ([sinks, tail], (k_bytes, v_bytes)) = (self.slots(), self.token_bytes());
            for s in &mut self.sequences {
                s.sinks.open(sinks, k_bytes, v_bytes)?;
                s.tail.open(tail, k_bytes, v_bytes)?;
            }
        }
        // Nobody else takes rows from these extents.
        let mut rows = self.extents.iter().flat_map(|e| std::iter::from_fn(|| e.take())).take(needed).collect::<Vec<_>>();
        rows.reverse();
        let mut jobs = Vec::new();
        for b in 0..self.batch() {
            self.append_one(b, k, v, &mut rows, &mut jobs);
        }
        let (codec, exact) = (&self.codec, self.exact);
        let run = |job: &SealJob| {
            // SAFETY: a job's row has one holder, whose cache is borrowed mutably, and at most one job per call.
            let row = unsafe { std::slice::from_raw_parts_mut(job.row.0, codec.row_bytes()) };
            job.run(codec, row, exact, k, v);
        };
        parallel::map(&jobs, run);
        Ok(())
    }

    /// Moves tables and exact tokens of one sequence; pages to be written become jobs.
    fn append_one(&mut self, b: usize, k: &View, v: &View, rows: &mut Vec<Arc<Row>>, jobs: &mut Vec<SealJob>) {
        let scheme = &self.codec.scheme;
        let (k_bytes, v_bytes) = self.token_bytes();
        let (exact, single, window) = (self.exact, scheme.writes_single_slots(), scheme.residual_length);
        let tokens = k.shape()[2];
        let s = &mut self.sequences[b];
        let open = open_slots(s);
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
        if single && open > 0 && next < tokens {
            let page = s.pages.last_mut().expect("an open page");
            let (slot, count) = (page.count as usize, open.min(tokens - next));
            jobs.push(SealJob { row: RowPtr(page.row.data()), slot, old: None, b, start: next, count });
            page.count += count as u32;
            next += count;
        }
        let mut new_page = |s: &mut Sequence, old: Option<(Vec<u8>, Vec<u8>)>, start: usize, count: usize, valid: usize| {
            let row = rows.pop().expect("rows were counted before");
            jobs.push(SealJob { row: RowPtr(row.data()), slot: 0, old, b, start, count });
            s.pages.push(Page { row, count: valid as u32 });
        };
        while single && next < tokens {
            let count = PAGE_TOKENS.min(tokens - next);
            new_page(s, None, next, count, count);
            next += count;
        }
        // Seal the oldest 64 of (tail, new tokens) while a whole page lies beyond the window.
        while !single && s.tail.tokens + (tokens - next) >= window + PAGE_TOKENS {
            let old = s.tail.tokens.min(PAGE_TOKENS);
            let count = PAGE_TOKENS - old;
            let taken = (old > 0).then(|| (s.tail.k[..old * k_bytes].to_vec(), s.tail.v[..old * v_bytes].to_vec()));
            s.tail.shift(old, k_bytes, v_bytes);
            new_page(s, taken, next, count, PAGE_TOKENS);
            next += count;
        }
        while next < tokens {
            store(&mut s.tail, next);
            next += 1;
        }
    }
}

/// Slots that the last page of a single-slot scheme still offers: none if another table names its row.
fn open_slots(s: &Sequence) -> usize {
    match s.pages.last() {
        Some(page) if Arc::strong_count(&page.row) == 1 => {
            // A holder in another thread has read the row for the last time.
            std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
            PAGE_TOKENS - page.count as usize
        }
        _ => 0,
    }
}

/// First byte of a row that a job writes.
struct RowPtr(*mut u8);
// SAFETY: the row has one holder, which is borrowed mutably while jobs run.
unsafe impl Send for RowPtr {}
// SAFETY: as above; each row has one job.
unsafe impl Sync for RowPtr {}

/// One piece of one row to write: `old` tokens from the tail, then `count` input tokens from `start`, from `slot` on.
struct SealJob {
    row: RowPtr,
    slot: usize,
    old: Option<(Vec<u8>, Vec<u8>)>,
    b: usize,
    start: usize,
    count: usize,
}

impl SealJob {
    /// Gathers the tokens as fp32 and writes them.
    fn run(&self, codec: &PageCodec, row: &mut [u8], exact: Dtype, k: &View, v: &View) {
        let gather = |view: &View, old: Option<&Vec<u8>>, dim: usize| {
            let width = codec.heads * dim;
            let old_tokens = old.map_or(0, |o| o.len() / (width * exact.bytes()));
            let mut x = vec![0f32; (old_tokens + self.count) * width];
            let (head, rest) = x.split_at_mut(old_tokens * width);
            if let Some(old) = old {
                exact.read_f32(old, head);
            }
            let mut scratch = Vec::new();
            for (t, token) in rest.chunks_exact_mut(width).enumerate() {
                for (h, out) in token.chunks_exact_mut(dim).enumerate() {
                    view.row_f32(self.b, h, self.start + t, exact, &mut scratch, out);
                }
            }
            x
        };
        let k = gather(k, self.old.as_ref().map(|o| &o.0), codec.key.layout.dim);
        let v = gather(v, self.old.as_ref().map(|o| &o.1), codec.value.layout.dim);
        codec.write(row, self.slot, k.len() / (codec.heads * codec.key.layout.dim), &k, &v);
    }
}
