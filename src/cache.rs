//! One layer's cache: page tables over a caller-owned pool, an exact tail until a page is full, exact sinks.
//!
//! A sequence is `sinks | pages | tail`, oldest first. Positions are sums of counts: there is no other index. A page is sealed
//! once and never copied or re-encoded; removing tokens lowers valid counts, and sequences, of one cache or of several, may
//! share rows with counts of their own. Every call checks everything before it writes anything, so that a failed call leaves
//! the cache as it was.

mod append;
pub(crate) mod parts;
pub(crate) mod pool;
mod read;
mod restore;

use std::sync::Arc;

pub use self::parts::{Exact, Memory, PageEntry, SequenceView};
use self::parts::{Page, Sequence};
pub use self::pool::Keep;
use self::pool::{Extent, Row};
pub use self::restore::Stored;
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// The cache of one layer: `batch` sequences that grow together.
#[derive(Debug)]
pub struct LayerCache {
    codec: Arc<PageCodec>,
    exact: Dtype,
    /// Memory that this cache was given: only this cache takes rows from it.
    extents: Vec<Arc<Extent>>,
    sequences: Vec<Sequence>,
}

impl LayerCache {
    /// An empty cache for `batch` sequences. `exact` is the element type of exact tokens.
    pub fn new(codec: Arc<PageCodec>, exact: Dtype, batch: usize) -> Self {
        let exact = codec.scheme.exact_dtype.unwrap_or(exact);
        Self { codec, exact, extents: Vec::new(), sequences: vec![Sequence::new(); batch] }
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
        self.sequences[b].tokens()
    }

    /// Tokens of sequence `b` that stand in pages.
    pub fn packed(&self, b: usize) -> usize {
        self.sequences[b].packed()
    }

    /// Page table of sequence `b`.
    pub fn table(&self, b: usize) -> Vec<PageEntry> {
        parts::entries(&self.all_extents(), &self.sequences[b].pages)
    }

    fn all_extents(&self) -> Vec<&Arc<Extent>> {
        parts::all_extents(&self.extents, self.sequences.iter().flat_map(|s| &s.pages))
    }

    /// What [`LayerCache::add_rows`] was given to keep, for every extent that the rows of [`LayerCache::table`] count over.
    pub fn kept(&self) -> Vec<&Keep> {
        self.all_extents().into_iter().map(|e| &e.keep).collect()
    }

    /// Rows of this cache's own memory that nobody uses.
    pub fn free_rows(&self) -> usize {
        self.extents.iter().map(|e| e.free_rows()).sum()
    }

    /// All rows of this cache's own memory.
    pub fn rows(&self) -> usize {
        self.extents.iter().map(|e| e.rows).sum()
    }

    /// Bytes allocated: own rows, and rows of other caches that the tables name.
    pub fn memory(&self) -> Memory {
        let codes = self.codec.heads * (self.codec.key.layout.code_bytes + self.codec.value.layout.code_bytes);
        let pages = || self.sequences.iter().flat_map(|s| &s.pages);
        let rows = parts::held_rows(&self.extents, pages());
        let tables: usize = self.sequences.iter().map(|s| s.pages.capacity() * size_of::<Page>()).sum();
        let handles = pages().count() * (size_of::<Row>() + 2 * size_of::<usize>()); // with the counts of an Arc
        Memory {
            codes: rows * codes,
            scales: rows * (self.codec.row_bytes() - codes) + tables + handles,
            tail: self.sequences.iter().map(|s| s.tail.bytes()).sum(),
            sinks: self.sequences.iter().map(|s| s.sinks.bytes()).sum(),
        }
    }

    /// Gives the cache `count` more rows of memory, and `keep` to hold as long as any of them may be read.
    ///
    /// # Safety
    /// `data` must point to `count * row_bytes` bytes that stay alive until `keep` is dropped, which is after this cache and
    /// every cache that shares its pages; nobody else may read or write them while a call of such a cache runs.
    pub unsafe fn add_rows(&mut self, data: *mut u8, count: usize, keep: Keep) {
        // SAFETY: the caller's promise.
        self.extents.push(Arc::new(unsafe { Extent::new(data, self.codec.row_bytes(), count, keep) }));
    }

    /// Slots of the sinks and of the tail.
    fn slots(&self) -> [usize; 2] {
        let scheme = &self.codec.scheme;
        let tail = if scheme.writes_single_slots() { 0 } else { scheme.residual_length + PAGE_TOKENS };
        [scheme.sink_tokens, tail]
    }

    /// Bytes of one exact token of all heads: keys, values.
    fn token_bytes(&self) -> (usize, usize) {
        let (c, z) = (&self.codec, self.exact.bytes());
        (c.heads * c.key.layout.dim * z, c.heads * c.value.layout.dim * z)
    }

    /// Removes the newest `n` tokens of every sequence. Valid counts go down; nothing is re-encoded.
    pub fn remove_newest(&mut self, n: usize) -> Result<()> {
        if let Some(short) = (0..self.batch()).map(|b| self.tokens(b)).find(|&t| t < n) {
            return Err(Error::value("tokens to remove", format!("at most {short} (the tokens held)"), n));
        }
        self.sequences.iter_mut().for_each(|s| s.remove_newest(n));
        Ok(())
    }

    /// Cuts sequence `b` to its first `lengths[b]` tokens, each to its own length: what speculative decoding of a batch needs.
    pub fn crop(&mut self, lengths: &[usize]) -> Result<()> {
        let held: Vec<usize> = (0..self.batch()).map(|b| self.tokens(b)).collect();
        parts::check_lengths(lengths, &held)?;
        self.sequences.iter_mut().zip(lengths).for_each(|(s, &length)| s.remove_newest(s.tokens() - length));
        Ok(())
    }

    /// Makes sequence `i` what sequence `indices[i]` was: reorder, repeat, select. Pages are shared, exact tokens copied.
    pub fn select(&mut self, indices: &[usize]) -> Result<()> {
        if let Some(bad) = indices.iter().find(|&&i| i >= self.batch()) {
            return Err(Error::value("sequence index", format!("0 to {}", self.batch().saturating_sub(1)), bad));
        }
        self.sequences = indices.iter().map(|&i| self.sequences[i].clone()).collect();
        Ok(())
    }

    /// A cache of its own with the same tokens. Pages are shared and stay as they are whatever either cache does: no page is
    /// written while it has two holders. Exact tokens are copied. New rows come from memory that the fork is given.
    pub fn fork(&self) -> Self {
        let (codec, sequences) = (Arc::clone(&self.codec), self.sequences.clone());
        Self { codec, exact: self.exact, extents: Vec::new(), sequences }
    }

    /// One cache with the sequences of all, in order: a fork of each, joined.
    pub fn join(parts: &[&Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(Error::value("caches to join", "at least one", 0));
        };
        let mut all = first.fork();
        for (i, part) in parts.iter().enumerate().skip(1) {
            let (a, b) = (first.shape_words(), part.shape_words());
            if a != b || first.codec.scheme != part.codec.scheme {
                let same = if a == b { "; the schemes differ" } else { "" };
                return Err(Error::value(format!("cache {i} to join"), format!("one like cache 0 ({a})"), format!("{b}{same}")));
            }
            all.sequences.extend(part.sequences.iter().cloned());
        }
        Ok(all)
    }

    /// What must be equal for sequences to stand in one cache, besides the scheme.
    fn shape_words(&self) -> String {
        let c = &self.codec;
        let (heads, k, v) = (c.heads, c.key.layout.dim, c.value.layout.dim);
        format!("{heads} KV heads of {k} and {v}, exact tokens in {}", self.exact.name())
    }

    /// Drops every token; rows that nobody else uses are free again.
    pub fn reset(&mut self) {
        for s in &mut self.sequences {
            s.pages.clear();
            s.sinks.tokens = 0;
            s.tail.tokens = 0;
        }
    }
}
