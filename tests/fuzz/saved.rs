//! Saved files: good ones with bits, lengths, header fields and table entries changed, checksums repaired or not.

use std::collections::BTreeMap;
use std::sync::Arc;

use nqkv_rs::attention::{Queries, attend};
use nqkv_rs::cache::LayerCache;
use nqkv_rs::file::{self, DenseTensor, Layer, LayerHeader};
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::Dtype;
use serde_json::{Value, json};

use crate::common::{Alive, Random, any_scheme, number, view};
use crate::scheme::change;

/// Small files of several schemes: two packed layers, an ordinary one, an empty one.
pub fn valid_files() -> Vec<Vec<u8>> {
    let mut random = Random(7);
    let one = |i: usize| {
        let scheme = any_scheme(&mut random);
        let alive = Alive::default();
        let layer = |dim: usize, tokens: usize| {
            let codec = Arc::new(PageCodec::new(&scheme, 1, dim, 16).unwrap());
            let mut cache = LayerCache::new(codec, Dtype::Bf16, 2);
            let x = |dim: usize| (0..2 * tokens * dim).map(|c| number(i as u64, c)).collect::<Vec<f32>>();
            let rows = cache.rows_missing(tokens);
            alive.grow(&mut cache, rows);
            cache.append(&view(&x(dim), [2, 1, tokens, dim]), &view(&x(16), [2, 1, tokens, 16])).unwrap();
            cache.crop(&[tokens - 3, tokens / 2]).unwrap();
            cache.select(&[0, 1, 0]).unwrap();
            cache
        };
        let (a, b) = (layer(16, 130 + i), layer(20, 7));
        let bytes = [0u8; 2 * 3 * 4 * 4];
        let dense = || DenseTensor { dtype: Dtype::F32, shape: vec![2, 3, 4], bytes: &bytes };
        let ordinary = Layer::Dense { state: json!({"cumulative_length": 3}), keys: dense(), values: dense() };
        let mut out = Vec::new();
        let layers = [Layer::Packed(&a), ordinary, Layer::Empty, Layer::Packed(&b)];
        file::write(&mut out, &json!({"model_type": "llama", "shape": [1, 2]}), &layers).unwrap();
        out
    };
    (0..12).map(one).collect()
}

/// The parts of a file that are changed apart.
struct Parts {
    ours: Value,
    tensors: BTreeMap<String, (String, Vec<usize>, Vec<u8>)>,
}

fn parts(bytes: &[u8]) -> Parts {
    let saved = file::open(bytes).unwrap();
    let entry = |(name, e): (String, file::Entry)| (name, (e.dtype, e.shape, bytes[e.range].to_vec()));
    Parts { ours: serde_json::to_value(&saved.header).unwrap(), tensors: saved.tensors.into_iter().map(entry).collect() }
}

/// A file of these parts whose checksums and offsets are right.
fn whole(parts: &Parts, random: &mut Random) -> Vec<u8> {
    let mut ours = parts.ours.clone();
    let mut all = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in &parts.tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend(bytes);
        all.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        if let Some(t) = ours.get_mut("tensors").and_then(|t| t.get_mut(name)).and_then(Value::as_object_mut) {
            t.insert("dtype".into(), json!(dtype));
            t.insert("shape".into(), json!(shape));
            t.insert("crc32".into(), json!(format!("{:08x}", crc32fast::hash(bytes))));
        }
    }
    let text = ours.to_string();
    let crc = format!("{:08x}", crc32fast::hash(text.as_bytes()));
    all.insert("__metadata__".into(), json!({"nqkv_rs": text, "nqkv_rs_crc32": crc}));
    let mut all = Value::Object(all);
    if random.one_in(30) {
        change(random, &mut all);
    }
    let json = all.to_string().into_bytes();
    [&(json.len() as u64).to_le_bytes()[..], &json, &data].concat()
}

/// Numbers that a table of counts and rows may hold by mistake.
fn odd_count(random: &mut Random) -> u32 {
    *random.pick(&[0, 1, 2, 3, 31, 32, 63, 64, 65, 95, 96, 127, 1 << 16, u32::MAX / 2, u32::MAX])
}

fn damaged(random: &mut Random, valid: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.pick::<Vec<u8>>(valid).clone();
    match random.below(8) {
        0 => (0..bytes.len()).for_each(|i| bytes[i] = random.next() as u8 ^ (i as u8)),
        1 => bytes.truncate(random.below(bytes.len())),
        2 => {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        3 => bytes[..8].copy_from_slice(&(random.next() >> random.below(64)).to_le_bytes()),
        4 => {
            let other = random.pick::<Vec<u8>>(valid);
            let at = random.below(bytes.len().min(other.len()));
            bytes.truncate(at);
            bytes.extend(&other[at..]);
        }
        _ => {
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            for _ in 0..1 + random.below(3) {
                let at = 8 + random.below(header - 8);
                bytes[at] = *random.pick(b"0123456789\"{}[],:abc ");
            }
        }
    }
    bytes
}

fn rewritten(random: &mut Random, valid: &[Vec<u8>]) -> Vec<u8> {
    let mut parts = parts(random.pick::<Vec<u8>>(valid));
    for _ in 0..random.below(3) {
        let names: Vec<String> = parts.tensors.keys().cloned().collect();
        let name = random.pick(&names).clone();
        let (dtype, shape, bytes) = parts.tensors.get_mut(&name).unwrap();
        match random.below(6) {
            0 if dtype == "U32" && !bytes.is_empty() => {
                let at = random.below(bytes.len() / 4) * 4;
                bytes[at..at + 4].copy_from_slice(&odd_count(random).to_le_bytes());
            }
            0 | 1 => bytes.iter_mut().for_each(|b| *b = random.next() as u8),
            2 if !shape.is_empty() && shape[0] > 0 => {
                let row = bytes.len() / shape[0];
                shape[0] -= 1;
                bytes.truncate(shape[0] * row);
            }
            3 if !shape.is_empty() && shape[0] > 0 => {
                let row = bytes.len() / shape[0];
                shape[0] += 1;
                bytes.extend(vec![1; row]);
            }
            4 => shape.reverse(),
            _ => {
                parts.tensors.remove(&name);
                if let Some(tensors) = parts.ours["tensors"].as_object_mut() {
                    tensors.remove(&name);
                }
            }
        }
    }
    if random.one_in(3) {
        let key = *random.pick::<&str>(&["layers", "schemes", "model", "layers", "schemes", "format", "page_version", "tensors"]);
        change(random, &mut parts.ours[key]);
    }
    whole(&parts, random)
}

/// One input; true if the header and the checksums were found right.
pub fn input(random: &mut Random, valid: &[Vec<u8>]) -> bool {
    let bytes = if random.one_in(4) { damaged(random, valid) } else { rewritten(random, valid) };
    let Ok(saved) = file::open(&bytes) else { return false };
    for (i, header) in saved.header.layers.iter().enumerate() {
        let (LayerHeader::Packed { .. }, Ok(pages)) = (header, saved.pages(i)) else { continue };
        let (data, keep) = Alive::default().keep(bytes[pages.range.clone()].into());
        // SAFETY: `keep` owns a copy of the pages at `data`.
        if let Ok(cache) = unsafe { saved.layer(i, &bytes, data, keep) } {
            live_with(random, cache);
        }
    }
    true
}

/// A cache that was accepted can be read, attended, cut, grown and saved, whatever its numbers are.
fn live_with(random: &mut Random, mut cache: LayerCache) {
    let codec = cache.codec();
    let (heads, kd, vd) = (codec.heads, codec.key.layout.dim, codec.value.layout.dim);
    let batch = cache.batch();
    if heads * (kd + vd) * batch > 1 << 16 {
        return;
    }
    let tokens = (0..batch).map(|b| cache.tokens(b)).min().unwrap_or(0);
    for b in 0..batch {
        let n = cache.tokens(b);
        let (mut k, mut v) = (vec![0.0; heads * n * kd], vec![0.0; heads * n * vd]);
        cache.read(b, 0, n, &mut k, &mut v).unwrap();
    }
    if tokens > 0 {
        let q = vec![0.5; batch * heads * kd];
        let args =
            Queries { q: view(&q, [batch, heads, 1, kd]), scale: 0.1, starts: None, fresh: None, window: None, soft_cap: None };
        attend(&cache, &args, &mut vec![0.0; batch * heads * vd], None).unwrap();
    }
    cache.remove_newest(random.below(tokens + 1)).unwrap();
    let alive = Alive::default();
    let more = random.below(70);
    let missing = cache.rows_missing(more);
    if missing > 0 {
        alive.grow(&mut cache, missing);
    }
    let (k, v) = (vec![0.25; batch * heads * more * kd], vec![0.5; batch * heads * more * vd]);
    // Too little memory for exact tokens is an error, too.
    if cache.append(&view(&k, [batch, heads, more, kd]), &view(&v, [batch, heads, more, vd])).is_ok() {
        let mut again = Vec::new();
        file::write(&mut again, &Value::Null, &[Layer::Packed(&cache)]).unwrap();
        file::open(&again).unwrap();
    }
}
