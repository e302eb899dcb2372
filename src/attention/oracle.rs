//! The oracle: one token after the other, everything in f64, online softmax.

use super::{Plan, Source, Tile};
use crate::parallel;
use crate::tensor::{Dtype, View};

/// Result of one query column.
struct Column {
    q: Vec<f64>,
    max: f64,
    sum: f64,
    acc: Vec<f64>,
}

pub(super) fn attend(plan: &Plan, out: &mut [f64], mut lse: Option<&mut [f64]>) {
    let pairs: Vec<(usize, usize)> = (0..plan.batch).flat_map(|b| (0..plan.heads).map(move |h| (b, h))).collect();
    let done: Vec<Vec<Column>> = parallel::map(&pairs, |&(b, h)| head(plan, b, h));
    for (&(b, h), columns) in pairs.iter().zip(&done) {
        for (c, column) in columns.iter().enumerate() {
            let row = plan.row(b, c / plan.group, h * plan.group + c % plan.group);
            let scale = if column.sum > 0.0 { 1.0 / column.sum } else { 0.0 };
            let to = &mut out[row * plan.value_dim..][..plan.value_dim];
            to.iter_mut().zip(&column.acc).for_each(|(o, a)| *o = if column.sum == 0.0 { 0.0 } else { a * scale });
            if column.sum.is_nan() {
                to.fill(f64::NAN);
            }
            if let Some(lse) = lse.as_deref_mut() {
                lse[row] = if column.sum == 0.0 { f64::NEG_INFINITY } else { column.max + column.sum.ln() };
            }
        }
    }
}

fn read_view(view: &View, b: usize, h: usize, t: usize, out: &mut [f64]) {
    let mut bytes = vec![0; out.len() * 8];
    view.copy_row(b, h, t, Dtype::F64, &mut bytes);
    out.iter_mut().zip(bytes.chunks_exact(8)).for_each(|(o, x)| *o = Dtype::F64.read(x));
}

/// Key and value of one token as f64.
fn read_token(plan: &Plan, b: usize, h: usize, tile: &Tile, i: usize, k: &mut [f64], v: &mut [f64]) {
    let (view, codec, exact) = (&plan.views[b], plan.cache.codec(), plan.cache.exact_dtype());
    match tile.source {
        Source::Page(p) => {
            let (k_half, v_half) = codec.halves(view.pages[p].0, h);
            for (side, half, out) in [(&codec.key, k_half, k), (&codec.value, v_half, v)] {
                let mut row = vec![0f32; out.len()];
                side.read(half, h, tile.slot + i, &mut row);
                out.iter_mut().zip(&row).for_each(|(o, &x)| *o = f64::from(x));
            }
        }
        Source::Sinks | Source::Tail => {
            let part = if tile.source == Source::Sinks { view.sinks } else { view.tail };
            for (bytes, out) in [(&part.k, k), (&part.v, v)] {
                let (z, d) = (exact.bytes(), out.len());
                let row = &bytes[((tile.slot + i) * plan.heads + h) * d * z..][..d * z];
                out.iter_mut().zip(row.chunks_exact(z)).for_each(|(o, x)| *o = exact.read(x));
            }
        }
        Source::Fresh => {
            let (fresh_k, fresh_v) = plan.queries.fresh.as_ref().expect("a fresh tile has fresh views");
            read_view(fresh_k, b, h, tile.slot + i, k);
            read_view(fresh_v, b, h, tile.slot + i, v);
        }
    }
}

fn head(plan: &Plan, b: usize, h: usize) -> Vec<Column> {
    let mut columns: Vec<Column> = (0..plan.count * plan.group)
        .map(|c| {
            let mut q = vec![0.0; plan.key_dim];
            read_view(&plan.queries.q, b, h * plan.group + c % plan.group, c / plan.group, &mut q);
            Column { q, max: f64::NEG_INFINITY, sum: 0.0, acc: vec![0.0; plan.value_dim] }
        })
        .collect();
    let (mut k, mut v) = (vec![0.0; plan.key_dim], vec![0.0; plan.value_dim]);
    for tile in &plan.tiles[b] {
        for i in 0..tile.count {
            read_token(plan, b, h, tile, i, &mut k, &mut v);
            for (c, column) in columns.iter_mut().enumerate() {
                let (start, end) = plan.bounds(b, c / plan.group);
                if !(start..end).contains(&(tile.start + i)) {
                    continue;
                }
                let dot: f64 = column.q.iter().zip(&k).map(|(x, y)| x * y).sum();
                let mut score = dot * plan.queries.scale;
                if let Some(cap) = plan.queries.soft_cap {
                    score = cap * (score / cap).tanh();
                }
                if score > column.max {
                    let factor = (column.max - score).exp();
                    column.sum *= factor;
                    column.acc.iter_mut().for_each(|a| *a *= factor);
                    column.max = score;
                }
                let p = (score - column.max).exp();
                column.sum += p;
                column.acc.iter_mut().zip(&v).for_each(|(a, x)| *a += p * x);
            }
        }
    }
    columns
}
