//! What a sequence is made of, and what it costs.

use std::sync::Arc;

use super::pool::Row;

/// One entry of a page table, as callers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry {
    /// Pool row: counted over the cache's own extents in the order in which they were added, then over those of other caches.
    pub row: u32,
    /// Valid tokens, 1..=64, from slot 0.
    pub count: u32,
}

/// One entry of a page table: a share in a row.
#[derive(Debug, Clone)]
pub(super) struct Page {
    pub(super) row: Arc<Row>,
    pub(super) count: u32,
}

/// Tokens kept as they came: `[token][heads][dim]`, token-major, in the exact dtype.
#[derive(Debug, Clone)]
pub struct Exact {
    /// Keys.
    pub k: Vec<u8>,
    /// Values.
    pub v: Vec<u8>,
    /// Valid tokens, from slot 0.
    pub tokens: usize,
}

/// What attention reads of one sequence.
#[derive(Debug, Clone)]
pub struct SequenceView<'a> {
    /// First tokens, exact.
    pub sinks: &'a Exact,
    /// Rows and valid counts, oldest first.
    pub pages: Vec<(&'a [u8], usize)>,
    /// Newest tokens, exact.
    pub tail: &'a Exact,
}

impl SequenceView<'_> {
    /// Tokens in pages.
    pub fn packed(&self) -> usize {
        self.pages.iter().map(|p| p.1).sum()
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.sinks.tokens + self.packed() + self.tail.tokens
    }
}

impl Exact {
    pub(super) fn new(slots: usize, k_bytes: usize, v_bytes: usize) -> Self {
        Self { k: vec![0; slots * k_bytes], v: vec![0; slots * v_bytes], tokens: 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        self.k.capacity() + self.v.capacity()
    }

    /// Drops the oldest `n` tokens.
    pub(super) fn shift(&mut self, n: usize, k_bytes: usize, v_bytes: usize) {
        self.k.copy_within(n * k_bytes..self.tokens * k_bytes, 0);
        self.v.copy_within(n * v_bytes..self.tokens * v_bytes, 0);
        self.tokens -= n;
    }
}

/// One sequence: `sinks | pages | tail`, oldest first.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    pub(super) sinks: Exact,
    pub(super) pages: Vec<Page>,
    pub(super) tail: Exact,
}

impl Sequence {
    pub(super) fn packed(&self) -> usize {
        self.pages.iter().map(|p| p.count as usize).sum()
    }

    pub(super) fn tokens(&self) -> usize {
        self.sinks.tokens + self.packed() + self.tail.tokens
    }

    /// Removes the newest `n` tokens, of at least as many. Valid counts go down; nothing is re-encoded.
    pub(super) fn remove_newest(&mut self, n: usize) {
        let mut left = n;
        let mut cut = |held: usize| {
            let cut = left.min(held);
            left -= cut;
            cut
        };
        self.tail.tokens -= cut(self.tail.tokens);
        while let Some(page) = self.pages.last_mut() {
            page.count -= cut(page.count as usize) as u32;
            if page.count > 0 {
                break;
            }
            self.pages.pop();
        }
        self.sinks.tokens -= cut(self.sinks.tokens);
    }
}

/// Bytes of a cache by what they hold. Rows that forks share count in each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Codes in the pool, free rows included.
    pub codes: usize,
    /// Fields and padding in the pool, and the page tables.
    pub scales: usize,
    /// Exact newest tokens, free slots included.
    pub tail: usize,
    /// Exact first tokens.
    pub sinks: usize,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> usize {
        self.codes + self.scales + self.tail + self.sinks
    }
}
