//! What is done to whole sequences: another room, cut, reorder, fork, reset. No page is copied.

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::result;

use super::{DeviceCache, Sequence};
use crate::cache::Keep;
use crate::cache::parts::check_lengths;
use crate::cuda::driver::{Stream, error};
use crate::cuda::room::Room;
use crate::error::{Error, Result};

impl DeviceCache {
    /// Moves to another room, which holds what the old one held (of sequence `from[b]` for sequence `b`).
    ///
    /// # Safety
    /// The room is memory of this cache's device, of the sizes for `from.len()` sequences, alive until `keep` is dropped, and
    /// nobody else uses it.
    pub unsafe fn move_to(&mut self, room: Room, keep: Keep, from: &[usize], stream: Stream) -> Result<()> {
        self.flush(stream)?;
        let sizes = self.sizes();
        if let Some((old, _)) = &self.room {
            for (b, &a) in from.iter().enumerate() {
                let parts = [
                    (old.counts, room.counts, 16, 16),
                    (old.table, room.table, 8 * old.capacity, 8 * room.capacity),
                    (old.sinks[0], room.sinks[0], sizes.sinks[0], sizes.sinks[0]),
                    (old.sinks[1], room.sinks[1], sizes.sinks[1], sizes.sinks[1]),
                    (old.tail[0], room.tail[0], sizes.tail[0], sizes.tail[0]),
                    (old.tail[1], room.tail[1], sizes.tail[1], sizes.tail[1]),
                ];
                for (source, target, from_bytes, to_bytes) in parts {
                    let bytes = from_bytes.min(to_bytes);
                    if bytes > 0 {
                        let (target, source) = (target + (b * to_bytes) as u64, source + (a * from_bytes) as u64);
                        self.copy(target, source, bytes, stream)?;
                    }
                }
            }
        }
        self.room = Some((room, Arc::new(keep)));
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<()> {
        self.device.bind()?;
        let stream = std::ptr::with_exposed_provenance_mut(stream.0);
        // SAFETY: both lie inside rooms, whose sizes their givers promised.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }.map_err(error("copy"))
    }

    /// Cuts sequence `b` to its first `lengths[b]` tokens.
    pub fn crop(&mut self, lengths: &[usize]) -> Result<()> {
        let held: Vec<usize> = (0..self.batch()).map(|b| self.tokens(b)).collect();
        check_lengths(lengths, &held)?;
        for (b, &length) in lengths.iter().enumerate() {
            let mut left = self.tokens(b) - length;
            if left == 0 {
                continue;
            }
            let s = &mut self.sequences[b];
            let mut cut = |held: usize| {
                let cut = left.min(held);
                left -= cut;
                cut
            };
            s.tail -= cut(s.tail);
            while let Some(page) = s.pages.last_mut() {
                let count = cut(page.count as usize);
                page.count -= count as u32;
                s.packed -= count;
                if page.count > 0 {
                    break;
                }
                s.pages.pop();
            }
            s.sinks -= cut(s.sinks);
            self.restate(b);
        }
        Ok(())
    }

    /// Marks what the device knows of sequence `b` as old: its counts and its last page. Reserved rows stood behind the pages
    /// that were; they go back.
    pub(super) fn restate(&mut self, b: usize) {
        let capacity = self.room.as_ref().map_or(0, |(room, _)| room.capacity);
        let s = &self.sequences[b];
        if let Some(page) = s.pages.last() {
            let value = page.row.data() as u64 | u64::from(page.count) << 56;
            self.entries.insert(b * capacity + s.pages.len() - 1, value);
        }
        self.reserved[b].clear();
        self.ready = 0;
        self.end_table(b);
        self.stale.insert(b);
    }

    /// Makes sequence `i` what sequence `indices[i]` was, in another room.
    ///
    /// # Safety
    /// As for [`DeviceCache::move_to`].
    pub unsafe fn select(&mut self, indices: &[usize], room: Room, keep: Keep, stream: Stream) -> Result<()> {
        if let Some(bad) = indices.iter().find(|&&i| i >= self.batch()) {
            return Err(Error::value("sequence index", format!("0 to {}", self.batch().saturating_sub(1)), bad));
        }
        // SAFETY: the caller's promise.
        unsafe { self.move_to(room, keep, indices, stream)? };
        self.sequences = indices.iter().map(|&i| self.sequences[i].clone()).collect();
        self.reserved = vec![VecDeque::new(); indices.len()];
        // Pages of several tables are written to no more: that is looked at before the next append.
        self.ready = 0;
        (0..indices.len()).for_each(|b| self.end_table(b));
        Ok(())
    }

    /// A cache of its own with sequences `indices`: pages are shared, exact tokens copied into `room`.
    ///
    /// # Safety
    /// As for [`DeviceCache::move_to`].
    pub unsafe fn fork(&mut self, indices: &[usize], room: Room, keep: Keep, stream: Stream) -> Result<Self> {
        self.flush(stream)?;
        self.ready = 0;
        let mut copy = Self::new(Arc::clone(&self.codec), self.exact, 0, self.device.ordinal())?;
        copy.room.clone_from(&self.room);
        copy.sequences.clone_from(&self.sequences);
        copy.reserved = vec![VecDeque::new(); self.batch()];
        // SAFETY: the caller's promise.
        unsafe { copy.select(indices, room, keep, stream)? };
        Ok(copy)
    }

    /// Drops every token.
    pub fn reset(&mut self) {
        self.sequences.iter_mut().for_each(|s| *s = Sequence::default());
        (0..self.batch()).for_each(|b| self.restate(b));
    }
}
