use super::*;
use crate::codec::{self, ScaleDtype, ScaleKind};
use proptest::prelude::*;

fn near(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= tolerance, "{g} instead of {w} in {got:?}");
    }
}

/// Normal numbers by Box and Muller from a linear congruential generator: the same on every machine.
pub(crate) fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..n).map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
}

fn nmse(book: &Codebook, kind: ScaleKind, x: &[f32], block: usize) -> f64 {
    let mut error = 0.0;
    for b in x.chunks(block) {
        let fields = codec::block_fields(b, kind, ScaleDtype::Fp32);
        for &v in b {
            let code = codec::encode(book, fields, fields.inverse(), v);
            error += f64::from(fields.decode(book.levels()[usize::from(code)]) - v).powi(2);
        }
    }
    error / x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>()
}

#[test]
fn nf4_is_the_published_one_and_so_is_the_construction() {
    near(&round(&normal_quantile(4, 0.967_708_3)), &NF4, 1.2e-7);
    near(&round(&normal_quantile(4, outermost(4))), &NF4, 2e-7);
    let book = Codebook::parse("nf4").unwrap();
    assert_eq!(book.levels(), NF4);
    let x = [-2.0, -1.4, -1.0, -0.75, -0.5, -0.3, -0.1, -0.04, 0.0, 0.04, 0.12, 0.3, 0.5, 0.9, 1.3, 1.9];
    let codes = x.map(|v| book.encode(v / 2.0));
    assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10, 12, 14, 15]);
}

#[test]
fn other_normal_quantile_widths_use_their_own_offset() {
    near(Codebook::parse("nf3").unwrap().levels(), &[-1., -0.5350227, -0.2469314, 0., 0.1833375, 0.381994, 0.6229857, 1.], 1e-6);
    near(Codebook::parse("nf2").unwrap().levels(), &[-1., 0., 0.4358182, 1.], 1e-6);
}

#[test]
fn lloyd_max_matches_known_levels() {
    near(Codebook::parse("lloyd1").unwrap().levels(), &[-0.7978846, 0.7978846], 1e-6);
    near(Codebook::parse("lloyd2").unwrap().levels(), &[-1.5104176, -0.45278, 0.45278, 1.5104176], 1e-6);
    near(&Codebook::parse("lloyd3").unwrap().levels()[4..], &[0.2450942, 0.7560053, 1.3439093, 2.1519457], 1e-6);
    let upper = [0.128395, 0.3880483, 0.6567591, 0.9423405, 1.2562311, 1.6180464, 2.0690172, 2.7325896];
    near(&Codebook::parse("lloyd4").unwrap().levels()[8..], &upper, 1e-6);
}

#[test]
fn l2_fits_match_independent_sample_fits() {
    for (name, want) in [
        (
            "l2signed4-64",
            [
                -0.8639, -0.6812, -0.5394, -0.4192, -0.3119, -0.2128, -0.1190, -0.0279, 0.0626, 0.1546, 0.2504, 0.3530, 0.4662,
                0.5972, 0.7577, 0.9765,
            ],
        ),
        (
            "l2signed4-128",
            [
                -0.8451, -0.6582, -0.5176, -0.4001, -0.2967, -0.2017, -0.1119, -0.0250, 0.0612, 0.1486, 0.2402, 0.3382, 0.4471,
                0.5736, 0.7325, 0.9612,
            ],
        ),
    ] {
        near(Codebook::parse(name).unwrap().levels(), &want, 5e-3);
    }
    // The sample fits of the unsigned code are not quite symmetric, so the two halves are averaged first.
    let sample = [
        -0.9443f32, -0.7322, -0.5721, -0.4405, -0.3254, -0.2208, -0.1224, -0.0276, 0.066, 0.1604, 0.2577, 0.3602, 0.472, 0.5984,
        0.7504, 0.9519,
    ];
    let want: Vec<f32> = (0..16).map(|i| 0.5 * (sample[i] - sample[15 - i])).collect();
    near(Codebook::parse("l2absmax4-64").unwrap().levels(), &want, 1e-2);
}

#[test]
fn fitted_codes_beat_nf4_on_normal_blocks() {
    let x = normal(1 << 18, 1);
    for (block, nf4, absmax, signed) in [(64, 0.00846, 0.00763, 0.00728), (256, 0.00974, 0.00896, 0.00872)] {
        for (name, kind, want) in [
            ("nf4".to_string(), ScaleKind::Absmax, nf4),
            (format!("l2absmax4-{block}"), ScaleKind::Absmax, absmax),
            (format!("l2signed4-{block}"), ScaleKind::SignedAbsmax, signed),
        ] {
            let got = nmse(&Codebook::parse(&name).unwrap(), kind, &x, block);
            assert!((got / want - 1.0).abs() < 0.01, "{name} at block {block}: {got} instead of {want}");
        }
    }
}

#[test]
fn every_name_parses_back_and_thresholds_are_exact() {
    let mut names: Vec<String> = vec!["e2m1".into(), "nf4-bnb".into()];
    for b in 1..=8 {
        names.extend([format!("lloyd{b}"), format!("uniform{b}"), format!("l2absmax{b}-32"), format!("l2signed{b}-65536")]);
        if b > 1 {
            names.extend([format!("nf{b}"), format!("int{b}")]);
        }
    }
    for name in names {
        let book = Codebook::parse(&name).unwrap();
        assert_eq!((book.name(), book.zero_code()), (name.as_str(), book.encode(f32::NAN)));
        assert!(book.levels().len() <= 1 << book.bits() && book.levels().len() > 1 << (book.bits() - 1), "{name}");
        assert!(book.levels().windows(2).all(|w| w[0] < w[1]), "{name}");
        let page = book.to_fp16().unwrap();
        assert_eq!(page.with_bits(page.bits()).unwrap(), page);
        if name == "nf4-bnb" {
            continue;
        }
        for (w, &t) in book.levels().windows(2).zip(book.thresholds()) {
            let middle = (f64::from(w[0]) + f64::from(w[1])) / 2.0;
            assert!(f64::from(t) <= middle && f64::from(-step_down(-t)) > middle, "{name}");
        }
    }
    for bad in ["", "nf", "nf1", "nf9", "nf04", "nf4x", "l2absmax4", "l2signed4-1", "l2signed9-64", "lloyd0", "int1", "fp4", "4"]
    {
        assert!(Codebook::parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn custom_levels_are_checked() {
    for bad in [&[0.0f32][..], &[0.0, f32::NAN], &[1.0, 1.0], &[1.0, 0.0], &[0.0; 257]] {
        assert!(Codebook::custom(bad).is_err(), "{bad:?}");
    }
    let five = Codebook::custom(&[-2.0, -1.0, 0.0, 1.0, 2.0]).unwrap();
    assert_eq!((five.bits(), five.family(), five.encode(9.0), five.zero_code()), (3, Family::Custom, 4, 2));
    assert!(five.with_bits(3).is_ok() && five.with_bits(4).is_err());
    assert!(Codebook::custom(&[1.0, 1.000_000_1]).unwrap().to_fp16().is_err());
    // The exact midpoint is just below 0.5, and so is the threshold.
    assert!(Codebook::custom(&[-1e-30, 1.0]).unwrap().thresholds()[0] < 0.5);
    assert_eq!(Codebook::parse("nf4").unwrap().to_fp16().unwrap().with_bits(2).unwrap().levels()[2], 0.435_791_02);
}

proptest! {
    #[test]
    fn codes_are_nearest_and_ties_go_down(
        raw in proptest::collection::btree_set(-4000i32..4000, 2..70),
        x in proptest::collection::vec(prop_oneof![-5000f32..5000.0, (-10000i32..10000).prop_map(|h| h as f32 / 2.0)], 1..40),
    ) {
        let levels: Vec<f32> = raw.iter().map(|&v| v as f32).collect();
        let book = Codebook::custom(&levels).unwrap();
        let mut codes = vec![0; x.len()];
        book.encode_slice(&x, &mut codes);
        for (&v, &code) in x.iter().zip(&codes) {
            prop_assert_eq!(book.encode(v), code);
            let distance = |l: &f32| (f64::from(*l) - f64::from(v)).abs();
            let mut best = 0;
            for i in 1..levels.len() {
                if distance(&levels[i]) < distance(&levels[best]) { best = i; }
            }
            prop_assert_eq!(usize::from(code), best);
        }
        prop_assert_eq!((book.encode(f32::NEG_INFINITY), book.encode(f32::INFINITY)), (0, (levels.len() - 1) as u8));
    }

    #[test]
    fn encode_is_monotone(a in -2f32..2.0, b in -2f32..2.0, bits in 2u8..=8) {
        let book = Codebook::parse(&format!("nf{bits}")).unwrap();
        prop_assert!(book.encode(a.min(b)) <= book.encode(a.max(b)));
    }
}
