//! Writing a cache: checksums first, then every byte once, straight from where it lies.

use std::collections::BTreeMap;
use std::io::{self, Write};

use rayon::prelude::*;
use safetensors::tensor::{Dtype as TensorDtype, TensorInfo};
use serde_json::{Value, json};

use super::{CHECKSUM_KEY, FORMAT, Header, KEY, LayerHeader, TensorHeader, checksum_words, tensor_dtype, tensor_name};
use crate::cache::{LayerCache, Stored};
use crate::page::PAGE_VERSION;
use crate::scheme::Scheme;
use crate::tensor::Dtype;

/// Alignment of the data, and of pages in it.
const ALIGNMENT: usize = 128;

/// A layer to write.
#[derive(Debug)]
pub enum Layer<'a> {
    /// Pages.
    Packed(&'a LayerCache),
    /// An ordinary layer.
    Dense {
        /// What else its class needs.
        state: Value,
        /// Keys.
        keys: DenseTensor<'a>,
        /// Values.
        values: DenseTensor<'a>,
    },
    /// Nothing was ever written to it.
    Empty,
}

/// A contiguous tensor.
#[derive(Debug)]
pub struct DenseTensor<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Its elements, little endian.
    pub bytes: &'a [u8],
}

/// Bytes of a tensor: borrowed pieces, or gathered ones if they are small.
enum Bytes<'a> {
    Pieces(Vec<&'a [u8]>),
    Own(Vec<u8>),
}

struct Tensor<'a> {
    name: String,
    dtype: TensorDtype,
    shape: Vec<usize>,
    bytes: Bytes<'a>,
}

impl<'a> Tensor<'a> {
    fn pieces(&self) -> Vec<&[u8]> {
        match &self.bytes {
            Bytes::Pieces(pieces) => pieces.clone(),
            Bytes::Own(bytes) => vec![bytes],
        }
    }

    fn len(&self) -> usize {
        self.pieces().iter().map(|p| p.len()).sum()
    }

    fn header(&self) -> TensorHeader {
        let mut crc = crc32fast::Hasher::new();
        self.pieces().iter().for_each(|p| crc.update(p));
        let crc32 = checksum_words(crc.finalize());
        TensorHeader { dtype: self.dtype.to_string(), shape: self.shape.clone(), crc32 }
    }
}

/// Writes `layers` as one file; `model` is for the loader to compare. Returns the bytes written.
pub fn write(out: &mut impl Write, model: &Value, layers: &[Layer]) -> io::Result<u64> {
    let mut header = Header {
        format: FORMAT,
        page_version: PAGE_VERSION,
        model: model.clone(),
        schemes: Vec::new(),
        layers: Vec::new(),
        tensors: BTreeMap::new(),
    };
    let (mut pages, mut rest) = (Vec::new(), Vec::new());
    for (i, layer) in layers.iter().enumerate() {
        header.layers.push(match layer {
            Layer::Empty => LayerHeader::Empty {},
            Layer::Dense { state, keys, values } => {
                rest.extend([("keys", keys), ("values", values)].map(|(what, x)| Tensor {
                    name: tensor_name(i, what),
                    dtype: tensor_dtype(x.dtype),
                    shape: x.shape.clone(),
                    bytes: Bytes::Pieces(vec![x.bytes]),
                }));
                LayerHeader::Dense { state: state.clone() }
            }
            Layer::Packed(cache) => {
                packed(i, cache, &mut pages, &mut rest);
                let codec = cache.codec();
                LayerHeader::Packed {
                    scheme: scheme_index(&mut header.schemes, &codec.scheme),
                    kv_heads: codec.heads,
                    key_dim: codec.key.layout.dim,
                    value_dim: codec.value.layout.dim,
                    exact_dtype: cache.exact_dtype(),
                    batch: cache.batch(),
                }
            }
        });
    }
    // Pages first: their lengths are multiples of the alignment.
    pages.append(&mut rest);
    header.tensors = pages.par_iter().map(|t| (t.name.clone(), t.header())).collect();
    let head = head(&header, &pages)?;
    out.write_all(&head)?;
    let mut written = head.len() as u64;
    for piece in pages.iter().flat_map(Tensor::pieces) {
        out.write_all(piece)?;
        written += piece.len() as u64;
    }
    Ok(written)
}

fn scheme_index(schemes: &mut Vec<Scheme>, scheme: &Scheme) -> usize {
    schemes.iter().position(|s| s == scheme).unwrap_or_else(|| {
        schemes.push(scheme.clone());
        schemes.len() - 1
    })
}

/// Length, JSON and padding of the safetensors form.
fn head(header: &Header, tensors: &[Tensor]) -> io::Result<Vec<u8>> {
    let text = serde_json::to_string(header)?;
    let crc = checksum_words(crc32fast::hash(text.as_bytes()));
    let mut all = serde_json::Map::new();
    all.insert("__metadata__".into(), json!({ KEY: text, CHECKSUM_KEY: crc }));
    let mut at = 0;
    for t in tensors {
        let info = TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets: (at, at + t.len()) };
        at = info.data_offsets.1;
        all.insert(t.name.clone(), serde_json::to_value(info)?);
    }
    let mut json = serde_json::to_vec(&all)?;
    json.resize((8 + json.len()).next_multiple_of(ALIGNMENT) - 8, b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

fn packed<'a>(i: usize, cache: &'a LayerCache, pages: &mut Vec<Tensor<'a>>, rest: &mut Vec<Tensor<'a>>) {
    let (codec, z) = (cache.codec(), cache.exact_dtype().bytes());
    let (rows, sequences) = cache.stored();
    let shape = vec![rows.len(), codec.heads, codec.layout.page_bytes()];
    let bytes = Bytes::Pieces(rows);
    pages.push(Tensor { name: tensor_name(i, "pages"), dtype: TensorDtype::U8, shape, bytes });
    let dims = [codec.key.layout.dim, codec.value.layout.dim];
    let tokens = |s: &[Vec<u8>; 2]| s[0].len() / (codec.heads * dims[0] * z);
    let lengths = sequences.iter().flat_map(|s| [tokens(&s.sinks), s.pages.len(), tokens(&s.tail)].map(|n| n as u32));
    let table: Vec<u32> = sequences.iter().flat_map(|s| s.pages.iter().flat_map(|p| [p.row, p.count])).collect();
    let mut small = |what: &str, dtype, shape: Vec<usize>, bytes: Vec<u8>| {
        rest.push(Tensor { name: tensor_name(i, what), dtype, shape, bytes: Bytes::Own(bytes) });
    };
    let uint32s = |x: &[u32]| x.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    small("lengths", TensorDtype::U32, vec![sequences.len(), 3], uint32s(&lengths.collect::<Vec<_>>()));
    small("table", TensorDtype::U32, vec![table.len() / 2, 2], uint32s(&table));
    for name in ["sinks", "tail"] {
        for (side, letter) in ["k", "v"].iter().enumerate() {
            let part = |s: &Stored| if name == "sinks" { s.sinks[side].clone() } else { s.tail[side].clone() };
            let bytes: Vec<u8> = sequences.iter().flat_map(part).collect();
            let shape = vec![bytes.len() / (codec.heads * dims[side] * z), codec.heads, dims[side]];
            small(&format!("{name}_{letter}"), tensor_dtype(cache.exact_dtype()), shape, bytes);
        }
    }
}
