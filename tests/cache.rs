//! The cache of one layer against a dense model of what it must hold: exact tokens as they came, page tokens as they were
//! first read after sealing.

mod common;

use std::sync::Arc;

use common::{Alive, number, view};
use nqkv_rs::cache::LayerCache;
use nqkv_rs::error::Error;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use nqkv_rs::tensor::Dtype;
use proptest::prelude::*;

/// A page table and the bytes of its pages.
type Pages = (Vec<(u32, u32)>, Vec<Vec<u8>>);
/// Free rows, pages and tokens of every sequence.
type State = (usize, Vec<Pages>, Vec<Vec<(Vec<f32>, Vec<f32>)>>);

const HEADS: usize = 2;
const KEY_DIM: usize = 20;
const VALUE_DIM: usize = 16;

fn scheme(name: &str, window: usize) -> Scheme {
    let mut scheme = Scheme::preset(name).unwrap();
    if scheme.residual_length > 0 {
        scheme.residual_length = window;
    }
    scheme
}

fn new_cache(scheme: &Scheme, batch: usize) -> LayerCache {
    let codec = PageCodec::new(scheme, HEADS, KEY_DIM, VALUE_DIM).unwrap();
    LayerCache::new(Arc::new(codec), Dtype::F32, batch)
}

/// `[batch][heads][tokens][dim]` of the tokens `ids[b]`; values use other channels of the same ids than keys.
fn tensor(ids: &[Vec<u64>], dim: usize, first_channel: usize) -> Vec<f32> {
    let mut x = Vec::new();
    for tokens in ids {
        for h in 0..HEADS {
            for &id in tokens {
                x.extend((0..dim).map(|c| number(id, first_channel + h * dim + c)));
            }
        }
    }
    x
}

/// A cache and what its memory is counted by.
struct Owned {
    cache: LayerCache,
    alive: Alive,
}

impl Owned {
    fn new(scheme: &Scheme, batch: usize) -> Self {
        Self { cache: new_cache(scheme, batch), alive: Alive::default() }
    }

    fn append(&mut self, ids: &[Vec<u64>]) {
        let tokens = ids[0].len();
        let missing = self.cache.rows_missing(tokens);
        if missing > 0 {
            self.alive.grow(&mut self.cache, missing);
        }
        let (k, v) = (tensor(ids, KEY_DIM, 0), tensor(ids, VALUE_DIM, 1000));
        let shape = |dim| [ids.len(), HEADS, tokens, dim];
        self.cache.append(&view(&k, shape(KEY_DIM)), &view(&v, shape(VALUE_DIM))).unwrap();
    }

    /// Keys and values of every token of sequence `b`, heads concatenated.
    fn read(&self, b: usize) -> Vec<(Vec<f32>, Vec<f32>)> {
        let tokens = self.cache.tokens(b);
        let (mut k, mut v) = (vec![0.0; HEADS * tokens * KEY_DIM], vec![0.0; HEADS * tokens * VALUE_DIM]);
        self.cache.read(b, 0, tokens, &mut k, &mut v).unwrap();
        let token = |x: &[f32], dim: usize, t: usize| {
            (0..HEADS).flat_map(|h| x[(h * tokens + t) * dim..][..dim].to_vec()).collect::<Vec<f32>>()
        };
        (0..tokens).map(|t| (token(&k, KEY_DIM, t), token(&v, VALUE_DIM, t))).collect()
    }

    /// Everything that can be seen from outside.
    fn state(&self) -> State {
        let sequences = 0..self.cache.batch();
        let pages = sequences.clone().map(|b| {
            let table = self.cache.table(b).iter().map(|e| (e.row, e.count)).collect();
            (table, self.cache.view(b).pages.iter().map(|p| p.0.to_vec()).collect())
        });
        (self.cache.free_rows(), pages.collect(), sequences.map(|b| self.read(b)).collect())
    }
}

/// One token of the dense model: who it is, and what its page gave when it was first read.
#[derive(Clone)]
struct Token {
    id: u64,
    sealed: Option<(Vec<f32>, Vec<f32>)>,
}

fn check(real: &Owned, model: &mut [Vec<Token>]) -> std::result::Result<(), TestCaseError> {
    prop_assert_eq!(real.cache.batch(), model.len());
    let sinks = real.cache.codec().scheme.sink_tokens;
    for (b, tokens) in model.iter_mut().enumerate() {
        let got = real.read(b);
        prop_assert_eq!(got.len(), tokens.len());
        let view = real.cache.view(b);
        prop_assert_eq!(view.sinks.tokens, sinks.min(tokens.len()));
        let pages = view.sinks.tokens..view.sinks.tokens + view.packed();
        for (t, (token, got)) in tokens.iter_mut().zip(got).enumerate() {
            let original = (
                (0..HEADS * KEY_DIM).map(|c| number(token.id, c)).collect::<Vec<_>>(),
                (0..HEADS * VALUE_DIM).map(|c| number(token.id, 1000 + c)).collect::<Vec<_>>(),
            );
            if !pages.contains(&t) {
                prop_assert!(token.sealed.is_none(), "token {t} left its page");
                prop_assert!(got == original, "exact token {} of sequence {} changed", t, b);
            } else if let Some(sealed) = &token.sealed {
                prop_assert!(&got == sealed, "page token {} of sequence {} drifted", t, b);
            } else {
                for (x, y) in [(&got.0, &original.0), (&got.1, &original.1)] {
                    let energy: f32 = y.iter().map(|y| y * y).sum();
                    let error: f32 = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum();
                    prop_assert!(error < 0.35 * energy, "token {} of sequence {}: another token's numbers", t, b);
                }
                token.sealed = Some(got);
            }
        }
    }
    let mut held: Vec<u32> = (0..model.len()).flat_map(|b| real.cache.table(b).into_iter().map(|e| e.row)).collect();
    held.sort_unstable();
    held.dedup();
    prop_assert_eq!(real.cache.rows() - real.cache.free_rows(), held.len());
    Ok(())
}

#[derive(Debug, Clone)]
enum Step {
    Append(usize),
    Remove(prop::sample::Index),
    Select(Vec<prop::sample::Index>),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop_oneof![Just(1usize), Just(4), Just(63), Just(64), 1usize..140].prop_map(Step::Append),
        3 => any::<prop::sample::Index>().prop_map(Step::Remove),
        2 => proptest::collection::vec(any::<prop::sample::Index>(), 1..4).prop_map(Step::Select),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_calls_holds_what_the_dense_model_holds(
        name in prop::sample::select(vec!["nqkv4", "nqkv", "kivi4", "nqkv4-signed"]),
        window in prop::sample::select(vec![1usize, 16, 32]),
        batch in 1usize..3,
        steps in proptest::collection::vec(step(), 1..20),
    ) {
        let mut real = Owned::new(&scheme(name, window), batch);
        let mut model: Vec<Vec<Token>> = vec![Vec::new(); batch];
        let mut next = 1u64;
        for step in steps {
            match step {
                Step::Append(n) => {
                    let ids: Vec<Vec<u64>> = model.iter().map(|_| { next += n as u64; (next - n as u64..next).collect() }).collect();
                    real.append(&ids);
                    for (tokens, ids) in model.iter_mut().zip(ids) {
                        tokens.extend(ids.into_iter().map(|id| Token { id, sealed: None }));
                    }
                }
                Step::Remove(index) => {
                    let n = index.index(model[0].len().min(150) + 1);
                    real.cache.remove_newest(n).unwrap();
                    model.iter_mut().for_each(|tokens| tokens.truncate(tokens.len() - n));
                }
                Step::Select(indices) => {
                    let chosen: Vec<usize> = indices.iter().map(|i| i.index(model.len())).collect();
                    real.cache.select(&chosen).unwrap();
                    model = chosen.iter().map(|&i| model[i].clone()).collect();
                }
                Step::Reset => {
                    real.cache.reset();
                    model.iter_mut().for_each(Vec::clear);
                }
            }
            check(&real, &mut model)?;
        }
    }

    #[test]
    fn any_cut_of_an_append_gives_the_same_bytes(
        name in prop::sample::select(vec!["nqkv4", "nqkv", "kivi2"]),
        window in prop::sample::select(vec![1usize, 16, 32]),
        cuts in proptest::collection::vec(1usize..100, 1..8),
    ) {
        let scheme = scheme(name, window);
        let (mut bulk, mut cut, mut single) = (Owned::new(&scheme, 1), Owned::new(&scheme, 1), Owned::new(&scheme, 1));
        let total: usize = cuts.iter().sum();
        let ids: Vec<u64> = (0..total as u64).collect();
        bulk.append(std::slice::from_ref(&ids));
        let mut at = 0;
        for n in cuts {
            cut.append(&[ids[at..at + n].to_vec()]);
            at += n;
        }
        ids.iter().for_each(|&id| single.append(&[vec![id]]));
        prop_assert!(bulk.state() == cut.state());
        prop_assert!(bulk.state() == single.state());
        // No row more than what stands in pages.
        prop_assert_eq!(bulk.cache.free_rows(), 0);
        prop_assert!(bulk.cache.rows() * 64 - bulk.cache.packed(0) < 64);
    }
}

#[test]
fn failed_calls_leave_the_cache_as_it_was() {
    for name in ["nqkv4", "nqkv"] {
        let mut real = Owned::new(&scheme(name, 32), 2);
        real.append(&[(0..150).collect(), (500..650).collect()]);
        real.alive.grow(&mut real.cache, 2);
        let before = real.state();
        let ids: Vec<Vec<u64>> = vec![(200..300).collect(), (700..800).collect()];
        let (k, v) = (tensor(&ids, KEY_DIM, 0), tensor(&ids, VALUE_DIM, 1000));
        let (ks, vs) = ([2, HEADS, 100, KEY_DIM], [2, HEADS, 100, VALUE_DIM]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut bad_k, mut bad_v) = (k.clone(), v.clone());
            *bad_k.last_mut().unwrap() = bad;
            bad_v[7] = bad;
            let index = bad_k.len() - 1;
            let error = real.cache.append(&view(&bad_k, ks), &view(&v, vs)).unwrap_err();
            assert!(matches!(&error, Error::NonFinite { index: i, .. } if *i == index), "{error}");
            let error = real.cache.append(&view(&k, ks), &view(&bad_v, vs)).unwrap_err();
            assert!(matches!(&error, Error::NonFinite { index: 7, .. }), "{error}");
        }
        let error = real.cache.append(&view(&k, ks), &view(&v[..2 * HEADS * 99 * VALUE_DIM], [2, HEADS, 99, VALUE_DIM]));
        assert!(matches!(error, Err(Error::Shape { .. })));
        let error = real.cache.append(&view(&k, [1, HEADS, 200, KEY_DIM]), &view(&v, [1, HEADS, 200, VALUE_DIM]));
        assert!(matches!(error, Err(Error::Shape { .. })));
        let ids: Vec<Vec<u64>> = vec![(0..400).collect(), (0..400).collect()];
        let (k, v) = (tensor(&ids, KEY_DIM, 0), tensor(&ids, VALUE_DIM, 1000));
        let error = real.cache.append(&view(&k, [2, HEADS, 400, KEY_DIM]), &view(&v, [2, HEADS, 400, VALUE_DIM]));
        assert!(matches!(error, Err(Error::Exhausted { free: 2, .. })), "{error:?}");
        assert!(real.cache.remove_newest(151).is_err() && real.cache.select(&[0, 2]).is_err());
        assert!(real.state() == before, "{name}");
    }
}

#[test]
fn a_forked_open_page_is_never_written_by_one_of_its_owners() {
    let mut real = Owned::new(&scheme("nqkv", 0), 1);
    real.append(&[(0..40).collect()]);
    let first = real.read(0);
    real.cache.select(&[0, 0]).unwrap();
    assert_eq!(real.cache.rows() - real.cache.free_rows(), 1);
    real.append(&[vec![100], vec![200]]);
    assert!(real.read(0)[..40] == first && real.read(1)[..40] == first);
    assert!(real.read(0)[40] != real.read(1)[40]);
    assert_eq!(real.cache.table(0).iter().map(|e| e.count).collect::<Vec<_>>(), [40, 1]);
    // One owner left: but its last page is its own, so the shared row stays as it is.
    real.cache.select(&[1]).unwrap();
    real.append(&[vec![201]]);
    assert_eq!(real.cache.table(0).iter().map(|e| e.count).collect::<Vec<_>>(), [40, 2]);
    assert!(real.read(0)[..40] == first);
}
