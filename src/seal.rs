//! Numbers into pages and back: one scheme on one model shape. Sealing is the only writer of page bytes.

use std::sync::Arc;

use crate::codebook::Codebook;
use crate::codec::{Fields, ScaleDtype, ScaleKind, block_fields, encode};
use crate::error::{Error, Result};
use crate::page::{FieldAxis, PAGE_TOKENS, PageLayout, SLAB_CHANNELS, Side, SideLayout, check_head_dim};
use crate::scheme::{Axis, Scheme, SideSpec, Span};

/// Codec of one half of a page, for all heads.
#[derive(Debug, Clone)]
pub struct SideCodec {
    /// Where the bytes go.
    pub layout: SideLayout,
    /// fp16-rounded codebook of each slab; `None` for width 0.
    pub books: Vec<Option<Arc<Codebook>>>,
    /// What a block stores.
    pub kind: ScaleKind,
    /// How it is stored.
    pub scale_dtype: ScaleDtype,
    /// For each head, the channel at each stored place; empty for identity.
    order: Vec<Vec<u16>>,
    /// For each head, the block of each stored place inside the head (per-token fields).
    blocks: Vec<Vec<u16>>,
    /// Length of a per-token block and whether it spans heads.
    block: usize,
    span: Span,
    heads: usize,
}

impl SideCodec {
    fn new(side: Side, spec: &SideSpec, heads: usize, dim: usize) -> Result<Self> {
        let what = side.name();
        check_head_dim(side, dim)?;
        let book = spec.codebook.build()?.to_fp16()?;
        let stored = dim.next_multiple_of(SLAB_CHANNELS);
        let widths = spec.widths.clone().unwrap_or_else(|| vec![book.bits(); stored / SLAB_CHANNELS]);
        let head_block = |h: usize, c: usize| match spec.span {
            Span::Head => c / spec.block,
            Span::Heads => (h * dim + c.min(dim - 1)) / spec.block - h * dim / spec.block,
        };
        let blocks: Vec<Vec<u16>> = (0..heads).map(|h| (0..stored).map(|c| head_block(h, c) as u16).collect()).collect();
        let axis = match spec.axis {
            Axis::Token => FieldAxis::PerChannel { group: spec.block },
            // The same page bytes for every head: as many blocks as the head that meets most of them.
            Axis::Channel => FieldAxis::PerToken { blocks: 1 + blocks.iter().flatten().copied().max().unwrap_or(0) as usize },
        };
        let layout = SideLayout::new(side, dim, &widths, axis, spec.scale.fields(), spec.scale_dtype.bytes())?;
        let order = spec.channel_order.clone().unwrap_or_default();
        if !order.is_empty() {
            if order.len() != heads {
                return Err(Error::value(format!("{what}.channel_order"), format!("{heads} heads"), order.len()));
            }
            for head in &order {
                let mut sorted = head.clone();
                sorted.sort_unstable();
                if !sorted.iter().copied().eq(0..stored as u16) {
                    let expected = format!("a permutation of 0..{stored} for every head");
                    return Err(Error::value(format!("{what}.channel_order"), expected, format!("{head:?}")));
                }
            }
        }
        let books = widths.iter().map(|&w| match w {
            0 => Ok(None),
            w if w == book.bits() => Ok(Some(Arc::new(book.clone()))),
            w => spec.codebook.build()?.with_bits(w)?.to_fp16().map(|b| Some(Arc::new(b))),
        });
        Ok(Self {
            books: books.collect::<Result<_>>()?,
            layout,
            kind: spec.scale,
            scale_dtype: spec.scale_dtype,
            order,
            blocks,
            block: spec.block,
            span: spec.span,
            heads,
        })
    }

    /// Whether channels stand in another order than the model's.
    pub fn is_ordered(&self) -> bool {
        !self.order.is_empty()
    }

    /// The channel of head `h` that stands at stored place `c`; at or beyond the head size it is padding.
    #[inline]
    pub fn channel(&self, h: usize, c: usize) -> usize {
        if self.order.is_empty() { c } else { usize::from(self.order[h][c]) }
    }

    /// The block, inside its head, of stored place `c` (per-token fields).
    #[inline]
    pub fn block_of(&self, h: usize, c: usize) -> usize {
        usize::from(self.blocks[h][c])
    }

    /// Fields of stored place `c` of head `h` for token `n`.
    #[inline]
    pub fn fields(&self, half: &[u8], h: usize, n: usize, c: usize) -> Fields {
        let at = |f: usize| match self.layout.axis {
            FieldAxis::PerChannel { group } => self.layout.channel_field(n / group, c, f),
            FieldAxis::PerToken { .. } => self.layout.token_field(n, self.block_of(h, c), f),
        };
        let scale = self.scale_dtype.read(&half[at(0)..]);
        Fields { scale, zero: if self.layout.fields == 2 { self.scale_dtype.read(&half[at(1)..]) } else { 0.0 } }
    }

    fn write_fields(&self, half: &mut [u8], at: impl Fn(usize) -> usize, fields: Fields) {
        self.scale_dtype.write(&mut half[at(0)..], fields.scale);
        if self.layout.fields == 2 {
            self.scale_dtype.write(&mut half[at(1)..], fields.zero);
        }
    }

    /// Writes tokens `first..first + count` of all heads. `x` is `[count][heads][dim]`; per-channel fields need a whole page.
    fn write(&self, row: &mut [u8], page_bytes: usize, half_offset: usize, first: usize, count: usize, x: &[f32]) {
        let (dim, stored) = (self.layout.dim, self.layout.stored);
        debug_assert_eq!(x.len(), count * self.heads * dim);
        let half_range = |h: usize| h * page_bytes + half_offset..h * page_bytes + half_offset + self.layout.bytes;
        match self.layout.axis {
            FieldAxis::PerChannel { group } => {
                debug_assert_eq!((first, count), (0, PAGE_TOKENS));
                let mut column = [0f32; PAGE_TOKENS];
                for h in 0..self.heads {
                    let half = &mut row[half_range(h)];
                    for c in 0..stored {
                        let channel = self.channel(h, c);
                        let book = self.books[c / SLAB_CHANNELS].as_deref();
                        for g in 0..PAGE_TOKENS / group {
                            let column = &mut column[..group];
                            for (i, v) in column.iter_mut().enumerate() {
                                let token = (g * group + i) * self.heads * dim + h * dim;
                                *v = if channel < dim { x[token + channel] } else { 0.0 };
                            }
                            let fields = block_fields(column, self.kind, self.scale_dtype);
                            self.write_fields(half, |f| self.layout.channel_field(g, c, f), fields);
                            let Some(book) = book else { continue };
                            let inverse = fields.inverse();
                            for (i, &v) in column.iter().enumerate() {
                                self.layout.set_code(half, g * group + i, c, encode(book, fields, inverse, v));
                            }
                        }
                    }
                }
            }
            FieldAxis::PerToken { blocks } => {
                let mut members = Vec::with_capacity(self.block);
                for (i, token) in x.chunks_exact(self.heads * dim).enumerate() {
                    let n = first + i;
                    for h in 0..self.heads {
                        let half = &mut row[half_range(h)];
                        let mut in_head = [Fields::default(); 32];
                        for (b, slot) in in_head.iter_mut().enumerate().take(blocks) {
                            members.clear();
                            match self.span {
                                Span::Head => members.extend(
                                    (b * self.block..((b + 1) * self.block).min(stored))
                                        .map(|c| self.channel(h, c))
                                        .filter(|&c| c < dim)
                                        .map(|c| token[h * dim + c]),
                                ),
                                Span::Heads => {
                                    let whole = h * dim / self.block + b;
                                    let end = ((whole + 1) * self.block).min(token.len());
                                    members.extend_from_slice(&token[(whole * self.block).min(end)..end]);
                                }
                            }
                            *slot = block_fields(&members, self.kind, self.scale_dtype);
                            self.write_fields(half, |f| self.layout.token_field(n, b, f), *slot);
                        }
                        for c in 0..stored {
                            let Some(book) = self.books[c / SLAB_CHANNELS].as_deref() else { continue };
                            let fields = in_head[self.block_of(h, c)];
                            let channel = self.channel(h, c);
                            let v = if channel < dim { token[h * dim + channel] } else { fields.zero };
                            self.layout.set_code(half, n, c, encode(book, fields, fields.inverse(), v));
                        }
                    }
                }
            }
        }
    }

    /// Reads token `n` of head `h` from its half: one fma per element, `out` is `[dim]` in the model's channel order.
    pub fn read(&self, half: &[u8], h: usize, n: usize, out: &mut [f32]) {
        for c in 0..self.layout.stored {
            let channel = self.channel(h, c);
            if channel < self.layout.dim {
                let level = match &self.books[c / SLAB_CHANNELS] {
                    Some(book) => book.levels()[usize::from(self.layout.code(half, n, c)).min(book.levels().len() - 1)],
                    None => 0.0,
                };
                out[channel] = self.fields(half, h, n, c).decode(level);
            }
        }
    }
}

/// Codec of whole pages.
#[derive(Debug, Clone)]
pub struct PageCodec {
    /// The recipe.
    pub scheme: Scheme,
    /// KV heads of the model.
    pub heads: usize,
    /// Keys.
    pub key: SideCodec,
    /// Values.
    pub value: SideCodec,
    /// The layout of both.
    pub layout: PageLayout,
}

impl PageCodec {
    /// Fits a scheme to a model's shape.
    pub fn new(scheme: &Scheme, heads: usize, key_dim: usize, value_dim: usize) -> Result<Self> {
        scheme.check()?;
        if heads == 0 || heads > 4096 {
            return Err(Error::value("kv_heads", "1 to 4096", heads));
        }
        let key = SideCodec::new(Side::Key, &scheme.key, heads, key_dim)?;
        let value = SideCodec::new(Side::Value, &scheme.value, heads, value_dim)?;
        let layout = PageLayout { key: key.layout.clone(), value: value.layout.clone() };
        Ok(Self { scheme: scheme.clone(), heads, key, value, layout })
    }

    /// Bytes of a pool row.
    pub fn row_bytes(&self) -> usize {
        self.layout.row_bytes(self.heads)
    }

    /// Writes tokens `first..first + count` of a row: `k` is `[count][heads][key_dim]`, `v` likewise. Schemes with a block
    /// along tokens need a whole page (`first` 0, `count` 64).
    pub fn write(&self, row: &mut [u8], first: usize, count: usize, k: &[f32], v: &[f32]) {
        assert!(first + count <= PAGE_TOKENS && row.len() == self.row_bytes());
        let page = self.layout.page_bytes();
        self.key.write(row, page, 0, first, count, k);
        self.value.write(row, page, self.layout.value_offset(), first, count, v);
    }

    /// The two halves of head `h` in a row.
    pub fn halves<'a>(&self, row: &'a [u8], h: usize) -> (&'a [u8], &'a [u8]) {
        let page = self.layout.page_bytes();
        row[h * page..(h + 1) * page].split_at(self.layout.value_offset())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed;
        let mut uniform = || {
            s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (s >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..6).map(|_| uniform()).sum()).collect()
    }

    /// Reads a page back and bounds the error of each element by its block's half step.
    fn round_trip(scheme: &Scheme, heads: usize, kd: usize, vd: usize, tolerance: f32) {
        let codec = PageCodec::new(scheme, heads, kd, vd).unwrap();
        let (k, v) = (noise(64 * heads * kd, 1), noise(64 * heads * vd, 2));
        let mut row = vec![0xee; codec.row_bytes()];
        codec.write(&mut row, 0, 64, &k, &v);
        for h in 0..heads {
            let (kh, vh) = codec.halves(&row, h);
            for (side, half, x, d) in [(&codec.key, kh, &k, kd), (&codec.value, vh, &v, vd)] {
                let mut out = vec![f32::NAN; d];
                for n in 0..64 {
                    side.read(half, h, n, &mut out);
                    for (c, o) in out.iter().enumerate() {
                        let want = x[(n * heads + h) * d + c];
                        assert!((o - want).abs() < tolerance, "head {h} token {n} channel {c}: {o} for {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn pages_come_back_for_awkward_shapes() {
        for name in Scheme::presets() {
            let scheme = Scheme::preset(name).unwrap();
            let tolerance = if *name == "kivi2" { 0.9 } else { 0.4 };
            for (heads, kd, vd) in [(1, 16, 16), (3, 64, 64), (2, 80, 48), (1, 256, 256), (5, 20, 33), (8, 128, 128)] {
                round_trip(&scheme, heads, kd, vd, tolerance);
            }
        }
    }

    #[test]
    fn eight_bits_and_a_channel_order_come_back_closely() {
        let mut scheme = Scheme::preset("nqkv4").unwrap();
        scheme.key.codebook = crate::scheme::BookSpec::Name("nf8".into());
        scheme.value.codebook = crate::scheme::BookSpec::Name("nf8".into());
        scheme.key.channel_order = Some(vec![(0..32).rev().collect(), (0..32).map(|c| (c * 5 + 3) % 32).collect()]);
        round_trip(&scheme, 2, 32, 32, 0.2);
        scheme.key.widths = Some(vec![8, 6]);
        round_trip(&scheme, 2, 32, 32, 0.25);
    }

    #[test]
    fn one_token_at_a_time_gives_the_bytes_of_a_bulk_write() {
        let codec = PageCodec::new(&Scheme::preset("nqkv").unwrap(), 3, 80, 80).unwrap();
        let (k, v) = (noise(64 * 240, 3), noise(64 * 240, 4));
        let (mut bulk, mut single) = (vec![0; codec.row_bytes()], vec![0; codec.row_bytes()]);
        codec.write(&mut bulk, 0, 64, &k, &v);
        for n in 0..64 {
            codec.write(&mut single, n, 1, &k[n * 240..][..240], &v[n * 240..][..240]);
        }
        assert!(bulk == single);
    }

    #[test]
    fn a_block_over_heads_repeats_its_scale() {
        let codec = PageCodec::new(&Scheme::preset("nqkv").unwrap(), 4, 64, 64).unwrap();
        let mut k = noise(64 * 256, 5);
        k[64 * 2] = 100.0; // token 0, head 2
        let mut row = vec![0; codec.row_bytes()];
        codec.write(&mut row, 0, 64, &k, &k);
        for h in 0..4 {
            assert_eq!(codec.key.fields(codec.halves(&row, h).0, h, 0, 0).scale, 100.0);
        }
        // Head size 80 straddles: head 3 covers channels 240..320 and meets two blocks.
        let straddling = PageCodec::new(&Scheme::preset("nqkv").unwrap(), 4, 80, 80).unwrap();
        assert_eq!(straddling.key.layout.axis, FieldAxis::PerToken { blocks: 2 });
        assert_eq!((straddling.key.block_of(3, 15), straddling.key.block_of(3, 16)), (0, 1));
    }
}
