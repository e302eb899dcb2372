//! How a cache grows: the rows that an append takes, reserved ahead of it, and what the device is told of them.

use std::sync::Arc;

use super::{DeviceCache, Sequence};
use crate::cache::parts::Page;
use crate::cuda::arguments::{ENTRIES, TableArguments};
use crate::cuda::driver::Stream;
use crate::cuda::kernels::Kernel;
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;

impl DeviceCache {
    fn rows_for(&self, b: usize, tokens: usize) -> usize {
        let (scheme, s) = (&self.codec.scheme, &self.sequences[b]);
        let tokens = tokens - tokens.min(scheme.sink_tokens - s.sinks);
        if scheme.writes_single_slots() {
            tokens.saturating_sub(open_slots(s)).div_ceil(PAGE_TOKENS)
        } else {
            (s.tail + tokens).saturating_sub(scheme.residual_length) / PAGE_TOKENS
        }
    }

    /// Rows that must be added before `tokens` can be appended.
    pub fn rows_missing(&self, tokens: usize) -> usize {
        let needed: usize = (0..self.batch()).map(|b| self.rows_for(b, tokens).saturating_sub(self.reserved[b].len())).sum();
        if needed == 0 { 0 } else { needed.saturating_sub(self.free_rows()) }
    }

    /// Pages that a table must hold to append `tokens`; 0 if the room is large enough.
    pub fn capacity_missing(&self, tokens: usize) -> usize {
        let needed = (0..self.batch()).map(|b| self.sequences[b].pages.len() + self.rows_for(b, tokens)).max().unwrap_or(0);
        if self.room.as_ref().is_some_and(|(room, _)| room.capacity >= needed) { 0 } else { needed.max(1) }
    }

    /// Whether `tokens` need rows or a room before they can be appended.
    pub fn must_grow(&self, tokens: usize) -> bool {
        tokens > self.ready && (self.rows_missing(tokens) > 0 || self.capacity_missing(tokens) > 0)
    }

    /// Tokens that sequence `b` can take with the rows that are reserved.
    fn ready_for(&self, b: usize) -> usize {
        let (scheme, s) = (&self.codec.scheme, &self.sequences[b]);
        let rows = self.reserved[b].len();
        let room = if scheme.writes_single_slots() {
            let last = s.pages.last().filter(|_| s.open);
            PAGE_TOKENS * rows + last.map_or(0, |p| PAGE_TOKENS - p.count as usize)
        } else {
            (PAGE_TOKENS * (rows + 1) - 1 + scheme.residual_length).saturating_sub(s.tail)
        };
        room + scheme.sink_tokens - s.sinks
    }

    /// The host has changed what the device has yet to hear of.
    pub(super) fn is_stale(&self) -> bool {
        !self.entries.is_empty() || !self.stale.is_empty()
    }

    /// An empty entry behind the pages and rows of sequence `b`: the device appends nothing that would need it.
    pub(super) fn end_table(&mut self, b: usize) {
        let capacity = self.room.as_ref().map_or(0, |(room, _)| room.capacity);
        let end = self.sequences[b].pages.len() + self.reserved[b].len();
        if end < capacity {
            self.entries.insert(b * capacity + end, 0);
        }
    }

    /// Tells the device what the host has changed.
    pub(super) fn flush(&mut self, stream: Stream) -> Result<()> {
        if !self.is_stale() {
            return Ok(());
        }
        let room = self.room()?;
        // No place twice: the threads of a launch have no order.
        let entries: Vec<(usize, u64)> = std::mem::take(&mut self.entries).into_iter().collect();
        if !self.stale.is_empty() {
            self.ready = 0;
        }
        let stale: Vec<usize> = std::mem::take(&mut self.stale).into_iter().collect();
        for i in 0..entries.len().div_ceil(ENTRIES).max(stale.len().div_ceil(ENTRIES)) {
            let mut a = TableArguments {
                table: room.table,
                counts: room.counts,
                entries: 0,
                sequences: 0,
                value: [0; ENTRIES],
                place: [0; ENTRIES],
                count: [[0; 4]; ENTRIES],
                sequence: [0; ENTRIES],
            };
            for (k, &(place, value)) in entries.iter().skip(i * ENTRIES).take(ENTRIES).enumerate() {
                (a.place[k], a.value[k], a.entries) = (place as i32, value, k as i32 + 1);
            }
            for (k, &b) in stale.iter().skip(i * ENTRIES).take(ENTRIES).enumerate() {
                let s = &self.sequences[b];
                a.count[k] = [s.sinks, s.pages.len(), s.tail, usize::from(s.open)].map(|n| n as i32);
                (a.sequence[k], a.sequences) = (b as i32, k as i32 + 1);
            }
            self.launch(Kernel::PagesSet, (1, 1, 1), 128, stream, (&raw mut a).cast())?;
        }
        Ok(())
    }

    /// Reserves rows in the tables for the next `tokens` tokens of every sequence, so that appending them needs no more of the
    /// host: what has to be done before a CUDA graph appends.
    pub fn reserve(&mut self, tokens: usize, stream: Stream) -> Result<()> {
        self.device.check_uncaptured(stream, "rows are reserved before the capture, with reserve()")?;
        let missing = self.rows_missing(tokens);
        if missing > 0 {
            return Err(Error::Exhausted { needed: missing + self.free_rows(), free: self.free_rows() });
        }
        let room = self.room()?;
        let short = self.capacity_missing(tokens);
        if short > 0 {
            return Err(Error::value("room for a page table", format!("{short} pages or more"), room.capacity));
        }
        for b in 0..self.batch() {
            let (needed, held) = (self.rows_for(b, tokens), self.reserved[b].len());
            while self.reserved[b].len() < needed {
                let row = self.extents.iter().find_map(|e| e.take()).expect("rows were counted before");
                let place = b * room.capacity + self.sequences[b].pages.len() + self.reserved[b].len();
                self.entries.insert(place, row.data() as u64);
                self.reserved[b].push_back(row);
            }
            if held < needed {
                self.end_table(b);
            }
            // A page that another table names is not written to.
            let own = self.sequences[b].pages.last().is_some_and(|p| Arc::strong_count(&p.row) == 1);
            if self.codec.scheme.writes_single_slots() && self.sequences[b].open != own {
                self.sequences[b].open = own;
                self.stale.insert(b);
            }
        }
        self.flush(stream)?;
        self.ready = (0..self.batch()).map(|b| self.ready_for(b)).min().unwrap_or(0);
        Ok(())
    }

    /// Counts `tokens` as appended to every sequence: what a CUDA graph that holds an append has done. They were reserved.
    pub fn advance(&mut self, tokens: usize) -> Result<()> {
        if tokens > self.ready {
            let expected = format!("at most {} (the tokens that were reserved)", self.ready);
            return Err(Error::value("tokens to advance by", expected, tokens));
        }
        self.count(tokens);
        Ok(())
    }

    pub(super) fn count(&mut self, tokens: usize) {
        self.ready -= tokens;
        let scheme = &self.codec.scheme;
        let (single, sink_tokens, window) = (scheme.writes_single_slots(), scheme.sink_tokens, scheme.residual_length);
        for (b, s) in self.sequences.iter_mut().enumerate() {
            // Nearly every sequence of nearly every step, so that a batch of hundreds takes little of a call.
            if !single && s.sinks == sink_tokens && s.tail + tokens < window + PAGE_TOKENS {
                s.tail += tokens;
                continue;
            }
            let reserved = &mut self.reserved[b];
            let sinks = tokens.min(sink_tokens - s.sinks);
            s.sinks += sinks;
            let mut left = tokens - sinks;
            if !single {
                s.tail += left;
                while s.tail >= window + PAGE_TOKENS
                    && let Some(row) = reserved.pop_front()
                {
                    s.push(Page { row, count: PAGE_TOKENS as u32 });
                    s.tail -= PAGE_TOKENS;
                }
                continue;
            }
            if s.open
                && let Some(page) = s.pages.last_mut()
            {
                let count = left.min(PAGE_TOKENS - page.count as usize);
                page.count += count as u32;
                s.packed += count;
                left -= count;
            }
            while left > 0
                && let Some(row) = reserved.pop_front()
            {
                let count = left.min(PAGE_TOKENS);
                s.push(Page { row, count: count as u32 });
                s.open = true;
                left -= count;
            }
        }
    }
}

/// Slots that the last page offers to a single-slot scheme: none if another table names its row.
fn open_slots(s: &Sequence) -> usize {
    match s.pages.last() {
        Some(page) if Arc::strong_count(&page.row) == 1 => PAGE_TOKENS - page.count as usize,
        _ => 0,
    }
}
