//! Attention on a cache on a device, by one launch.

use super::{DeviceCache, Sequence};
use crate::attention::ReadCount;
use crate::cuda::attend::{Attend, Known, Plan, Workspace, check_queries};
use crate::cuda::driver::Stream;
use crate::cuda::room::DeviceView;
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::tensor::Dtype;

impl DeviceCache {
    /// The workspace that attention of `columns` (queries times query heads of a KV head) takes, or what was expected of
    /// scheme, shape or device.
    pub fn attend_workspace(&self, columns: usize) -> std::result::Result<Workspace, String> {
        Plan::new(&self.codec, self.exact, self.device, self.batch(), columns).map(|p| p.workspace())
    }

    /// Whether the newest `queries` tokens of every sequence are exact.
    pub fn newest_are_exact(&self, queries: usize) -> bool {
        self.sequences.iter().all(|s| s.tail >= queries || s.pages.is_empty())
    }

    /// Positions that so many queries of each sequence attend, and those of them that are read from pages; with `fresh`, the
    /// queries' own tokens are not.
    pub fn attended(&self, queries: usize, starts: Option<&[usize]>, window: Option<usize>, fresh: bool) -> Result<ReadCount> {
        if let Some(starts) = starts.filter(|s| s.len() != self.batch()) {
            return Err(Error::shape("starts", format!("{} positions", self.batch()), format!("{}", starts.len())));
        }
        let mut total = ReadCount::default();
        for (b, s) in self.sequences.iter().enumerate() {
            let held = s.sinks + s.packed + s.tail;
            let before = held.checked_sub(queries).ok_or_else(|| too_many(held, queries))?;
            let pages = s.sinks..(s.sinks + s.packed).min(if fresh { before } else { held });
            for end in before + 1..=held {
                let start = starts.map_or(0, |s| s[b]).max(window.map_or(0, |w| end.saturating_sub(w))).min(end);
                total.attended += (end - start) as u64;
                total.packed += end.min(pages.end).saturating_sub(start.max(pages.start)) as u64;
            }
        }
        Ok(total)
    }

    /// Refuses queries that do not fit what the cache holds. Returns columns per KV head.
    pub fn check_queries(&self, q: &DeviceView) -> Result<usize> {
        let shortest = (0..self.batch()).map(|b| self.tokens(b)).min().unwrap_or(0);
        check_queries(&self.codec, self.batch(), shortest, q.shape)
    }

    /// Attention. Nothing waits for the device.
    ///
    /// # Safety
    /// The addresses in `call` are memory of this cache's device of the sizes that it names, the workspace of
    /// [`DeviceCache::attend_workspace`], alive until `stream` is past this.
    pub unsafe fn attend(&mut self, call: &Attend, stream: Stream) -> Result<()> {
        let columns = self.check_queries(&call.q)?;
        for (what, dtype) in [("q", call.q.dtype), ("out", call.out.1)] {
            if !matches!(dtype, Dtype::F16 | Dtype::Bf16) && (what == "q" || dtype != Dtype::F32) {
                return Err(Error::dtype(what, "float16 or bfloat16", dtype.name()));
            }
        }
        let even = call.q.strides[..3].iter().all(|s| s % 2 == 0) && call.q.address.is_multiple_of(4);
        if !even || (call.q.strides[3] != 1 && call.q.shape[3] > 1) {
            return Err(Error::memory("q", "rows of adjacent numbers at multiples of 4 bytes", format!("{:?}", call.q.strides)));
        }
        let plan = Plan::new(&self.codec, self.exact, self.device, self.batch(), columns)
            .map_err(|expected| Error::unsupported("attention on pages by one launch", format!("expected {expected}")))?;
        if self.batch() == 0 || columns == 0 {
            return Ok(());
        }
        self.flush(stream)?;
        let single = self.codec.scheme.writes_single_slots();
        let partial = |count: u32| (count as usize) < PAGE_TOKENS;
        let cut = |s: &Sequence| !(single && s.open) && s.pages.last().is_some_and(|p| partial(p.count));
        let irregular = self.sequences.iter().any(|s| !s.is_regular() || cut(s));
        let room = self.room()?;
        // SAFETY: the caller's promise.
        unsafe { self.as_pages(&room).attend(&plan, call, Known { irregular }, stream) }
    }
}

fn too_many(held: usize, queries: usize) -> Error {
    Error::value("queries", format!("at most {held} (the tokens held, queries included)"), queries)
}
