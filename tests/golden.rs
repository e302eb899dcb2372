//! Page bytes against the golden vectors of a second, plain implementation (tests/plain.py), without Python.

use std::path::Path;

use nqkv_rs::page::PAGE_VERSION;
use nqkv_rs::scheme::Scheme;
use nqkv_rs::seal::PageCodec;
use serde_json::Value;

fn file(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn fnv1a(data: &[u8]) -> String {
    let hash = data.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

/// splitmix64 of `seed * 2^32 + index`.
fn mix(seed: u64, index: u64) -> u64 {
    let mut x = ((seed << 32).wrapping_add(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `[tokens][channels]`: sums of hash pieces with a gain and an offset per channel, and blocks of zeros and constants.
fn keys_like(tokens: usize, channels: usize, seed: u64) -> Vec<f32> {
    let element = |t: usize, c: usize| {
        if c == 3 || c == 4 {
            return if c == 3 { 0.0 } else { 1.25 };
        }
        if t == 5 {
            return 0.0;
        }
        let x = mix(seed, (t * channels + c) as u64);
        let sum: i64 = (0..4).map(|i| (x >> (16 * i) & 0xffff) as i64).sum();
        let channel = mix(seed + 1, c as u64);
        let gain = 2f32.powi((channel % 4) as i32 - 2);
        let offset = ((channel >> 8) % 17) as f32 / 4.0 - 2.0;
        // Exact in fp32: 22 significant bits at most.
        (sum - 131_070) as f32 / 32768.0 * gain + offset
    };
    (0..tokens).flat_map(|t| (0..channels).map(move |c| element(t, c))).collect()
}

#[test]
fn pages_are_those_of_the_plain_implementation() {
    assert_eq!(PAGE_VERSION, 1, "another version needs vectors of its own");
    let cases: Value = serde_json::from_slice(&file("pages.json")).unwrap();
    let pages = file("pages.bin");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 60);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let number = |key: &str| case[key].as_u64().unwrap_or_else(|| panic!("{name}: {key}")) as usize;
        let (heads, kd, vd, tokens) = (number("heads"), number("key_dim"), number("value_dim"), number("tokens"));
        let scheme = Scheme::from_json(&case["scheme"].to_string()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let codec = PageCodec::new(&scheme, heads, kd, vd).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(codec.row_bytes(), number("row_bytes"), "{name}");
        let seed = number("seed") as u64;
        let (k, v) = (keys_like(tokens, heads * kd, seed), keys_like(tokens, heads * vd, seed + 1000));
        let mut row = vec![0; codec.row_bytes()];
        codec.write(&mut row, 0, tokens, &k, &v);
        if let Some(at) = case.get("page_at") {
            let want = &pages[at.as_u64().unwrap() as usize..][..row.len()];
            if let Some(i) = row.iter().zip(want).position(|(a, b)| a != b) {
                panic!("{name}: byte {i} is {:#04x}, expected {:#04x}", row[i], want[i]);
            }
        }
        assert_eq!(fnv1a(&row), case["row"].as_str().unwrap(), "{name}: page bytes");
        let mut decoded = Vec::new();
        for (side, dim) in [(&codec.key, kd), (&codec.value, vd)] {
            let mut out = vec![0f32; dim];
            for n in 0..tokens {
                for h in 0..heads {
                    let halves = codec.halves(&row, h);
                    side.read(if std::ptr::eq(side, &codec.key) { halves.0 } else { halves.1 }, h, n, &mut out);
                    out.iter().for_each(|x| decoded.extend(x.to_le_bytes()));
                }
            }
        }
        assert_eq!(fnv1a(&decoded), case["decoded"].as_str().unwrap(), "{name}: decoded numbers");
    }
}
