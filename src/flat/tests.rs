use super::*;
use crate::codec::{self, block_fields};
use proptest::prelude::*;

const KINDS: [ScaleKind; 5] =
    [ScaleKind::Absmax, ScaleKind::SignedAbsmax, ScaleKind::Minmax, ScaleKind::MeanAbsmax, ScaleKind::Rms];
const DTYPES: [ScaleDtype; 4] = [ScaleDtype::Fp32, ScaleDtype::Fp16, ScaleDtype::Bf16, ScaleDtype::E4m3];

fn spec(book: &str, block: usize, kind: ScaleKind, scale_dtype: ScaleDtype, order: NibbleOrder) -> FlatSpec {
    FlatSpec { book: Codebook::parse(book).unwrap(), block, kind, scale_dtype, order }
}

/// Numbers of every magnitude and sign, the same on every machine.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    (0..n)
        .map(|i| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let v = (state >> 40) as f32 / 8_388_608.0 - 1.0;
            if i % 97 == 5 { v * 30.0 } else { v }
        })
        .collect()
}

/// The definition: block by block with the codec, then packed in one go.
fn plainly(x: &[f32], row: usize, spec: &FlatSpec) -> (Quantized, Vec<f32>) {
    let (mut codes, mut fields, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for block in x.chunks(row).flat_map(|r| r.chunks(spec.block)) {
        let f = block_fields(block, spec.kind, spec.scale_dtype);
        for stored in [f.scale, f.zero].iter().take(spec.kind.fields()) {
            let mut bytes = [0; 4];
            spec.scale_dtype.write(&mut bytes, *stored);
            fields.extend_from_slice(&bytes[..spec.scale_dtype.bytes()]);
        }
        for &v in block {
            codes.push(codec::encode(&spec.book, f, f.inverse(), v));
            values.push(f.decode(spec.book.levels()[usize::from(codes[codes.len() - 1])]));
        }
    }
    let mut packed = vec![0; spec.codes_len(x.len())];
    match spec.order {
        NibbleOrder::LowFirst => pack::pack(&codes, spec.book.bits(), &mut packed).unwrap(),
        NibbleOrder::HighFirst => pack::pack_nibbles_high_first(&codes, &mut packed).unwrap(),
    }
    (Quantized { codes: packed, fields }, values)
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// Both forms of the loops against the definition.
fn check(x: &[f32], row: usize, spec: &FlatSpec) {
    let (want, values) = plainly(x, row, spec);
    for simd in [false, true] {
        let (mut codes, mut fields) = (vec![0xaa; want.codes.len()], vec![0xaa; want.fields.len()]);
        quantize_with(x, row, spec, &mut codes, &mut fields, simd).unwrap();
        assert_eq!(fields, want.fields, "{spec:?} row {row} simd {simd}");
        assert_eq!(codes, want.codes, "{spec:?} row {row} simd {simd}");
        let mut out = vec![f32::NAN; x.len()];
        dequantize_with(&codes, &fields, x.len(), row, spec, &mut out, simd).unwrap();
        assert_eq!(bits(&out), bits(&values), "{spec:?} row {row} simd {simd}");
    }
}

#[test]
fn every_kind_width_and_dtype_follows_the_definition() {
    let x = numbers(3 * 5 * 77, 7);
    for (i, book) in ["nf4", "l2signed4-32", "e2m1", "lloyd1", "nf2", "uniform3", "int5", "nf6", "int7", "nf8"].iter().enumerate()
    {
        for kind in KINDS {
            for dtype in DTYPES {
                check(&x, [77, 231, 1155, 5, 15][i % 5], &spec(book, [16, 64, 24][i % 3], kind, dtype, NibbleOrder::LowFirst));
            }
        }
    }
}

#[test]
fn long_and_many_rows_are_cut_without_a_seam() {
    let x = numbers(3 * 40_008, 11);
    for row in [40_008, 120_024, 8, 24, 3, 13_336, 1] {
        check(&x, row, &spec("nf4", 64, ScaleKind::SignedAbsmax, ScaleDtype::Fp16, NibbleOrder::HighFirst));
        check(&x, row, &spec("nf3", 512, ScaleKind::Minmax, ScaleDtype::Bf16, NibbleOrder::LowFirst));
    }
    check(&x[..40_007], 40_007, &spec("nf4", 48, ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::HighFirst));
    check(&x[..2 * 20_001], 20_001, &spec("nf5", 128, ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::LowFirst));
}

#[test]
fn the_format_of_bitsandbytes_follows_its_rules() {
    let x = numbers(64 * 3 + 13, 3);
    let q = quantize(&x, x.len(), &FlatSpec::bitsandbytes(64)).unwrap();
    let book = Codebook::nf4_bitsandbytes();
    for (b, block) in x.chunks(64).enumerate() {
        let top = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert_eq!(q.fields[4 * b..4 * b + 4], top.to_le_bytes());
        for (i, v) in block.iter().enumerate() {
            let want = book.encode(if block.len() == 64 { v * (1.0 / top) } else { v / top });
            let at = 64 * b + i;
            assert_eq!(q.codes[at / 2] >> (4 * (1 - at % 2)) & 15, want, "element {at}");
        }
    }
    // 205 elements: the last low nibble belongs to nobody and holds the code of 0.
    assert_eq!(q.codes[102] & 15, 7);
    assert_eq!(quantize(&x, x.len(), &spec("nf4", 64, ScaleKind::Absmax, ScaleDtype::Fp32, NibbleOrder::HighFirst)), Ok(q));
    let zeros = quantize(&[0.0; 65], 65, &FlatSpec::bitsandbytes(64)).unwrap();
    assert_eq!((zeros.codes, zeros.fields), (vec![0x77; 33], vec![0; 8]));
}

#[test]
fn bad_input_is_refused_and_nothing_is_written() {
    let good = spec("nf4", 32, ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::LowFirst);
    let mut x = numbers(40_000, 1);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x[33_333] = bad;
        x[39_999] = bad;
        let (mut codes, mut fields) = (vec![1; 20_000], vec![1; 2500]);
        let error = quantize_into(&x, 40_000, &good, &mut codes, &mut fields).unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 33_333, .. }), "{error}");
        assert!(codes.iter().chain(&fields).all(|&b| b == 1));
    }
    x.truncate(64);
    assert!(quantize(&x, 60, &good).is_err() && quantize(&x, 0, &good).is_err());
    assert!(quantize(&x, 64, &FlatSpec { block: 8, ..good.clone() }).is_err());
    assert!(quantize(&x, 64, &FlatSpec { block: 20, ..good.clone() }).is_err());
    assert!(quantize(&x, 64, &FlatSpec { block: 1024, ..good.clone() }).is_err());
    assert!(quantize(&x, 64, &spec("nf3", 32, ScaleKind::Rms, ScaleDtype::Fp16, NibbleOrder::HighFirst)).is_err());
    assert!(quantize_into(&x, 64, &good, &mut [0; 31], &mut [0; 4]).is_err());
    assert!(quantize_into(&x, 64, &good, &mut [0; 32], &mut [0; 5]).is_err());
    assert!(dequantize(&[0; 32], &[0; 4], 64, 64, &good, &mut [0.0; 63]).is_err());
    assert!(dequantize(&[0; 31], &[0; 4], 64, 64, &good, &mut [0.0; 64]).is_err());
    let huge = [1e38f32; 64];
    assert!(quantize(&huge, 64, &FlatSpec { kind: ScaleKind::MeanAbsmax, ..good.clone() }).is_err());
    // 15 levels: code 15 stands for nothing.
    let e2m1 = FlatSpec { book: Codebook::parse("e2m1").unwrap(), ..good.clone() };
    assert!(dequantize(&[0xff; 32], &[0; 4], 64, 64, &e2m1, &mut [0.0; 64]).is_err());
    assert_eq!(quantize(&[], 0, &good), Ok(Quantized { codes: vec![], fields: vec![] }));
    assert!(dequantize(&[], &[], 0, 5, &good, &mut []).is_ok());
}

proptest! {
    #[test]
    fn both_forms_agree_on_any_finite_numbers(
        x in proptest::collection::vec(prop_oneof![any::<u32>().prop_map(f32::from_bits), -3f32..3.0], 1..300),
        kind in 0..5usize, dtype in 0..4usize, block in 2..9usize,
    ) {
        let x: Vec<f32> = x.into_iter().map(|v| if v.is_finite() && v.abs() < 1e35 { v } else { 0.0 }).collect();
        check(&x, x.len(), &spec("nf4", 8 * block, KINDS[kind], DTYPES[dtype], NibbleOrder::LowFirst));
    }
}
