//! Codes of 1 to 8 bits to bytes and back.
//!
//! Element i occupies the bits `i * bits ..` of a little-endian stream, low bits first; so a nibble pair has its first
//! element in the low half. The nibble order of bitsandbytes, first element in the HIGH half, has its own two functions.
//! Unused bits at the end are 0.

use crate::error::{Error, Result};

/// Bytes that `n` codes of `bits` bits take.
pub fn packed_len(n: usize, bits: u8) -> usize {
    // In two parts, so that no product can overflow.
    n / 8 * usize::from(bits) + (n % 8 * usize::from(bits)).div_ceil(8)
}

fn check_bits(bits: u8) -> Result<()> {
    if (1..=8).contains(&bits) { Ok(()) } else { Err(Error::value("bits", "1 to 8", bits)) }
}

fn check_len(what: &str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::shape(what, format!("[{expected}]"), format!("[{got}]"))) }
}

fn check_codes(codes: &[u8], bits: u8) -> Result<()> {
    let top = u8::MAX >> (8 - bits);
    if codes.iter().fold(0, |m, &c| m | c) <= top {
        return Ok(());
    }
    let i = codes.iter().position(|&c| c > top).unwrap_or_default();
    Err(Error::value("codes", format!("at most {top} at {bits} bits"), format!("{} at index {i}", codes[i])))
}

/// Packs codes below 2^bits into `packed_len(codes.len(), bits)` bytes.
pub fn pack(codes: &[u8], bits: u8, out: &mut [u8]) -> Result<()> {
    check_bits(bits)?;
    check_len("packed codes", packed_len(codes.len(), bits), out.len())?;
    check_codes(codes, bits)?;
    match bits {
        8 => out.copy_from_slice(codes),
        4 => pack_nibbles(codes, out, |first, second| first | second << 4),
        1 => pack_groups::<1>(codes, out),
        2 => pack_groups::<2>(codes, out),
        3 => pack_groups::<3>(codes, out),
        5 => pack_groups::<5>(codes, out),
        6 => pack_groups::<6>(codes, out),
        _ => pack_groups::<7>(codes, out),
    }
    Ok(())
}

/// Unpacks `n` codes from `packed_len(n, bits)` bytes.
pub fn unpack(bytes: &[u8], bits: u8, n: usize, out: &mut [u8]) -> Result<()> {
    check_bits(bits)?;
    check_len("packed codes", packed_len(n, bits), bytes.len())?;
    check_len("codes", n, out.len())?;
    match bits {
        8 => out.copy_from_slice(bytes),
        4 => unpack_nibbles(bytes, out, |b| [b & 15, b >> 4]),
        1 => unpack_groups::<1>(bytes, out),
        2 => unpack_groups::<2>(bytes, out),
        3 => unpack_groups::<3>(bytes, out),
        5 => unpack_groups::<5>(bytes, out),
        6 => unpack_groups::<6>(bytes, out),
        _ => unpack_groups::<7>(bytes, out),
    }
    Ok(())
}

/// Packs 4-bit codes with the first of each pair in the high half of its byte, as bitsandbytes does.
pub fn pack_nibbles_high_first(codes: &[u8], out: &mut [u8]) -> Result<()> {
    check_len("packed codes", packed_len(codes.len(), 4), out.len())?;
    check_codes(codes, 4)?;
    pack_nibbles(codes, out, |first, second| first << 4 | second);
    Ok(())
}

/// Unpacks `n` 4-bit codes with the first of each pair in the high half of its byte.
pub fn unpack_nibbles_high_first(bytes: &[u8], n: usize, out: &mut [u8]) -> Result<()> {
    check_len("packed codes", packed_len(n, 4), bytes.len())?;
    check_len("codes", n, out.len())?;
    unpack_nibbles(bytes, out, |b| [b >> 4, b & 15]);
    Ok(())
}

/// Up to eight bytes as a little-endian word.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Packs by eights: eight codes fill `BITS` bytes exactly.
fn pack_groups<const BITS: usize>(codes: &[u8], out: &mut [u8]) {
    // One code per byte, moved together: pairs, then pairs of pairs, then halves.
    let gather = |word: u64| {
        let word = word & 0x00ff_00ff_00ff_00ff | (word >> 8 & 0x00ff_00ff_00ff_00ff) << BITS;
        let word = word & 0x0000_ffff_0000_ffff | (word >> 16 & 0x0000_ffff_0000_ffff) << (2 * BITS);
        (word & 0xffff_ffff | (word >> 32) << (4 * BITS)).to_le_bytes()
    };
    let (mut groups, mut outs) = (codes.chunks_exact(8), out.chunks_exact_mut(BITS));
    for (group, bytes) in groups.by_ref().zip(outs.by_ref()) {
        bytes.copy_from_slice(&gather(word(group))[..BITS]);
    }
    // Fewer than eight codes may still fill `BITS` bytes.
    if !groups.remainder().is_empty() {
        let last = outs.next().unwrap_or_else(|| outs.into_remainder());
        last.copy_from_slice(&gather(word(groups.remainder()))[..last.len()]);
    }
}

/// [`pack_groups`] backwards.
fn unpack_groups<const BITS: usize>(bytes: &[u8], out: &mut [u8]) {
    let scatter = |word: u64| {
        let (half, quarter, one) = (u64::MAX >> (64 - 4 * BITS), u64::MAX >> (64 - 2 * BITS), u64::MAX >> (64 - BITS));
        let word = word & half | (word >> (4 * BITS) & half) << 32;
        let quarter = quarter * 0x1_0000_0001;
        let word = word & quarter | (word >> (2 * BITS) & quarter) << 16;
        let one = one * 0x1_0001_0001_0001;
        (word & one | (word >> BITS & one) << 8).to_le_bytes()
    };
    let (mut groups, mut outs) = (bytes.chunks_exact(BITS), out.chunks_exact_mut(8));
    for (codes, group) in outs.by_ref().zip(groups.by_ref()) {
        codes.copy_from_slice(&scatter(word(group)));
    }
    let last = outs.into_remainder();
    let rest = groups.next().unwrap_or_else(|| groups.remainder());
    last.copy_from_slice(&scatter(word(rest))[..last.len()]);
}

fn pack_nibbles(codes: &[u8], out: &mut [u8], join: impl Fn(u8, u8) -> u8) {
    let pairs = codes.chunks_exact(2);
    if let (Some(&last), Some(byte)) = (pairs.remainder().first(), out.last_mut()) {
        *byte = join(last, 0);
    }
    for (pair, byte) in pairs.zip(out) {
        *byte = join(pair[0], pair[1]);
    }
}

fn unpack_nibbles(bytes: &[u8], out: &mut [u8], split: impl Fn(u8) -> [u8; 2]) {
    let mut pairs = out.chunks_exact_mut(2);
    for (pair, &byte) in pairs.by_ref().zip(bytes) {
        pair.copy_from_slice(&split(byte));
    }
    if let (Some(last), Some(&byte)) = (pairs.into_remainder().first_mut(), bytes.last()) {
        *last = split(byte)[0];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bit_order_is_fixed() {
        let mut out = [0; 3];
        pack(&[1, 2, 3, 4, 5, 6, 7, 0], 3, &mut out).unwrap();
        assert_eq!(out, [0b1101_0001, 0b0101_1000, 0b0001_1111]);
        let mut out = [0; 2];
        pack(&[1, 2, 3], 4, &mut out).unwrap();
        assert_eq!(out, [0x21, 0x03]);
        pack_nibbles_high_first(&[1, 2, 3], &mut out).unwrap();
        assert_eq!(out, [0x12, 0x30]);
        let mut codes = [0; 3];
        unpack_nibbles_high_first(&out, 3, &mut codes).unwrap();
        assert_eq!(codes, [1, 2, 3]);
    }

    #[test]
    fn lengths_widths_and_ranges_are_checked() {
        let mut out = [0; 2];
        assert!(pack(&[1, 4], 2, &mut out[..1]).unwrap_err().to_string().contains("at most 3 at 2 bits, got 4 at index 1"));
        assert!(pack(&[1, 2], 2, &mut out).is_err());
        assert!(pack(&[1], 0, &mut out).is_err() && pack(&[1, 2], 9, &mut out).is_err());
        assert!(unpack(&[0; 2], 4, 3, &mut out).is_err() && unpack(&[0; 2], 4, 5, &mut [0; 5]).is_err());
        assert!(pack_nibbles_high_first(&[16, 0], &mut out[..1]).is_err());
        assert!(unpack_nibbles_high_first(&[0], 3, &mut [0; 3]).is_err());
        assert_eq!((packed_len(9, 3), packed_len(0, 5), packed_len(usize::MAX, 8)), (4, 0, usize::MAX));
        assert!(pack(&[], 4, &mut []).is_ok() && unpack(&[], 3, 0, &mut []).is_ok());
    }

    proptest! {
        #[test]
        fn codes_come_back(bits in 1u8..=8, raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let codes: Vec<u8> = raw.iter().map(|c| c >> (8 - bits)).collect();
            let mut bytes = vec![0xff; packed_len(codes.len(), bits)];
            pack(&codes, bits, &mut bytes).unwrap();
            // Against the definition, bit by bit.
            for (i, &code) in codes.iter().enumerate() {
                for b in 0..usize::from(bits) {
                    let at = i * usize::from(bits) + b;
                    prop_assert_eq!(bytes[at / 8] >> (at % 8) & 1, code >> b & 1);
                }
            }
            let mut back = vec![0; codes.len()];
            unpack(&bytes, bits, codes.len(), &mut back).unwrap();
            prop_assert_eq!(&back, &codes);
        }

        #[test]
        fn high_first_is_low_first_with_halves_swapped(codes in proptest::collection::vec(0u8..16, 0..100)) {
            let mut low = vec![0; packed_len(codes.len(), 4)];
            let mut high = low.clone();
            pack(&codes, 4, &mut low).unwrap();
            pack_nibbles_high_first(&codes, &mut high).unwrap();
            prop_assert!(low.iter().zip(&high).all(|(l, h)| l.rotate_left(4) == *h));
            let mut back = vec![0; codes.len()];
            unpack_nibbles_high_first(&high, codes.len(), &mut back).unwrap();
            prop_assert_eq!(back, codes);
        }
    }
}
