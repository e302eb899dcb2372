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

fn bytes_of(x: &[f32], dtype: Dtype) -> Vec<u8> {
    let mut bytes = vec![0; x.len() * dtype.bytes()];
    dtype.write_f32(&mut bytes, x);
    bytes
}

/// Both forms of the loops against the definition, for fp32, for fp64 and for `x` rounded to 16 bits.
fn check(x: &[f32], row: usize, spec: &FlatSpec) {
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64] {
        let x: Vec<f32> = x.iter().map(|&v| if dtype == Dtype::F16 { v.clamp(-65504.0, 65504.0) } else { v }).collect();
        let (bytes, mut x) = (bytes_of(&x, dtype), x);
        dtype.read_f32(&bytes, &mut x);
        let (want, values) = plainly(&x, row, spec);
        for simd in [false, true] {
            let (mut codes, mut fields) = (vec![0xaa; want.codes.len()], vec![0xaa; want.fields.len()]);
            quantize_with(&bytes, dtype, row, spec, &mut codes, &mut fields, simd).unwrap();
            assert_eq!(fields, want.fields, "{spec:?} row {row} {dtype:?} simd {simd}");
            assert_eq!(codes, want.codes, "{spec:?} row {row} {dtype:?} simd {simd}");
            let mut out = vec![0xaa; bytes.len()];
            dequantize_with(&codes, &fields, row, spec, dtype, &mut out, simd).unwrap();
            assert!(out == bytes_of(&values, dtype), "{spec:?} row {row} {dtype:?} simd {simd}");
        }
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
fn bad_input_is_refused() {
    let good = spec("nf4", 32, ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::LowFirst);
    let mut x = numbers(40_000, 1);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        x[33_333] = bad;
        x[39_999] = bad;
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16, Dtype::F64] {
            for simd in [false, true] {
                let (mut codes, mut fields) = (vec![1; 20_000], vec![1; 2500]);
                let x = bytes_of(&x, dtype);
                let error = quantize_with(&x, dtype, 40_000, &good, &mut codes, &mut fields, simd).unwrap_err();
                assert!(matches!(error, Error::NonFinite { index: 33_333, .. }), "{dtype:?} {simd}: {error}");
            }
        }
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
    let around_a_mean = FlatSpec { kind: ScaleKind::MeanAbsmax, ..good.clone() };
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (huge, mut codes, mut fields) = (bytes_of(&[1e38f32; 64], dtype), [0; 32], [0; 8]);
        let error = quantize_with(&huge, dtype, 64, &around_a_mean, &mut codes, &mut fields, true).unwrap_err();
        assert!(error.to_string().contains("magnitudes up to"), "{error}");
    }
    // 15 levels: code 15 stands for nothing.
    let e2m1 = FlatSpec { book: Codebook::parse("e2m1").unwrap(), ..good.clone() };
    assert!(dequantize(&[0xff; 32], &[0; 4], 64, 64, &e2m1, &mut [0.0; 64]).is_err());
    assert_eq!(quantize(&[], 0, &good), Ok(Quantized { codes: vec![], fields: vec![] }));
    assert!(dequantize(&[], &[], 0, 5, &good, &mut []).is_ok());
}

/// Every 16-bit number, in blocks with every kind of scale: tiny, huge, of either sign, around a mean.
#[test]
fn every_16_bit_number_is_coded_as_its_fp32_value() {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(|v| (v.wrapping_mul(40_503)).to_le_bytes()).collect();
        let mut x = vec![0f32; 1 << 16];
        dtype.read_f32(&all, &mut x);
        x.retain(|v| v.is_finite() && v.abs() < 3e35);
        // Blocks of one binade each, too: all thresholds among their numbers.
        let sorted = |mut x: Vec<f32>| {
            x.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
            x
        };
        for x in [x.clone(), sorted(x)] {
            for (book, kind, scale) in [
                ("nf4", ScaleKind::Absmax, ScaleDtype::Fp32),
                ("uniform4", ScaleKind::Minmax, ScaleDtype::Fp32),
                ("int4", ScaleKind::Absmax, ScaleDtype::Bf16),
                ("l2signed4-64", ScaleKind::SignedAbsmax, ScaleDtype::E4m3),
                ("lloyd3", ScaleKind::Rms, ScaleDtype::Fp16),
                ("e2m1", ScaleKind::MeanAbsmax, ScaleDtype::Bf16),
            ] {
                let order = if book == "nf4" { NibbleOrder::HighFirst } else { NibbleOrder::LowFirst };
                let spec = spec(book, 48, kind, scale, order);
                let bytes = bytes_of(&x, dtype);
                let run = |simd| {
                    let (mut codes, mut fields) = (vec![0; spec.codes_len(x.len())], vec![0; spec.fields_len(x.len(), x.len())]);
                    quantize_with(&bytes, dtype, x.len(), &spec, &mut codes, &mut fields, simd).unwrap();
                    let mut out = vec![0; bytes.len()];
                    dequantize_with(&codes, &fields, x.len(), &spec, dtype, &mut out, simd).unwrap();
                    (codes, fields, out)
                };
                assert!(run(false) == run(true), "{dtype:?} {spec:?}");
            }
        }
    }
}

#[test]
fn every_length_ends_well() {
    let x = numbers(150, 13);
    for n in 1..=150 {
        check(&x[..n], n, &spec("nf4", 64, ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::HighFirst));
        check(&x[..n], n, &spec("e2m1", 128, ScaleKind::Minmax, ScaleDtype::Bf16, NibbleOrder::LowFirst));
        check(&x[..n], n, &spec("nf3", 32, ScaleKind::SignedAbsmax, ScaleDtype::E4m3, NibbleOrder::LowFirst));
    }
}

/// Fields that no codec writes, as a foreign file may hold them.
#[test]
fn foreign_fields_are_decoded_alike() {
    let (n, foreign) = (64 * 66 + 30, [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 3.39e38, 1e-45, -0.0, -2.5]);
    for (kind, order) in [(ScaleKind::Absmax, NibbleOrder::HighFirst), (ScaleKind::Minmax, NibbleOrder::LowFirst)] {
        let spec = spec("nf4", 64, kind, ScaleDtype::Fp32, order);
        let mut q = quantize(&numbers(n, 21), n, &spec).unwrap();
        for (i, field) in foreign.iter().enumerate() {
            // Scales and zero points of far and near blocks, and of the last, short one.
            for at in [7 * i, q.fields.len() / 4 - 1 - i % 2] {
                q.fields[4 * at..][..4].copy_from_slice(&field.to_le_bytes());
                for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
                    let (mut fast, mut plain) = (vec![0; n * dtype.bytes()], vec![0; n * dtype.bytes()]);
                    dequantize_with(&q.codes, &q.fields, n, &spec, dtype, &mut fast, true).unwrap();
                    dequantize_with(&q.codes, &q.fields, n, &spec, dtype, &mut plain, false).unwrap();
                    let values = fast.chunks_exact(dtype.bytes()).zip(plain.chunks_exact(dtype.bytes()));
                    for (i, (a, b)) in values.enumerate() {
                        let (x, y) = (dtype.read(a), dtype.read(b));
                        assert!(a == b || x.is_nan() && y.is_nan(), "{dtype:?} {field} {i}: {x} {y}");
                    }
                }
            }
        }
    }
}

/// Large outputs are written past the caches.
#[test]
fn streamed_numbers_are_the_same() {
    let n = 24 << 20;
    let spec = spec("nf4", 64, ScaleKind::Absmax, ScaleDtype::Fp16, NibbleOrder::LowFirst);
    let x = numbers(n / 64, 5).repeat(64);
    let q = quantize(&x, n, &spec).unwrap();
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let n = n * 2 / dtype.bytes();
        let q = Quantized { codes: q.codes[..n / 2].to_vec(), fields: q.fields[..n / 32].to_vec() };
        let size = n * dtype.bytes();
        // On and off a multiple of 32.
        let (mut even, mut odd, mut plain) = (vec![0; size], vec![0; size + 2], vec![0; size]);
        dequantize_with(&q.codes, &q.fields, n, &spec, dtype, &mut even, true).unwrap();
        dequantize_with(&q.codes, &q.fields, n, &spec, dtype, &mut odd[2..], true).unwrap();
        dequantize_with(&q.codes, &q.fields, n, &spec, dtype, &mut plain, false).unwrap();
        assert!(even == plain && odd[2..] == plain, "{dtype:?}");
    }
}

proptest! {
    #[test]
    fn both_forms_agree_on_any_finite_numbers(
        x in proptest::collection::vec(prop_oneof![any::<u32>().prop_map(f32::from_bits), -3f32..3.0], 1..300),
        kind in 0..5usize, dtype in 0..4usize, block in 2..9usize, book in 0..6usize,
    ) {
        let x: Vec<f32> = x.into_iter().map(|v| if v.is_finite() && v.abs() < 1e35 { v } else { 0.0 }).collect();
        let book = ["nf4", "uniform4", "int3", "lloyd4", "nf2", "e2m1"][book];
        check(&x, x.len(), &spec(book, 8 * block, KINDS[kind], DTYPES[dtype], NibbleOrder::LowFirst));
    }
}
