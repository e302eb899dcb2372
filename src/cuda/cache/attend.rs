//! Attention on a cache on a device, by one launch.

use super::DeviceCache;
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
        let irregular = self.sequences.iter().any(|s| {
            let Some((last, before)) = s.pages.split_last() else { return false };
            before.iter().any(|p| partial(p.count)) || (partial(last.count) && !(single && s.open))
        });
        let room = self.room()?;
        // SAFETY: the caller's promise.
        unsafe { self.as_pages(&room).attend(&plan, call, Known { irregular }, stream) }
    }
}
