//! What a cache holds, for attention and for callers that cannot read pages.

use rayon::prelude::*;

use super::LayerCache;
use super::parts::SequenceView;
use crate::error::{Error, Result};

impl LayerCache {
    /// What attention reads of sequence `b`.
    pub fn view(&self, b: usize) -> SequenceView<'_> {
        let s = &self.sequences[b];
        SequenceView {
            sinks: &s.sinks,
            pages: s.pages.iter().map(|p| (p.row.bytes(), p.count as usize)).collect(),
            tail: &s.tail,
        }
    }

    /// Writes tokens `from..from + k_out.len() / (heads * dim)` of sequence `b` as fp32, `[heads][tokens][dim]`: for callers
    /// that cannot read pages, and for tests.
    pub fn read(&self, b: usize, from: usize, tokens: usize, k_out: &mut [f32], v_out: &mut [f32]) -> Result<()> {
        if from + tokens > self.tokens(b) {
            let got = format!("{from}..{}", from + tokens);
            return Err(Error::value("token range", format!("inside 0..{}", self.tokens(b)), got));
        }
        let view = self.view(b);
        let heads = self.codec.heads;
        let packed_end = view.sinks.tokens + view.packed();
        let starts: Vec<usize> = view
            .pages
            .iter()
            .scan(view.sinks.tokens, |at, p| {
                *at += p.1;
                Some(*at - p.1)
            })
            .collect();
        for (side, out) in [(&self.codec.key, k_out), (&self.codec.value, v_out)] {
            let dim = side.layout.dim;
            let key = std::ptr::eq(side, &self.codec.key);
            assert_eq!(out.len(), heads * tokens * dim);
            out.par_chunks_mut(tokens.max(1) * dim).enumerate().for_each(|(h, out)| {
                for (i, row) in out.chunks_exact_mut(dim).enumerate() {
                    let t = from + i;
                    if (view.sinks.tokens..packed_end).contains(&t) {
                        let page = starts.partition_point(|&s| s <= t) - 1;
                        let halves = self.codec.halves(view.pages[page].0, h);
                        side.read(if key { halves.0 } else { halves.1 }, h, t - starts[page], row);
                    } else {
                        let (part, slot) = if t < packed_end { (view.sinks, t) } else { (view.tail, t - packed_end) };
                        let bytes = if key { &part.k } else { &part.v };
                        let z = self.exact.bytes();
                        self.exact.read_f32(&bytes[(slot * heads + h) * dim * z..][..dim * z], row);
                    }
                }
            });
        }
        Ok(())
    }
}
