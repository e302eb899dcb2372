//! Rows of pages: who owns the memory, and who still uses a row.
//!
//! An [`Extent`] is memory that a caller handed over in one piece. A [`Row`] is held by every table entry that names it, in
//! whichever cache; with its last holder it returns to its extent, so that no row is lost and none is freed too early. Only
//! the cache that was given an extent takes rows from it: caches that share rows never compete for free ones.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What keeps foreign memory alive: dropped with the last row of an extent and the cache that owns it.
pub type Keep = Box<dyn Any + Send + Sync>;

/// Rows of one piece of memory, and which of them are free.
pub(crate) struct Extent {
    data: *mut u8,
    row_bytes: usize,
    pub(crate) rows: usize,
    free: Mutex<Vec<u32>>,
    pub(crate) keep: Keep,
}

// SAFETY: the memory is plain bytes that live as long as the extent (the contract of `LayerCache::add_rows`); a row is
// written by its only holder, through `&mut LayerCache`.
unsafe impl Send for Extent {}
// SAFETY: as above.
unsafe impl Sync for Extent {}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Extent({} rows, {} free)", self.rows, self.free().len())
    }
}

impl Extent {
    /// # Safety
    /// `data` points to `rows * row_bytes` bytes that live, and that nobody else touches, until `keep` is dropped.
    pub(crate) unsafe fn new(data: *mut u8, row_bytes: usize, rows: usize, keep: Keep) -> Self {
        Self { data, row_bytes, rows, free: Mutex::new((0..rows as u32).rev().collect()), keep }
    }

    fn free(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn free_rows(&self) -> usize {
        self.free().len()
    }

    /// A free row, the lowest first as long as none was returned.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Arc<Row>> {
        let index = self.free().pop()?;
        Some(Arc::new(Row { extent: Arc::clone(self), index }))
    }
}

/// One row in use.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) extent: Arc<Extent>,
    pub(crate) index: u32,
}

impl Row {
    /// Its first byte.
    pub(crate) fn data(&self) -> *mut u8 {
        // SAFETY: index < rows, all inside the memory of the extent.
        unsafe { self.extent.data.add(self.index as usize * self.extent.row_bytes) }
    }

    /// Its bytes. Nobody writes a row that has more than one holder, nor one whose holder is borrowed.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: inside the extent's memory, alive while `self` holds the extent.
        unsafe { std::slice::from_raw_parts(self.data(), self.extent.row_bytes) }
    }
}

impl Drop for Row {
    fn drop(&mut self) {
        self.extent.free().push(self.index);
    }
}
