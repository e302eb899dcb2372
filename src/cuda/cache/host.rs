//! Between the device and host memory, where caches are saved and loaded: the same rows, the same exact tokens.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::result;

use super::{DeviceCache, Sequence};
use crate::cache::parts::Page;
use crate::cache::pool::Row;
use crate::cache::{Keep, LayerCache, PageEntry, Stored};
use crate::cuda::driver::{Stream, error};
use crate::error::{Error, Result};

impl DeviceCache {
    /// The rows that the tables name, each once, and its number among them.
    fn named(&self) -> (Vec<&Arc<Row>>, HashMap<*const Row, u32>) {
        let (mut rows, mut numbers) = (Vec::new(), HashMap::new());
        for page in self.sequences.iter().flat_map(|s| &s.pages) {
            numbers.entry(Arc::as_ptr(&page.row)).or_insert_with(|| {
                rows.push(&page.row);
                rows.len() as u32 - 1
            });
        }
        (rows, numbers)
    }

    /// Rows that [`DeviceCache::to_host`] takes.
    pub fn named_rows(&self) -> usize {
        self.named().0.len()
    }

    /// The same cache in host memory, its pages in the `named_rows()` rows at `data`. Waits for the device.
    ///
    /// # Safety
    /// As for [`LayerCache::restore`].
    pub unsafe fn to_host(&mut self, data: *mut u8, keep: Keep, stream: Stream) -> Result<LayerCache> {
        self.flush(stream)?;
        let (rows, numbers) = self.named();
        let row_bytes = self.codec.row_bytes();
        for (i, row) in rows.iter().enumerate() {
            // SAFETY: the caller's memory holds so many rows.
            let to = unsafe { std::slice::from_raw_parts_mut(data.add(i * row_bytes), row_bytes) };
            self.fetch(to, row.data() as u64, stream)?;
        }
        let sizes = self.sizes();
        let exact = |part: &[u64; 2], sizes: [usize; 2], b: usize, tokens: usize| -> Result<[Vec<u8>; 2]> {
            let mut both = [Vec::new(), Vec::new()];
            for (side, bytes) in both.iter_mut().enumerate() {
                *bytes = vec![0; tokens * self.token_bytes(side)];
                self.fetch(bytes, part[side] + (b * sizes[side]) as u64, stream)?;
            }
            Ok(both)
        };
        let mut sequences = Vec::new();
        for (b, s) in self.sequences.iter().enumerate() {
            let pages = s.pages.iter().map(|p| PageEntry { row: numbers[&Arc::as_ptr(&p.row)], count: p.count });
            let mut stored = Stored { pages: pages.collect(), ..Stored::default() };
            if let Some((room, _)) = &self.room {
                stored.sinks = exact(&room.sinks, sizes.sinks, b, s.sinks)?;
                stored.tail = exact(&room.tail, sizes.tail, b, s.tail)?;
            }
            sequences.push(stored);
        }
        self.wait(stream)?;
        let rows = rows.len();
        // SAFETY: the caller's promise.
        unsafe { LayerCache::restore(Arc::clone(&self.codec), self.exact, data, rows, keep, &sequences) }
    }

    /// Fills this cache, which holds nothing but has rows and a room, with what `host` holds. Waits for the device.
    pub fn fill(&mut self, host: &LayerCache, stream: Stream) -> Result<()> {
        let (codec, theirs) = (&self.codec, host.codec());
        let alike = codec.scheme == theirs.scheme && codec.heads == theirs.heads && self.exact == host.exact_dtype();
        let dims = |c: &crate::seal::PageCodec| [c.key.layout.dim, c.value.layout.dim];
        if !alike || dims(codec) != dims(theirs) || self.batch() != host.batch() {
            return Err(Error::value("cache", "one of the same scheme, shape, exact dtype and batch", "another"));
        }
        let (bytes, stored) = host.stored();
        let (sizes, room) = (self.sizes(), self.room()?);
        let most = stored.iter().map(|s| s.pages.len()).max().unwrap_or(0);
        if most > room.capacity {
            return Err(Error::value("room for a page table", format!("{most} pages or more"), room.capacity));
        }
        if self.free_rows() < bytes.len() {
            return Err(Error::Exhausted { needed: bytes.len(), free: self.free_rows() });
        }
        let take = || self.extents.iter().find_map(|e| e.take()).expect("rows were counted before");
        let rows: Vec<Arc<Row>> = bytes.iter().map(|_| take()).collect();
        for (row, bytes) in rows.iter().zip(bytes) {
            self.send(row.data() as u64, bytes, stream)?;
        }
        for (b, s) in stored.iter().enumerate() {
            for side in 0..2 {
                self.send(room.sinks[side] + (b * sizes.sinks[side]) as u64, &s.sinks[side], stream)?;
                self.send(room.tail[side] + (b * sizes.tail[side]) as u64, &s.tail[side], stream)?;
            }
            let tokens = |part: &[Vec<u8>; 2]| part[0].len() / self.token_bytes(0);
            let mut sequence = Sequence { sinks: tokens(&s.sinks), tail: tokens(&s.tail), ..Sequence::default() };
            s.pages.iter().for_each(|p| sequence.push(Page { row: Arc::clone(&rows[p.row as usize]), count: p.count }));
            for (i, page) in sequence.pages.iter().enumerate() {
                self.entries.insert(b * room.capacity + i, page.row.data() as u64 | u64::from(page.count) << 56);
            }
            self.sequences[b] = sequence;
            self.restate(b);
        }
        self.flush(stream)?;
        self.wait(stream)
    }

    /// Bytes of an exact token's keys, or values.
    fn token_bytes(&self, side: usize) -> usize {
        let half = if side == 0 { &self.codec.key } else { &self.codec.value };
        self.codec.heads * half.layout.dim * self.exact.bytes()
    }

    fn fetch(&self, to: &mut [u8], from: u64, stream: Stream) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: rows and rooms are as large as their givers promised; `to_host` waits before the memory is looked at.
        unsafe { result::memcpy_dtoh_async(to, from, raw(stream)) }.map_err(error("copy"))
    }

    fn send(&self, to: u64, from: &[u8], stream: Stream) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: as in `fetch`; `fill` waits before the memory can go.
        unsafe { result::memcpy_htod_async(to, from, raw(stream)) }.map_err(error("copy"))
    }

    fn wait(&self, stream: Stream) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the caller's stream.
        unsafe { result::stream::synchronize(raw(stream)) }.map_err(error("stream"))
    }
}

fn raw(stream: Stream) -> cudarc::driver::sys::CUstream {
    std::ptr::with_exposed_provenance_mut(stream.0)
}
