//! A packed cache as one safetensors file, made to be mapped into memory: pages are read where they lie.
//!
//! ```text
//! u64 length | JSON header, padded with spaces so that data starts at a multiple of 128 | data, no gaps
//!
//! metadata   nqkv_rs         this module's header, as JSON ([`Header`]): format and page version, model, schemes, layers,
//!                            and type, shape and CRC-32 of every tensor
//!            nqkv_rs_crc32   CRC-32 of that text
//! tensors    of a packed layer i; every shape and type follows from the header and is checked
//!            layers.i.pages            uint8  [rows, kv_heads, page bytes]      the bytes that page.rs draws
//!            layers.i.lengths          uint32 [batch, 3]                        sink tokens, pages, tail tokens
//!            layers.i.table            uint32 [pages of all sequences, 2]       row, valid count
//!            layers.i.{sinks,tail}_{k,v}      [tokens of all sequences, kv_heads, dim], in the exact dtype
//!            of an ordinary layer i: layers.i.keys, layers.i.values, as they were
//! ```
//!
//! Rows that sequences share stand in the file once. Everything is little endian.

mod write;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as TensorDtype, Metadata, SafeTensorError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::write::{DenseTensor, Layer, write};
use crate::cache::{Keep, LayerCache, PageEntry, Stored};
use crate::error::{Error, Result};
use crate::page::PAGE_VERSION;
use crate::scheme::Scheme;
use crate::seal::PageCodec;
use crate::tensor::Dtype;

/// Version of the header. A reader refuses newer ones.
pub const FORMAT: u32 = 1;
const KEY: &str = "nqkv_rs";
const CHECKSUM_KEY: &str = "nqkv_rs_crc32";

/// What the file says about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT`].
    pub format: u32,
    /// [`PAGE_VERSION`].
    pub page_version: u32,
    /// What the writer says of the model; compared by whoever loads.
    pub model: Value,
    /// Schemes that packed layers name by index.
    pub schemes: Vec<Scheme>,
    /// Every layer.
    pub layers: Vec<LayerHeader>,
    /// Every tensor: safetensors' own header has no checksum.
    pub tensors: BTreeMap<String, TensorHeader>,
}

/// One tensor of a [`Header`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorHeader {
    /// Element type, in safetensors' words.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// CRC-32 of its bytes, in hexadecimal.
    pub crc32: String,
}

/// One layer of a [`Header`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum LayerHeader {
    /// Pages.
    Packed {
        /// Index into the header's schemes.
        scheme: usize,
        /// KV heads.
        kv_heads: usize,
        /// Head size of keys.
        key_dim: usize,
        /// Head size of values.
        value_dim: usize,
        /// Element type of exact tokens.
        exact_dtype: Dtype,
        /// Sequences.
        batch: usize,
    },
    /// An ordinary layer: keys and values as they came.
    Dense {
        /// What else its class needs.
        state: Value,
    },
    /// Nothing was ever written to it.
    Empty {},
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Element type, in safetensors' words.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// A file whose header and checksums were found right. Shapes of a layer's tensors are checked when it is restored.
#[derive(Debug, Clone)]
pub struct SavedCache {
    /// The header.
    pub header: Header,
    /// Its tensors by name.
    pub tensors: BTreeMap<String, Entry>,
}

/// CRC-32 as the header spells it.
fn checksum_words(crc: u32) -> String {
    format!("{crc:08x}")
}

/// Reads the header of a whole file, and every byte once to compare checksums.
pub fn open(bytes: &[u8]) -> Result<SavedCache> {
    let (header_bytes, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| broken(bytes, &e))?;
    let words = metadata.metadata().as_ref();
    let Some(text) = words.and_then(|m| m.get(KEY)) else {
        return Err(Error::file(format!("expected a file that nqkv_rs saved, got a safetensors file without {KEY:?} metadata")));
    };
    let stated = words.and_then(|m| m.get(CHECKSUM_KEY)).map_or("", String::as_str);
    if checksum_words(crc32fast::hash(text.as_bytes())) != stated {
        return Err(Error::file("damaged: the header does not match its checksum"));
    }
    let header = parse_header(text)?;
    let tensors = entries(&metadata, 8 + header_bytes);
    let named = header.tensors.iter().map(|(name, t)| (name, &t.dtype, &t.shape));
    if !named.eq(tensors.iter().map(|(name, t)| (name, &t.dtype, &t.shape))) {
        return Err(Error::file("damaged: the tensors are not those that the header names"));
    }
    let wrong = tensors.par_iter().find_map_first(|(name, entry)| {
        let got = checksum_words(crc32fast::hash(&bytes[entry.range.clone()]));
        (got != header.tensors[name].crc32).then_some(name)
    });
    if let Some(name) = wrong {
        return Err(Error::file(format!("damaged: {name} does not match its checksum")));
    }
    Ok(SavedCache { header, tensors })
}

/// Words for what safetensors found wrong.
fn broken(bytes: &[u8], error: &SafeTensorError) -> Error {
    let length = bytes.get(..8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
    match (error, length) {
        (_, None) => Error::file(format!("truncated: expected at least 8 bytes, got {}", bytes.len())),
        (SafeTensorError::InvalidHeaderLength, Some(n)) => {
            Error::file(format!("truncated: expected a header of {n} bytes, got a file of {}", bytes.len()))
        }
        (SafeTensorError::MetadataIncompleteBuffer, Some(n)) => {
            let header = bytes.get(8..8 + n as usize).and_then(|b| serde_json::from_slice::<Metadata>(b).ok());
            let ends = header.iter().flat_map(Metadata::tensors).map(|(_, t)| t.data_offsets.1);
            let (expected, got) = (8 + n as usize + ends.max().unwrap_or(0), bytes.len());
            let what = if got < expected { "truncated" } else { "something was appended" };
            Error::file(format!("{what}: expected {expected} bytes, got {got}"))
        }
        _ => Error::file(format!("expected a safetensors file, got something else ({error})")),
    }
}

fn parse_header(text: &str) -> Result<Header> {
    let loose: Value = serde_json::from_str(text).map_err(|e| Error::file(format!("header: expected JSON, got {e}")))?;
    for (what, ours) in [("format", FORMAT), ("page_version", PAGE_VERSION)] {
        let theirs = loose.get(what).and_then(Value::as_u64).unwrap_or(0);
        if theirs != u64::from(ours) {
            let hint = if theirs > u64::from(ours) { ": written by a newer nqkv_rs, update to read it" } else { "" };
            return Err(Error::file(format!("expected {what} {ours}, got {theirs}{hint}")));
        }
    }
    let header: Header = serde_json::from_value(loose).map_err(|e| Error::file(format!("header: {e}")))?;
    for scheme in &header.schemes {
        scheme.check().map_err(|e| Error::file(format!("header: {e}")))?;
    }
    Ok(header)
}

fn entries(metadata: &Metadata, start: usize) -> BTreeMap<String, Entry> {
    let entry = |name: String, info: &safetensors::tensor::TensorInfo| {
        let (from, to) = info.data_offsets;
        (name, Entry { dtype: info.dtype.to_string(), shape: info.shape.clone(), range: start + from..start + to })
    };
    metadata.tensors().into_iter().map(|(name, info)| entry(name, info)).collect()
}

/// The name of an element type in the file.
fn tensor_dtype(dtype: Dtype) -> TensorDtype {
    match dtype {
        Dtype::F64 => TensorDtype::F64,
        Dtype::F32 => TensorDtype::F32,
        Dtype::F16 => TensorDtype::F16,
        Dtype::Bf16 => TensorDtype::BF16,
    }
}

/// Name of a tensor of layer `i`.
fn tensor_name(i: usize, what: &str) -> String {
    format!("layers.{i}.{what}")
}

fn uint32s(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
}

impl SavedCache {
    /// The tensor `what` of layer `i`, if it has this type and shape (`None`: any length).
    fn tensor(&self, i: usize, what: &str, dtype: TensorDtype, shape: &[Option<usize>]) -> Result<&Entry> {
        let name = tensor_name(i, what);
        let dims: Vec<String> = shape.iter().map(|d| d.map_or("any".to_owned(), |d| d.to_string())).collect();
        let expected = format!("{dtype} of shape [{}]", dims.join(", "));
        let Some(entry) = self.tensors.get(&name) else {
            return Err(Error::file(format!("{name}: expected {expected}, got no such tensor")));
        };
        let fits = entry.shape.len() == shape.len() && entry.shape.iter().zip(shape).all(|(&g, e)| e.is_none_or(|e| e == g));
        if !fits || entry.dtype != dtype.to_string() {
            return Err(Error::file(format!("{name}: expected {expected}, got {} of shape {:?}", entry.dtype, entry.shape)));
        }
        Ok(entry)
    }

    /// Codec of packed layer `i`, and its batch and exact element type.
    pub fn codec(&self, i: usize) -> Result<(PageCodec, Dtype, usize)> {
        let header = self.header.layers.get(i);
        let Some(&LayerHeader::Packed { scheme, kv_heads, key_dim, value_dim, exact_dtype, batch }) = header else {
            return Err(Error::file(format!("expected layer {i} to be packed, got {header:?}")));
        };
        let Some(scheme) = self.header.schemes.get(scheme) else {
            return Err(Error::file(format!("layer {i}: expected a scheme below {}, got {scheme}", self.header.schemes.len())));
        };
        let codec = PageCodec::new(scheme, kv_heads, key_dim, value_dim);
        let codec = codec.map_err(|e| Error::file(format!("layer {i}: {e}")))?;
        if scheme.exact_dtype.is_some_and(|d| d != exact_dtype) {
            return Err(Error::file(format!("layer {i}: expected the scheme's exact_dtype, got {}", exact_dtype.name())));
        }
        Ok((codec, exact_dtype, batch))
    }

    /// Rows of packed layer `i`: the tensor that holds them.
    pub fn pages(&self, i: usize) -> Result<&Entry> {
        let (codec, ..) = self.codec(i)?;
        self.tensor(i, "pages", TensorDtype::U8, &[None, Some(codec.heads), Some(codec.layout.page_bytes())])
    }

    /// Packed layer `i`. `bytes` is the file; `data` is its pages' memory, which the cache may write to (map a file
    /// privately). Sequences that shared rows share them again.
    ///
    /// # Safety
    /// `data` points to as many writable bytes as [`SavedCache::pages`] has, and they and `keep` are as for
    /// [`LayerCache::add_rows`].
    pub unsafe fn layer(&self, i: usize, bytes: &[u8], data: *mut u8, keep: Keep) -> Result<LayerCache> {
        let (codec, exact, batch) = self.codec(i)?;
        let rows = self.pages(i)?.shape[0];
        let lengths = self.tensor(i, "lengths", TensorDtype::U32, &[Some(batch), Some(3)])?;
        let lengths = uint32s(&bytes[lengths.range.clone()]);
        let total = |at: usize| lengths.iter().skip(at).step_by(3).map(|&n| n as usize).sum::<usize>();
        let table = self.tensor(i, "table", TensorDtype::U32, &[Some(total(1)), Some(2)])?;
        let mut table = uint32s(&bytes[table.range.clone()])
            .chunks_exact(2)
            .map(|e| PageEntry { row: e[0], count: e[1] })
            .collect::<Vec<_>>()
            .into_iter();
        let (kd, vd) = (codec.key.layout.dim, codec.value.layout.dim);
        let mut exact_bytes = Vec::new();
        for (what, tokens, dim) in [("sinks_k", 0, kd), ("sinks_v", 0, vd), ("tail_k", 2, kd), ("tail_v", 2, vd)] {
            let shape = [Some(total(tokens)), Some(codec.heads), Some(dim)];
            let entry = self.tensor(i, what, tensor_dtype(exact), &shape)?;
            exact_bytes.push(&bytes[entry.range.clone()]);
        }
        let token = [kd, vd].map(|dim| codec.heads * dim * exact.bytes());
        let mut next = |part: usize, tokens: u32| {
            let (head, rest) = exact_bytes[part].split_at(tokens as usize * token[part % 2]);
            exact_bytes[part] = rest;
            head.to_vec()
        };
        let sequences: Vec<Stored> = lengths
            .chunks_exact(3)
            .map(|n| Stored {
                sinks: [next(0, n[0]), next(1, n[0])],
                pages: table.by_ref().take(n[1] as usize).collect(),
                tail: [next(2, n[2]), next(3, n[2])],
            })
            .collect();
        // SAFETY: the caller's promise.
        let cache = unsafe { LayerCache::restore(Arc::new(codec), exact, data, rows, keep, &sequences) };
        cache.map_err(|e| Error::file(format!("layer {i}: {e}")))
    }
}
