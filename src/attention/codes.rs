//! The innermost loops: levels of 4-bit codes, times what was laid out for them.
//!
//! The 16 levels are fp16 numbers, so that three bytes of their fp32 form are all there is: three byte tables of 16 entries give
//! the levels of 32 codes, and interleaving them gives fp32 vectors. Bits of a code's place in its word are `c % 2`, `n/8 % 2`,
//! `c/8 % 2` for keys and `n % 2`, `c/8 % 2`, `n/8 % 2` for values; so a vector holds the four codes of one word (low or high
//! nibbles) and of the word four further, which is the next pair of channels (keys) or tokens (values). Its other factor in a
//! fused multiply-add (queries times key scales, or softmax weights times value scales) was laid out once for the whole page: no
//! multiply by a scale per element, and lanes are added across only at the end of a page (keys) or of a run (values).

use std::arch::x86_64::*;

/// Bytes of a 4-bit slab.
pub(super) const SLAB: usize = 512;

/// Eight fp32, aligned as a register.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(32))]
pub(super) struct Lane(pub(super) [f32; 8]);

/// The three upper bytes of 16 fp32 levels, lowest first; the last byte of an fp16 number's fp32 form is zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct Book([[u8; 16]; 3]);

impl Book {
    pub(super) fn new(levels: &[f32; 16]) -> Self {
        debug_assert!(levels.iter().all(|l| l.to_bits() & 0xff == 0));
        Self([1, 2, 3].map(|byte| levels.map(|l| l.to_le_bytes()[byte])))
    }

    /// As registers.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn load(&self) -> [__m256i; 3] {
        // SAFETY: each table has 16 bytes.
        self.0.map(|t| unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(t.as_ptr().cast())) })
    }
}

/// Levels of the codes (one in each byte) of words 0 and 1 of each half, or of words 2 and 3 if `UPPER`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn levels<const UPPER: bool>(codes: __m256i, book: [__m256i; 3]) -> [__m256; 2] {
    let bytes = [_mm256_shuffle_epi8(book[0], codes), _mm256_shuffle_epi8(book[1], codes), _mm256_shuffle_epi8(book[2], codes)];
    interleave::<UPPER>(bytes)
}

/// The second half of [`levels`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn interleave<const UPPER: bool>(bytes: [__m256i; 3]) -> [__m256; 2] {
    let zero = _mm256_setzero_si256();
    let (low, high) = if UPPER {
        (_mm256_unpackhi_epi8(zero, bytes[0]), _mm256_unpackhi_epi8(bytes[1], bytes[2]))
    } else {
        (_mm256_unpacklo_epi8(zero, bytes[0]), _mm256_unpacklo_epi8(bytes[1], bytes[2]))
    };
    [_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high))]
}

/// Low and high nibbles, one in each byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(words: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(words, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask)]
}

/// Products of `C` queries with the 64 tokens of some slabs, one for each of `books`, in places. `q` is
/// `[slab][half][c%2][C]` for each of four `n / 16`. Fetches the 512 bytes per slab at `next` on the way.
///
/// # Safety
/// `codes` must have a slab for each of `books`, each `q` four lanes per slab and column.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn key_page<const C: usize>(
    codes: *const u8,
    next: *const u8,
    books: &[Book],
    q: [*const Lane; 4],
    out: &mut [[f32; 64]; 4],
) {
    for row in 0..8 {
        // SAFETY: row < 8, and the caller's bounds.
        unsafe {
            key_row::<C, false>(codes, next, books, [q[0], q[1]], row, out);
            key_row::<C, true>(codes, next, books, [q[2], q[3]], row, out);
        }
    }
}

/// The tokens `16 i + row` and `16 i + row + 8` of [`key_page`], for `i` 0 and 1, or 2 and 3 if `UPPER`.
///
/// # Safety
/// As for [`key_page`].
#[allow(clippy::needless_range_loop)] // The column also says where q lies.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn key_row<const C: usize, const UPPER: bool>(
    codes: *const u8,
    next: *const u8,
    books: &[Book],
    q: [*const Lane; 2],
    row: usize,
    out: &mut [[f32; 64]; 4],
) {
    let mut sum = [[_mm256_setzero_ps(); C]; 2];
    for (slab, book) in books.iter().enumerate() {
        let book = book.load();
        let at = SLAB * slab + 64 * row;
        if !UPPER {
            // A line of each slab in turn is a pattern that no hardware guesses. A prefetch reads nothing.
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
        }
        for half in 0..2 {
            // SAFETY: inside the slab, and inside q.
            unsafe {
                let words = _mm256_loadu_si256(codes.add(at + 32 * half).cast());
                for (odd, codes) in nibbles(words).into_iter().enumerate() {
                    let x = levels::<UPPER>(codes, book);
                    let lane = ((slab * 2 + half) * 2 + odd) * C;
                    for c in 0..C {
                        for i in 0..2 {
                            sum[i][c] = _mm256_fmadd_ps(x[i], _mm256_load_ps(q[i].add(lane + c).cast()), sum[i][c]);
                        }
                    }
                }
            }
        }
    }
    let first = 8 * row + if UPPER { 4 } else { 0 };
    for (i, sum) in sum.iter().enumerate() {
        for (s, out) in sum.iter().zip(out.iter_mut()) {
            let s = _mm_add_ps(_mm256_castps256_ps128(*s), _mm256_extractf128_ps::<1>(*s));
            let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            let to = &mut out[first + 2 * i..][..2];
            // SAFETY: two elements.
            unsafe { _mm_storel_epi64(to.as_mut_ptr().cast(), _mm_castps_si128(s)) };
        }
    }
}

/// Adds the values of a page to `acc`, `[slab][c%8][C]`. `w` is `[pair][n/16][n%8 / 4][n%2][C]`, `pairs` the pair of blocks of
/// each slab's eight neighbours `c, c + 8`. Fetches `next` on the way.
///
/// # Safety
/// `codes` must have a slab and `acc` eight C lanes for each eight `pairs`; `w` 16 lanes per pair and column.
#[allow(clippy::needless_range_loop)] // The column also says where w lies.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn value_page<const C: usize>(
    codes: *const u8,
    next: *const u8,
    pairs: &[usize],
    w: *const Lane,
    book: &Book,
    acc: *mut Lane,
) {
    let book = book.load();
    for (line, pair) in pairs.iter().enumerate() {
        // SAFETY: a line of 64 bytes and C lanes for each of `pairs`; 16 lanes of weights for each pair and column.
        unsafe {
            let w = w.add(pair * 16 * C);
            let to = acc.add(line * C);
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64 * line).cast());
            let mut sum = [[_mm256_setzero_ps(); C]; 2];
            for (c, s) in sum[0].iter_mut().enumerate() {
                *s = _mm256_load_ps(to.add(c).cast());
            }
            for half in 0..2 {
                let words = _mm256_loadu_si256(codes.add(64 * line + 32 * half).cast());
                for (odd, codes) in nibbles(words).into_iter().enumerate() {
                    let bytes = book.map(|t| _mm256_shuffle_epi8(t, codes));
                    let (x, y) = (interleave::<false>(bytes), interleave::<true>(bytes));
                    for (i, x) in [x[0], x[1], y[0], y[1]].into_iter().enumerate() {
                        for c in 0..C {
                            let at = w.add((i * 4 + half * 2 + odd) * C + c);
                            sum[i % 2][c] = _mm256_fmadd_ps(x, _mm256_load_ps(at.cast()), sum[i % 2][c]);
                        }
                    }
                }
            }
            for c in 0..C {
                _mm256_store_ps(to.add(c).cast(), _mm256_add_ps(sum[0][c], sum[1][c]));
            }
        }
    }
}
