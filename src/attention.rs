//! Attention of queries on one layer's packed cache. Codes are read where they lie: the cache is never decoded as a whole.
//!
//! A sequence is cut into **tiles** of at most 64 tokens (pieces of sinks, pages, tail, fresh tokens), and tiles into fixed
//! **runs**. A run of one KV head gives `(max, sum, accumulator)` for each query column; runs are merged in order, so that a
//! result does not depend on the number of threads.

use crate::cache::{LayerCache, SequenceView};
use crate::error::{Error, Result};
use crate::page::PAGE_TOKENS;
use crate::tensor::View;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod codes;
#[cfg(target_arch = "x86_64")]
mod exponentials;
mod fast;
#[cfg(target_arch = "x86_64")]
mod integers;
#[cfg(target_arch = "x86_64")]
mod integers512;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lay;
mod math;
mod oracle;
#[cfg(target_arch = "x86_64")]
mod places;
#[cfg(test)]
mod tests;
mod tile;

/// Which instructions attention uses on this CPU: `portable`, `avx2` or `avx512`.
pub fn cpu_path() -> &'static str {
    math::Simd::detect().name()
}

/// What to attend with, and how.
#[derive(Debug, Clone)]
pub struct Queries<'a> {
    /// `[batch, q_heads, queries, key_dim]`, any dtype and strides. Query `i` stands at position `tokens - queries + i`: its
    /// own token was appended before.
    pub q: View,
    /// Factor of the scores.
    pub scale: f64,
    /// First attended position of each sequence (left padding); 0 if absent.
    pub starts: Option<&'a [usize]>,
    /// Exact keys and values of the newest `queries` tokens, `[batch, kv_heads, queries, dim]`, read instead of the cache.
    pub fresh: Option<(View, View)>,
    /// Sliding window: the query at position `p` attends `p - window + 1..=p`.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub soft_cap: Option<f64>,
}

/// Positions read, summed over sequences and queries (not over heads).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadCount {
    /// Attended positions.
    pub attended: u64,
    /// Those among them that were read from pages.
    pub packed: u64,
}

/// Attention in fp32. `out` is `[batch, queries, q_heads, value_dim]`, `lse` (natural log of the sum of exponentials of the
/// scaled and capped scores) is `[batch, queries, q_heads]`. A query that attends nothing gives zeros and minus infinity.
pub fn attend(cache: &LayerCache, queries: &Queries, out: &mut [f32], lse: Option<&mut [f32]>) -> Result<ReadCount> {
    let plan = Plan::new(cache, queries, out.len(), lse.as_ref().map(|l| l.len()))?;
    fast::attend(&plan, math::Simd::detect(), out, lse);
    Ok(plan.count())
}

/// The oracle: [`attend`] in f64 on exactly decoded elements, the plain way.
pub fn attend_f64(cache: &LayerCache, queries: &Queries, out: &mut [f64], lse: Option<&mut [f64]>) -> Result<ReadCount> {
    let plan = Plan::new(cache, queries, out.len(), lse.as_ref().map(|l| l.len()))?;
    oracle::attend(&plan, out, lse);
    Ok(plan.count())
}

/// Where the tokens of a tile lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Sinks,
    /// Index into the sequence's pages.
    Page(usize),
    Tail,
    Fresh,
}

/// At most 64 consecutive tokens of one source, from `slot` on (0 for pages); `start` is the position of the first.
#[derive(Debug, Clone, Copy)]
struct Tile {
    source: Source,
    slot: usize,
    count: usize,
    start: usize,
}

/// A checked call.
struct Plan<'a> {
    cache: &'a LayerCache,
    queries: &'a Queries<'a>,
    batch: usize,
    /// KV heads.
    heads: usize,
    /// Query heads per KV head.
    group: usize,
    /// Queries per sequence.
    count: usize,
    key_dim: usize,
    value_dim: usize,
    views: Vec<SequenceView<'a>>,
    /// Tokens of each sequence.
    held: Vec<usize>,
    tiles: Vec<Vec<Tile>>,
}

impl<'a> Plan<'a> {
    fn new(cache: &'a LayerCache, queries: &'a Queries<'a>, out: usize, lse: Option<usize>) -> Result<Self> {
        let codec = cache.codec();
        let (batch, heads) = (cache.batch(), codec.heads);
        let (key_dim, value_dim) = (codec.key.layout.dim, codec.value.layout.dim);
        let shape = queries.q.shape();
        let [b, q_heads, count, d] = shape;
        if b != batch || d != key_dim {
            let expected = format!("[{batch}, q_heads, queries, {key_dim}]");
            return Err(Error::shape("q", expected, format!("{shape:?}")));
        }
        if q_heads == 0 || q_heads % heads != 0 {
            return Err(Error::value("q_heads", format!("a multiple of {heads} KV heads"), q_heads));
        }
        if let Some(short) = (0..batch).map(|b| cache.tokens(b)).find(|&t| t < count) {
            return Err(Error::value("queries", format!("at most {short} (the tokens held, queries included)"), count));
        }
        if let Some(starts) = queries.starts
            && starts.len() != batch
        {
            return Err(Error::shape("starts", format!("[{batch}]"), format!("[{}]", starts.len())));
        }
        if let Some((k, v)) = &queries.fresh {
            for (what, view, dim) in [("fresh k", k, key_dim), ("fresh v", v, value_dim)] {
                let expected = [batch, heads, count, dim];
                if view.shape() != expected {
                    return Err(Error::shape(what, format!("{expected:?}"), format!("{:?}", view.shape())));
                }
                view.check_finite(what, view.dtype())?;
            }
        }
        // A NaN would come out as zeros, or reach queries that may not see it.
        queries.q.check_finite("q", queries.q.dtype())?;
        if queries.window == Some(0) {
            return Err(Error::value("window", "at least 1 token", 0));
        }
        if let Some(cap) = queries.soft_cap.filter(|c| !(*c > 0.0 && c.is_finite())) {
            return Err(Error::value("soft_cap", "a positive finite number", cap));
        }
        if !queries.scale.is_finite() {
            return Err(Error::value("scale", "a finite number", queries.scale));
        }
        if out != batch * count * q_heads * value_dim {
            let expected = format!("[{batch}, {count}, {q_heads}, {value_dim}]");
            return Err(Error::shape("out", expected, format!("{out} elements")));
        }
        if let Some(got) = lse.filter(|&n| n != batch * count * q_heads) {
            return Err(Error::shape("lse", format!("[{batch}, {count}, {q_heads}]"), format!("{got} elements")));
        }
        let views: Vec<_> = (0..batch).map(|b| cache.view(b)).collect();
        let tiles = views.iter().map(|v| tiles(v, count, queries.fresh.is_some())).collect();
        let (group, held) = (q_heads / heads, views.iter().map(SequenceView::tokens).collect());
        Ok(Self { cache, queries, batch, heads, group, count, key_dim, value_dim, views, held, tiles })
    }

    /// Positions `first..end` that query `i` of sequence `b` attends; empty if `first == end`.
    fn bounds(&self, b: usize, i: usize) -> (usize, usize) {
        let end = self.held[b] - self.count + i + 1;
        let window = self.queries.window.map_or(0, |w| end.saturating_sub(w));
        let start = self.queries.starts.map_or(0, |s| s[b]);
        (start.max(window).min(end), end)
    }

    /// Where the result of query `i`, head `head` of sequence `b` goes, in rows of `value_dim`.
    fn row(&self, b: usize, i: usize, head: usize) -> usize {
        (b * self.count + i) * self.heads * self.group + head
    }

    fn count(&self) -> ReadCount {
        let mut total = ReadCount::default();
        for (b, view) in self.views.iter().enumerate() {
            let first = view.sinks.tokens;
            let mut last = first + view.packed();
            if self.queries.fresh.is_some() {
                last = last.min(view.tokens() - self.count);
            }
            for i in 0..self.count {
                let (start, end) = self.bounds(b, i);
                total.attended += (end - start) as u64;
                total.packed += end.min(last).saturating_sub(start.max(first)) as u64;
            }
        }
        total
    }
}

/// Cuts a sequence into tiles, oldest first; with `fresh`, the newest `queries` positions come from there.
fn tiles(view: &SequenceView, queries: usize, fresh: bool) -> Vec<Tile> {
    let tokens = view.tokens();
    let cached = if fresh { tokens - queries } else { tokens };
    let mut tiles: Vec<Tile> = Vec::with_capacity(view.pages.len() + 6);
    let mut at = 0;
    let mut part = |source: Source, tokens: usize, limit: usize| {
        let tokens = tokens.min(limit - limit.min(at));
        for slot in (0..tokens).step_by(PAGE_TOKENS) {
            let count = PAGE_TOKENS.min(tokens - slot);
            tiles.push(Tile { source, slot, count, start: at });
            at += count;
        }
    };
    part(Source::Sinks, view.sinks.tokens, cached);
    for (p, &(_, count)) in view.pages.iter().enumerate() {
        part(Source::Page(p), count, cached);
    }
    part(Source::Tail, view.tail.tokens, cached);
    if fresh {
        part(Source::Fresh, queries, tokens);
    }
    tiles
}
