//! One layer's cache on a device: what [`crate::cache`] is in host memory, page for page the same bytes.
//!
//! The host keeps who holds which row and how many tokens there are; the device keeps the same counts, so that an append needs
//! nothing from the host and a CUDA graph can hold it. The core allocates nothing there: rows, tables and room for exact
//! tokens are memory of the caller's. Rows are reserved ahead of the append that fills them.

mod attend;
mod growth;
mod host;
mod operations;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::c_void;
use std::sync::Arc;

use super::append::Step;
use super::arguments::{CacheArguments, CacheTransformed, ReadArguments};
use super::codec::dtype_number;
use super::driver::{Device, Stream, device};
use super::kernels::{Kernel, TRANSFORMED_BYTES};
use super::paged::Pages;
use super::room::{DeviceView, Room, Sizes};
use super::transform::DeviceTransform;
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
    /// Tokens in pages: their counts' sum, which every step of every layer asks for.
    packed: usize,
    tail: usize,
    /// The device may write to the last page.
    open: bool,
}

/// The cache of one layer on a device.
#[derive(Debug)]
pub struct DeviceCache {
    codec: Arc<PageCodec>,
    exact: Dtype,
    step: Step,
    device: &'static Device,
    extents: Vec<Arc<Extent>>,
    sequences: Vec<Sequence>,
    /// Rows that stand in the tables beyond the pages in use.
    reserved: Vec<VecDeque<Arc<Row>>>,
    /// So many tokens can be appended to every sequence with the rows and counts that the device knows of.
    ready: usize,
    room: Option<(Room, Arc<Keep>)>,
    /// Table entries and sequences whose counts the device has yet to hear of.
    entries: BTreeMap<usize, u64>,
    stale: BTreeSet<usize>,
}

impl Sequence {
    fn push(&mut self, page: Page) {
        self.packed += page.count as usize;
        self.pages.push(page);
    }

    /// Whether all pages before the last are full.
    fn is_regular(&self) -> bool {
        let last = self.pages.last().map_or(PAGE_TOKENS, |p| p.count as usize);
        self.packed + PAGE_TOKENS == self.pages.len() * PAGE_TOKENS + last
    }
}

impl DeviceCache {
    /// An empty cache for `batch` sequences on the device of this ordinal.
    pub fn new(codec: Arc<PageCodec>, exact: Dtype, batch: usize, ordinal: usize) -> Result<Self> {
        let exact = codec.scheme.exact_dtype.unwrap_or(exact);
        Ok(Self {
            step: Step::new(&codec),
            codec,
            exact,
            device: device(ordinal)?,
            extents: Vec::new(),
            sequences: vec![Sequence::default(); batch],
            reserved: vec![VecDeque::new(); batch],
            ready: 0,
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
        self.sequences[b].packed
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
        let rows = parts::held_rows(&self.extents, self.sequences.iter().flat_map(|s| &s.pages));
        let (batch, sizes) = (self.batch(), self.sizes());
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

    fn room(&self) -> Result<Room> {
        self.room.as_ref().map(|(room, _)| *room).ok_or_else(|| Error::value("room", "memory before the first token", "none"))
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

    /// Refuses what cannot be appended; how many tokens it is.
    pub fn check_append(&self, k: &DeviceView, v: &DeviceView) -> Result<usize> {
        let tokens = k.shape[2];
        self.check("k", k, self.codec.key.layout.dim, tokens)?;
        self.check("v", v, self.codec.value.layout.dim, tokens)?;
        Ok(tokens)
    }

    /// Appends the same number of tokens to every sequence. NaN and infinities are the caller's to keep out: nothing waits for
    /// the device.
    ///
    /// # Safety
    /// The views are of memory of this device, alive and unwritten until `stream` is past this.
    pub unsafe fn append(&mut self, k: &DeviceView, v: &DeviceView, stream: Stream) -> Result<()> {
        let tokens = self.check_append(k, v)?;
        if tokens == 0 || self.batch() == 0 {
            return Ok(());
        }
        self.make_ready(tokens, stream)?;
        let room = self.room()?;
        let pages = self.as_pages(&room);
        // SAFETY: the caller's promise.
        if tokens <= FEW_TOKENS && unsafe { pages.append(k, v, None, stream)? } {
            self.count(tokens);
            return Ok(());
        }
        let mut a = pages.arguments(k, v);
        a.with_pages = i32::from(tokens <= FEW_TOKENS && !self.seals_apart());
        let argument: *mut c_void = (&raw mut a).cast();
        // Grids do not depend on counts, so that a CUDA graph may hold them.
        if a.with_pages == 0 {
            // Those kernels do not look whether rows are there.
            self.device
                .check_uncaptured(stream, "it may append up to 16 tokens, of schemes without blocks over heads before a tail")?;
            // SAFETY: the caller's promise.
            if !unsafe { pages.seal(k, v, stream)? } {
                // One page more than whole ones: the tail may be full, or a page open.
                let most = tokens.div_ceil(PAGE_TOKENS) + 1;
                self.launch(Kernel::PagesSeal, (most, self.codec.heads, 2 * self.batch()), 256, stream, argument)?;
            }
        }
        self.launch(Kernel::PagesAppend, (self.codec.heads, self.batch(), 1), 256, stream, argument)?;
        self.count(tokens);
        Ok(())
    }

    /// [`DeviceCache::append`] of keys and values that are transformed on their way in, by the same launch: false, and nothing
    /// done, where that takes launches of its own.
    ///
    /// # Safety
    /// As for [`DeviceCache::append`]; so are the transforms' parts.
    pub unsafe fn append_transformed(
        &mut self,
        k: &DeviceView,
        v: &DeviceView,
        how: &[DeviceTransform; 2],
        stream: Stream,
    ) -> Result<bool> {
        let tokens = self.check_append(k, v)?;
        let how = [how[0].argument(k.shape)?, how[1].argument(v.shape)?];
        if tokens == 0 || self.batch() == 0 {
            return Ok(true);
        }
        if tokens > FEW_TOKENS || self.seals_apart() {
            return Ok(false);
        }
        self.make_ready(tokens, stream)?;
        let room = self.room()?;
        let pages = self.as_pages(&room);
        // SAFETY: the caller's promise.
        if !unsafe { pages.append(k, v, Some(&how), stream)? } {
            let scheme = &self.codec.scheme;
            let spans = scheme.key.span == Span::Heads || scheme.value.span == Span::Heads;
            let heads = if spans { self.codec.heads } else { 1 };
            let shared = size_of::<f32>() * heads * tokens * (k.shape[3] + v.shape[3]);
            // Two blocks to a processor: where some have to wait for others, launches of their own are over sooner.
            if shared > TRANSFORMED_BYTES || self.codec.heads * self.batch() > 2 * self.device.processors() {
                return Ok(false);
            }
            let dense = |x: &DeviceView| DeviceView { address: 0, strides: [0, 0, x.shape[3] as isize, 1], ..*x };
            let vectors = pages.vectors(false, &dense(k)) && pages.vectors(true, &dense(v));
            let append = CacheArguments { with_pages: 1, vectors: i32::from(vectors), ..pages.arguments(k, v) };
            let mut a =
                CacheTransformed { append, side: how, dim: [k, v].map(|x| x.shape[3] as i32), heads: heads as i32, padding: 0 };
            let (grid, argument): (_, *mut c_void) = ((self.codec.heads, self.batch(), 1), (&raw mut a).cast());
            // SAFETY: the one parameter is this struct; the addresses in it are the room's and the caller's tensors.
            unsafe { self.device.launch(Kernel::PagesAppendTransformed, grid, 256, shared, stream, &mut [argument])? };
        }
        self.count(tokens);
        Ok(true)
    }

    /// Whether pages are sealed by a launch of their own: blocks over heads read tails that others move.
    fn seals_apart(&self) -> bool {
        let scheme = &self.codec.scheme;
        !scheme.writes_single_slots() && (scheme.key.span == Span::Heads || scheme.value.span == Span::Heads)
    }

    fn make_ready(&mut self, tokens: usize, stream: Stream) -> Result<()> {
        if tokens > self.ready || self.is_stale() {
            self.reserve(tokens, stream)?;
        }
        Ok(())
    }

    fn as_pages<'a>(&'a self, room: &'a Room) -> Pages<'a> {
        Pages { device: self.device, codec: &self.codec, exact: self.exact, room, batch: self.batch(), step: self.step }
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
        if self.sequences.iter().all(Sequence::is_regular) {
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
