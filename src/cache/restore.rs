//! A sequence as plain data, for files: out of a cache and, with every claim checked, into one.

use std::collections::HashMap;
use std::sync::Arc;

use super::LayerCache;
use super::parts::{Exact, Page, PageEntry, Sequence};
use super::pool::{Keep, Row};
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// One sequence as a file holds it: exact tokens are `[token][heads][dim]` bytes, without free slots.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// Keys and values of the sinks.
    pub sinks: [Vec<u8>; 2],
    /// Rows, counted over what the file holds, and valid counts.
    pub pages: Vec<PageEntry>,
    /// Keys and values of the tail.
    pub tail: [Vec<u8>; 2],
}

impl LayerCache {
    /// The rows that the tables name, each once, in the order in which they are named first; and every sequence, its entries
    /// counting over those rows.
    pub fn stored(&self) -> (Vec<&[u8]>, Vec<Stored>) {
        let (mut rows, mut numbers) = (Vec::new(), HashMap::new());
        let (k_bytes, v_bytes) = self.token_bytes();
        let sequences = self.sequences.iter().map(|s| {
            let pages = s.pages.iter().map(|p| {
                let row = *numbers.entry(Arc::as_ptr(&p.row)).or_insert_with(|| {
                    rows.push(p.row.bytes());
                    rows.len() as u32 - 1
                });
                PageEntry { row, count: p.count }
            });
            let exact = |e: &Exact| [e.k[..e.tokens * k_bytes].to_vec(), e.v[..e.tokens * v_bytes].to_vec()];
            Stored { sinks: exact(&s.sinks), pages: pages.collect(), tail: exact(&s.tail) }
        });
        let sequences = sequences.collect();
        (rows, sequences)
    }

    /// A cache of `rows` rows at `data` and these sequences. Every number is checked against the scheme and the rows; page
    /// bytes may be anything.
    ///
    /// # Safety
    /// As for [`LayerCache::add_rows`].
    pub unsafe fn restore(
        codec: Arc<PageCodec>,
        exact: Dtype,
        data: *mut u8,
        rows: usize,
        keep: Keep,
        sequences: &[Stored],
    ) -> Result<Self> {
        let mut cache = Self::new(codec, exact, 0);
        // SAFETY: the caller's promise.
        unsafe { cache.add_rows(data, rows, keep) };
        let taken: Vec<Arc<Row>> = std::iter::from_fn(|| cache.extents[0].take()).collect();
        for (b, stored) in sequences.iter().enumerate() {
            let sequence = cache.sequence(stored, &taken).map_err(|e| Error::file(format!("sequence {b}: {e}")))?;
            cache.sequences.push(sequence);
        }
        Ok(cache)
    }

    fn sequence(&self, stored: &Stored, rows: &[Arc<Row>]) -> Result<Sequence> {
        let mut s = Sequence::new();
        let [sinks, tail] = self.slots();
        // A tail of as many tokens as it has slots would have been sealed.
        self.fill("sinks", &mut s.sinks, &stored.sinks, sinks, sinks)?;
        self.fill("tail", &mut s.tail, &stored.tail, tail, tail.saturating_sub(1))?;
        if s.sinks.tokens < sinks && (s.tail.tokens > 0 || !stored.pages.is_empty()) {
            return Err(Error::value("sinks", format!("{sinks} before any other token"), s.sinks.tokens));
        }
        for entry in &stored.pages {
            let Some(row) = rows.get(entry.row as usize) else {
                return Err(Error::value("row of a page", format!("below {} (the rows held)", rows.len()), entry.row));
            };
            if !(1..=PAGE_TOKENS as u32).contains(&entry.count) {
                return Err(Error::value("valid count of a page", "1 to 64", entry.count));
            }
            s.pages.push(Page { row: Arc::clone(row), count: entry.count });
        }
        Ok(s)
    }

    fn fill(&self, what: &str, part: &mut Exact, [k, v]: &[Vec<u8>; 2], slots: usize, most: usize) -> Result<()> {
        let (k_bytes, v_bytes) = self.token_bytes();
        let tokens = k.len() / k_bytes;
        if tokens > most || k.len() != tokens * k_bytes || v.len() != tokens * v_bytes {
            let expected = format!("0 to {most} tokens of {k_bytes} + {v_bytes} bytes");
            return Err(Error::value(what, expected, format!("{} + {} bytes", k.len(), v.len())));
        }
        if tokens > 0 {
            part.open(slots, k_bytes, v_bytes)?;
        }
        part.k[..k.len()].copy_from_slice(k);
        part.v[..v.len()].copy_from_slice(v);
        part.tokens = tokens;
        Ok(())
    }
}
