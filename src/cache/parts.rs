//! What a sequence is made of, and what it costs.

use std::alloc::{Layout, alloc_zeroed};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::pool::{Extent, Row};
use crate::error::{Error, Result};

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
pub(crate) struct Page {
    pub(crate) row: Arc<Row>,
    pub(crate) count: u32,
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
    /// No tokens, and no memory before the first one.
    pub(crate) fn new() -> Self {
        Self { k: Vec::new(), v: Vec::new(), tokens: 0 }
    }

    /// Makes room for `slots` tokens, unless it is there.
    pub(crate) fn open(&mut self, slots: usize, k_bytes: usize, v_bytes: usize) -> Result<()> {
        for (part, bytes) in [(&mut self.k, slots * k_bytes), (&mut self.v, slots * v_bytes)] {
            if part.len() < bytes {
                *part = zeroed(bytes)?;
            }
        }
        Ok(())
    }

    pub(crate) fn bytes(&self) -> usize {
        self.k.capacity() + self.v.capacity()
    }

    /// Drops the oldest `n` tokens.
    pub(crate) fn shift(&mut self, n: usize, k_bytes: usize, v_bytes: usize) {
        self.k.copy_within(n * k_bytes..self.tokens * k_bytes, 0);
        self.v.copy_within(n * v_bytes..self.tokens * v_bytes, 0);
        self.tokens -= n;
    }
}

/// Zeros that the system hands out when they are touched; an error instead of the end of the process if there are too many.
fn zeroed(bytes: usize) -> Result<Vec<u8>> {
    let none = || Error::value("memory for exact tokens", "a size that can be allocated", format!("{bytes} bytes"));
    let layout = Layout::array::<u8>(bytes).map_err(|_| none())?;
    if bytes == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout is not empty; a Vec of as many initialised bytes takes the allocation over.
    unsafe {
        let data = alloc_zeroed(layout);
        if data.is_null() { Err(none()) } else { Ok(Vec::from_raw_parts(data, bytes, bytes)) }
    }
}

/// One sequence: `sinks | pages | tail`, oldest first.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) sinks: Exact,
    pub(crate) pages: Vec<Page>,
    pub(crate) tail: Exact,
}

impl Sequence {
    pub(crate) fn new() -> Self {
        Self { sinks: Exact::new(), pages: Vec::new(), tail: Exact::new() }
    }

    pub(crate) fn packed(&self) -> usize {
        self.pages.iter().map(|p| p.count as usize).sum()
    }

    pub(crate) fn tokens(&self) -> usize {
        self.sinks.tokens + self.packed() + self.tail.tokens
    }

    /// Removes the newest `n` tokens, of at least as many. Valid counts go down; nothing is re-encoded.
    pub(crate) fn remove_newest(&mut self, n: usize) {
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

/// Refuses lengths that sequences cannot be cut to; `held` are the tokens of each.
pub(crate) fn check_lengths(lengths: &[usize], held: &[usize]) -> Result<()> {
    if lengths.len() != held.len() {
        let expected = format!("[{}] (one per sequence)", held.len());
        return Err(Error::shape("lengths", expected, format!("[{}]", lengths.len())));
    }
    match lengths.iter().zip(held).position(|(length, held)| length > held) {
        Some(b) => Err(Error::value(format!("lengths[{b}]"), format!("at most {} (the tokens held)", held[b]), lengths[b])),
        None => Ok(()),
    }
}

/// Own extents, then those of other caches in the order in which tables name them.
pub(crate) fn all_extents<'a>(own: &'a [Arc<Extent>], pages: impl Iterator<Item = &'a Page>) -> Vec<&'a Arc<Extent>> {
    let mut all: Vec<&Arc<Extent>> = own.iter().collect();
    let mut known: HashSet<_> = all.iter().map(|e| Arc::as_ptr(e)).collect();
    for page in pages {
        if known.insert(Arc::as_ptr(&page.row.extent)) {
            all.push(&page.row.extent);
        }
    }
    all
}

/// Rows that a cache pays for: its own, and those of other caches that its tables name.
pub(crate) fn held_rows<'a>(own: &[Arc<Extent>], pages: impl Iterator<Item = &'a Page>) -> usize {
    let known: HashSet<_> = own.iter().map(Arc::as_ptr).collect();
    let shared = pages.filter(|p| !known.contains(&Arc::as_ptr(&p.row.extent)));
    let shared: HashSet<_> = shared.map(|p| Arc::as_ptr(&p.row)).collect();
    own.iter().map(|e| e.rows).sum::<usize>() + shared.len()
}

/// A table as callers see it: rows count over `extents`.
pub(crate) fn entries(extents: &[&Arc<Extent>], pages: &[Page]) -> Vec<PageEntry> {
    let mut first_rows = HashMap::new();
    let mut next = 0;
    for extent in extents {
        first_rows.insert(Arc::as_ptr(extent), next);
        next += extent.rows as u32;
    }
    let row = |row: &Row| first_rows[&Arc::as_ptr(&row.extent)] + row.index;
    pages.iter().map(|p| PageEntry { row: row(&p.row), count: p.count }).collect()
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
