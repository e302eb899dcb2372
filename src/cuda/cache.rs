//! One layer's cache on a device: what [`crate::cache`] is in host memory, page for page the same bytes.
//!
//! The host keeps who holds which row and how many tokens there are; the device keeps the same counts, so that an append needs
//! nothing from the host and a CUDA graph can hold it. The core allocates nothing there: rows, tables and room for exact
//! tokens are memory of the caller's. Rows are reserved ahead of the append that fills them.

mod host;
mod operations;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::sync::Arc;

use super::arguments::{CacheArguments, ENTRIES, ReadArguments, TableArguments, TensorArgument};
use super::codec::dtype_number;
use super::driver::{Device, Stream, device};
use super::kernels::Kernel;
use super::paged::Pages;
use super::room::{DeviceView, Room, Sizes};
use crate::cache::parts::{self, Page};
use crate::cache::pool::{Extent, Row};
use crate::cache::{Keep, Memory, PageEntry};
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::scheme::Span;
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// Up to this many tokens are appended in one launch.
const FEW_TOKENS: usize = 16;

#[derive(Debug, Clone, Default)]
struct Sequence {
    sinks: usize,
    pages: Vec<Page>,
    tail: usize,
    /// The device may write to the last page.
    open: bool,
}

/// The cache of one layer on a device.
#[derive(Debug)]
pub struct DeviceCache {
    codec: Arc<PageCodec>,
    exact: Dtype,
    device: &'static Device,
    extents: Vec<Arc<Extent>>,
    sequences: Vec<Sequence>,
    /// Rows that stand in the tables beyond the pages in use.
    reserved: Vec<Vec<Arc<Row>>>,
    room: Option<(Room, Arc<Keep>)>,
    /// Table entries and sequences whose counts the device has yet to hear of.
    entries: BTreeMap<usize, u64>,
    stale: BTreeSet<usize>,
}

impl DeviceCache {
    /// An empty cache for `batch` sequences on the device of this ordinal.
    pub fn new(codec: Arc<PageCodec>, exact: Dtype, batch: usize, ordinal: usize) -> Result<Self> {
        let exact = codec.scheme.exact_dtype.unwrap_or(exact);
        Ok(Self {
            codec,
            exact,
            device: device(ordinal)?,
            extents: Vec::new(),
            sequences: vec![Sequence::default(); batch],
            reserved: vec![Vec::new(); batch],
            room: None,
            entries: BTreeMap::new(),
            stale: BTreeSet::new(),
        })
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

    /// The device.
    pub fn device(&self) -> &'static Device {
        self.device
    }

    /// Tokens of sequence `b`.
    pub fn tokens(&self, b: usize) -> usize {
        self.sequences[b].sinks + self.packed(b) + self.sequences[b].tail
    }

    /// Tokens of sequence `b` in pages.
    pub fn packed(&self, b: usize) -> usize {
        self.sequences[b].pages.iter().map(|p| p.count as usize).sum()
    }

    /// Page table of sequence `b`; rows count over own extents, then over those of other caches.
    pub fn table(&self, b: usize) -> Vec<PageEntry> {
        parts::entries(&self.all_extents(), &self.sequences[b].pages)
    }

    fn all_extents(&self) -> Vec<&Arc<Extent>> {
        parts::all_extents(&self.extents, self.sequences.iter().flat_map(|s| &s.pages))
    }

    /// What [`DeviceCache::add_rows`] was given to keep, for the extents that tables name.
    pub fn kept(&self) -> Vec<&Keep> {
        self.all_extents().into_iter().map(|e| &e.keep).collect()
    }

    /// Rows of this cache's own memory.
    pub fn rows(&self) -> usize {
        self.extents.iter().map(|e| e.rows).sum()
    }

    /// Those that nobody uses.
    pub fn free_rows(&self) -> usize {
        self.extents.iter().map(|e| e.free_rows()).sum()
    }

    /// Bytes of a room's exact parts, for one sequence.
    pub fn sizes(&self) -> Sizes {
        let scheme = &self.codec.scheme;
        let tail = if scheme.writes_single_slots() { 0 } else { scheme.residual_length + PAGE_TOKENS };
        let token = |dim: usize| self.codec.heads * dim * self.exact.bytes();
        let both = [token(self.codec.key.layout.dim), token(self.codec.value.layout.dim)];
        Sizes { sinks: both.map(|t| t * scheme.sink_tokens), tail: both.map(|t| t * tail) }
    }

    /// Bytes allocated on the device.
    pub fn memory(&self) -> Memory {
        let codes = self.codec.heads * (self.codec.key.layout.code_bytes + self.codec.value.layout.code_bytes);
        let shared =
            self.sequences.iter().flat_map(|s| &s.pages).filter(|p| !self.extents.iter().any(|e| Arc::ptr_eq(e, &p.row.extent)));
        let shared: std::collections::HashSet<_> = shared.map(|p| Arc::as_ptr(&p.row)).collect();
        let (rows, batch, sizes) = (self.rows() + shared.len(), self.batch(), self.sizes());
        let room = self
            .room
            .as_ref()
            .map_or(0, |(room, _)| batch * (16 + 4 + 8 * room.capacity) + super::codec_bytes(&self.codec, self.exact).len());
        let held = usize::from(self.room.is_some()) * batch;
        Memory {
            codes: rows * codes,
            scales: rows * (self.codec.row_bytes() - codes) + room,
            tail: held * (sizes.tail[0] + sizes.tail[1]),
            sinks: held * (sizes.sinks[0] + sizes.sinks[1]),
        }
    }

    /// Gives the cache `count` more rows of device memory.
    ///
    /// # Safety
    /// As for [`crate::cache::LayerCache::add_rows`], on this cache's device.
    pub unsafe fn add_rows(&mut self, address: u64, count: usize, keep: Keep) {
        let data = std::ptr::with_exposed_provenance_mut(address as usize);
        // SAFETY: the caller's promise; nothing here reads or writes through the address.
        self.extents.push(Arc::new(unsafe { Extent::new(data, self.codec.row_bytes(), count, keep) }));
    }

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

    fn room(&self) -> Result<Room> {
        self.room.as_ref().map(|(room, _)| *room).ok_or_else(|| Error::value("room", "memory before the first token", "none"))
    }

    /// Tells the device what the host has changed.
    fn flush(&mut self, stream: Stream) -> Result<()> {
        if self.entries.is_empty() && self.stale.is_empty() {
            return Ok(());
        }
        let room = self.room()?;
        // No place twice: the threads of a launch have no order.
        let entries: Vec<(usize, u64)> = std::mem::take(&mut self.entries).into_iter().collect();
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

    fn launch(
        &self,
        kernel: Kernel,
        grid: (usize, usize, usize),
        threads: usize,
        stream: Stream,
        argument: *mut c_void,
    ) -> Result<()> {
        // SAFETY: the argument is the kernel's one parameter; the addresses in it are the room's and the caller's tensors.
        unsafe { self.device.launch(kernel, grid, threads, 0, stream, &mut [argument]) }
    }

    fn check(&self, what: &str, x: &DeviceView, dim: usize, tokens: usize) -> Result<()> {
        let expected = [self.batch(), self.codec.heads, tokens, dim];
        if x.shape != expected {
            return Err(Error::shape(what, format!("{expected:?}"), format!("{:?}", x.shape)));
        }
        Ok(())
    }

    /// Reserves rows in the tables for the next `tokens` tokens of every sequence, so that appending them needs no more of the
    /// host: what has to be done before a CUDA graph appends.
    pub fn reserve(&mut self, tokens: usize, stream: Stream) -> Result<()> {
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
            let needed = self.rows_for(b, tokens);
            while self.reserved[b].len() < needed {
                let row = self.extents.iter().find_map(|e| e.take()).expect("rows were counted before");
                let place = b * room.capacity + self.sequences[b].pages.len() + self.reserved[b].len();
                self.entries.insert(place, row.data() as u64);
                self.reserved[b].push(row);
            }
            // A page that another table names is not written to.
            let own = self.sequences[b].pages.last().is_some_and(|p| Arc::strong_count(&p.row) == 1);
            if self.codec.scheme.writes_single_slots() && self.sequences[b].open != own {
                self.sequences[b].open = own;
                self.stale.insert(b);
            }
        }
        self.flush(stream)
    }

    /// Appends the same number of tokens to every sequence. NaN and infinities are the caller's to keep out: nothing waits for
    /// the device.
    ///
    /// # Safety
    /// The views are of memory of this device, alive and unwritten until `stream` is past this.
    pub unsafe fn append(&mut self, k: &DeviceView, v: &DeviceView, stream: Stream) -> Result<()> {
        let tokens = k.shape[2];
        self.check("k", k, self.codec.key.layout.dim, tokens)?;
        self.check("v", v, self.codec.value.layout.dim, tokens)?;
        if tokens == 0 || self.batch() == 0 {
            return Ok(());
        }
        self.reserve(tokens, stream)?;
        let room = self.room()?;
        let tensor = |x: &DeviceView| TensorArgument {
            data: x.address,
            stride: x.strides.map(|s| s as i64),
            dtype: dtype_number(x.dtype) as i64,
        };
        let mut a = CacheArguments {
            codec: room.codec,
            counts: room.counts,
            table: room.table,
            sinks: room.sinks,
            tail: room.tail,
            arrived: room.arrived,
            x: [tensor(k), tensor(v)],
            capacity: room.capacity as i64,
            with_pages: 0,
            tokens: tokens as i32,
        };
        let scheme = &self.codec.scheme;
        let single = scheme.writes_single_slots();
        let spans = scheme.key.span == Span::Heads || scheme.value.span == Span::Heads;
        a.with_pages = i32::from(tokens <= FEW_TOKENS && (single || !spans));
        let argument: *mut c_void = (&raw mut a).cast();
        // Grids do not depend on counts, so that a CUDA graph may hold them.
        if a.with_pages == 0 {
            // SAFETY: the caller's promise.
            if !unsafe { self.as_pages(&room).seal(k, v, stream)? } {
                // One page more than whole ones: the tail may be full, or a page open.
                let pages = tokens.div_ceil(PAGE_TOKENS) + 1;
                self.launch(Kernel::PagesSeal, (pages, self.codec.heads, 2 * self.batch()), 256, stream, argument)?;
            }
        }
        self.launch(Kernel::PagesAppend, (self.codec.heads, self.batch(), 1), 256, stream, argument)?;
        self.advance(tokens);
        Ok(())
    }

    fn as_pages<'a>(&'a self, room: &'a Room) -> Pages<'a> {
        Pages { device: self.device, codec: &self.codec, exact: self.exact, room, batch: self.batch() }
    }

    /// Counts `tokens` as appended to every sequence: what a CUDA graph that holds an append has done. Needs
    /// [`DeviceCache::reserve`] before.
    pub fn advance(&mut self, tokens: usize) {
        let scheme = &self.codec.scheme;
        let (single, sink_tokens, window) = (scheme.writes_single_slots(), scheme.sink_tokens, scheme.residual_length);
        for (s, reserved) in self.sequences.iter_mut().zip(&mut self.reserved) {
            let sinks = tokens.min(sink_tokens - s.sinks);
            s.sinks += sinks;
            let mut left = tokens - sinks;
            if !single {
                s.tail += left;
                while s.tail >= window + PAGE_TOKENS && !reserved.is_empty() {
                    s.pages.push(Page { row: reserved.remove(0), count: PAGE_TOKENS as u32 });
                    s.tail -= PAGE_TOKENS;
                }
                continue;
            }
            if s.open
                && let Some(page) = s.pages.last_mut()
            {
                let count = left.min(PAGE_TOKENS - page.count as usize);
                page.count += count as u32;
                left -= count;
            }
            while left > 0 && !reserved.is_empty() {
                let count = left.min(PAGE_TOKENS);
                s.pages.push(Page { row: reserved.remove(0), count: count as u32 });
                s.open = true;
                left -= count;
            }
        }
    }

    /// Writes tokens `from..from + tokens` of every sequence, `[batch, heads, tokens, dim]`, as `dtype`; zeros past the end.
    ///
    /// # Safety
    /// `out` are addresses of as much memory of this device, used by nobody else until `stream` is past this.
    pub unsafe fn read(&mut self, from: usize, tokens: usize, dtype: Dtype, out: [u64; 2], stream: Stream) -> Result<()> {
        if tokens == 0 || self.batch() == 0 {
            return Ok(());
        }
        self.flush(stream)?;
        let room = self.room()?;
        let all_full = |pages: &[Page]| pages.iter().rev().skip(1).all(|p| p.count as usize == PAGE_TOKENS);
        if self.sequences.iter().all(|s| all_full(&s.pages)) {
            let most = |f: &dyn Fn(usize) -> usize| (0..self.batch()).map(f).max().unwrap_or(0);
            let end = (0..self.batch()).map(|b| self.tokens(b) - self.sequences[b].tail).min().unwrap_or(0);
            let known = [most(&|b| self.sequences[b].pages.len()), most(&|b| self.sequences[b].sinks), end];
            // SAFETY: the caller's promise.
            if unsafe { self.as_pages(&room).read(from..from + tokens, dtype, out, known, stream)? } {
                return Ok(());
            }
        }
        let mut a = ReadArguments {
            codec: room.codec,
            counts: room.counts,
            table: room.table,
            sinks: room.sinks,
            tail: room.tail,
            out,
            capacity: room.capacity as i64,
            from: from as i32,
            tokens: tokens as i32,
            dtype: dtype_number(dtype) as i32,
            padding: 0,
        };
        let grid = (tokens.div_ceil(PAGE_TOKENS), self.codec.heads, 2 * self.batch());
        self.launch(Kernel::PagesRead, grid, 256, stream, (&raw mut a).cast())
    }
}

/// Slots that the last page offers to a single-slot scheme: none if another table names its row.
fn open_slots(s: &Sequence) -> usize {
    match s.pages.last() {
        Some(page) if Arc::strong_count(&page.row) == 1 => PAGE_TOKENS - page.count as usize,
        _ => 0,
    }
}
