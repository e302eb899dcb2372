//! Writing pages: the part of an append that runs in parallel.

use crate::seal::PageCodec;
use crate::tensor::{Dtype, View};

/// One piece of one row to write: `old` tokens from the tail, then `count` input tokens from `start`, from `slot` on.
pub(super) struct SealJob {
    pub(super) row: u32,
    pub(super) slot: usize,
    pub(super) old: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) b: usize,
    pub(super) start: usize,
    pub(super) count: usize,
}

impl SealJob {
    /// Gathers the tokens as fp32 and writes them.
    pub(super) fn run(&self, codec: &PageCodec, row: &mut [u8], exact: Dtype, k: &View, v: &View) {
        let gather = |view: &View, old: Option<&Vec<u8>>, dim: usize| {
            let width = codec.heads * dim;
            let old_tokens = old.map_or(0, |o| o.len() / (width * exact.bytes()));
            let mut x = vec![0f32; (old_tokens + self.count) * width];
            let (head, rest) = x.split_at_mut(old_tokens * width);
            if let Some(old) = old {
                exact.read_f32(old, head);
            }
            let mut scratch = Vec::new();
            for (t, token) in rest.chunks_exact_mut(width).enumerate() {
                for (h, out) in token.chunks_exact_mut(dim).enumerate() {
                    view.row_f32(self.b, h, self.start + t, exact, &mut scratch, out);
                }
            }
            x
        };
        let k = gather(k, self.old.as_ref().map(|o| &o.0), codec.key.layout.dim);
        let v = gather(v, self.old.as_ref().map(|o| &o.1), codec.value.layout.dim);
        codec.write(row, self.slot, k.len() / (codec.heads * codec.key.layout.dim), &k, &v);
    }
}
