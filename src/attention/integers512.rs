//! [`super::integers`] with AVX-512 and VNNI, to the same bits: a line of 64 bytes at a time, both halves of it in one register.
//!
//! One instruction looks up 32 levels of 16 bits ([`Levels::twice`]) by the low bits of each 16-bit word, so that a shift by a
//! nibble is all that decoding takes, and the levels of neighbouring words are what is added: channels `c, c + 8` of one token
//! (keys), tokens `n, n + 8` of one channel (values). Another multiplies and adds. What the other registers hold saves loads: keys
//! keep the words of [`FLUSH`] slabs for all tokens, values those of a page for two lines.

use std::arch::x86_64::*;
use std::sync::Arc;

use super::codes::{Lane, SLAB};
use super::integers::{FLUSH, Levels, Score, Words};

impl Levels {
    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
    fn load_wide(&self) -> __m512i {
        // SAFETY: 32 words.
        unsafe { _mm512_loadu_si512(self.twice.as_ptr().cast()) }
    }
}

/// Levels of each word's nibbles, lowest first.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
fn levels(codes: __m512i, table: __m512i) -> [__m512i; 4] {
    [
        _mm512_permutexvar_epi16(codes, table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), table),
        _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), table),
    ]
}

/// Adds the products of neighbours to a sum. In assembly because a compiler that knows the instruction splits every other one into
/// a multiplication and an addition, for a shorter wait; here the ports are what is short.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
fn multiply_add(mut sum: __m512i, levels: __m512i, words: __m512i) -> __m512i {
    // SAFETY: registers only.
    unsafe {
        std::arch::asm!("vpdpwssd {s}, {x}, {w}", s = inout(zmm_reg) sum, x = in(zmm_reg) levels, w = in(zmm_reg) words,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Adds the halves of each of two sums: those of the first, then those of the second, as fp32.
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
fn fold(sums: [__m512i; 2]) -> __m512 {
    let low = _mm512_shuffle_i64x2::<0b01_00_01_00>(sums[0], sums[1]);
    let high = _mm512_shuffle_i64x2::<0b11_10_11_10>(sums[0], sums[1]);
    _mm512_cvtepi32_ps(_mm512_add_epi32(low, high))
}

/// Adds the products of `N` slabs from `at` on to `rows`, `[n % 8][column]`, the sums for both `n / 8 % 2` side by side.
///
/// # Safety
/// As for [`key_page`].
#[inline]
#[allow(clippy::needless_range_loop)] // Columns index everything.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
unsafe fn slabs<const C: usize, const N: usize>(
    [codes, next]: [*const u8; 2],
    fields: &[u8],
    book: &[Arc<Levels>],
    q: *const Words,
    factors: &[f32],
    rows: &mut [[__m512; C]; 8],
) {
    let mut words = [[[_mm512_setzero_si512(); C]; 2]; N];
    let mut tables = [_mm512_setzero_si512(); N];
    for i in 0..N {
        tables[i] = book[i].load_wide();
        for odd in 0..2 {
            for c in 0..C {
                // SAFETY: two words per slab and column.
                words[i][odd][c] = unsafe { _mm512_load_si512(q.add((i * 2 + odd) * C + c).cast()) };
            }
        }
    }
    for (row, rows) in rows.iter_mut().enumerate() {
        if let Some(line) = fields.get(64 * row) {
            _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast());
        }
        let mut sums = [[_mm512_setzero_si512(); 2]; C];
        for i in 0..N {
            // A prefetch reads nothing.
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(SLAB * i + 64 * row).cast());
            // SAFETY: inside the slab.
            let x = levels(unsafe { _mm512_loadu_si512(codes.add(SLAB * i + 64 * row).cast()) }, tables[i]);
            for odd in 0..2 {
                for c in 0..C {
                    sums[c][0] = multiply_add(sums[c][0], x[odd], words[i][odd][c]);
                    sums[c][1] = multiply_add(sums[c][1], x[2 + odd], words[i][odd][c]);
                }
            }
        }
        for c in 0..C {
            rows[c] = _mm512_fmadd_ps(fold(sums[c]), _mm512_set1_ps(factors[c]), rows[c]);
        }
    }
}

/// Codes, what to fetch meanwhile (codes, fields), the levels of each slab, and the words laid out for them.
pub(super) type Keys<'a> = (*const u8, *const u8, &'a [u8], &'a [Arc<Levels>], *const Words);

/// [`super::integers::key_page`] where scales are the same for all tokens of a page.
///
/// # Safety
/// As there, and only where the features were found.
#[allow(clippy::needless_range_loop)] // Columns index everything.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn key_page<const C: usize>(
    (codes, next, mut fields, book, q): Keys,
    factors: &[f32],
    scales: *const f32,
    scores: &[Score; 4],
) {
    let mut rows = [[_mm512_setzero_ps(); C]; 8];
    for (g, (book, factors)) in book.chunks(FLUSH).zip(factors.chunks_exact(C)).enumerate() {
        let at = g * FLUSH;
        let (from, fields) = ([codes, next].map(|p| p.wrapping_add(SLAB * at)), std::mem::take(&mut fields));
        // SAFETY: the slabs of this chunk and their words.
        unsafe {
            match book.len() {
                FLUSH => slabs::<C, FLUSH>(from, fields, book, q.add(at * 2 * C), factors, &mut rows),
                _ => slabs::<C, 1>(from, fields, book, q.add(at * 2 * C), factors, &mut rows),
            }
        }
    }
    // Four tokens n / 16 of each sum: neighbours n / 8 belong side by side.
    let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    for (row, rows) in rows.chunks_exact(2).enumerate() {
        for c in 0..C {
            // The two quarters of a sum hold other channels of the same tokens.
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(rows[0][c], rows[1][c]);
            let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(rows[0][c], rows[1][c]);
            let mut all = _mm512_permutexvar_ps(order, _mm512_add_ps(even, odd));
            // SAFETY: 16 of 64 places, eight numbers of the start.
            unsafe {
                let Score { to, start } = scores[c];
                let to = to.add(16 * row);
                let before = if start.is_null() {
                    _mm512_loadu_ps(to)
                } else {
                    _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_loadu_pd(start.cast())))
                };
                if !scales.is_null() {
                    all = _mm512_mul_ps(all, _mm512_loadu_ps(scales.add(16 * row)));
                }
                _mm512_storeu_ps(to, _mm512_add_ps(all, before));
            }
        }
    }
}

/// `N` lines from `line` on, of one block, whose words in the first page are at `w`.
///
/// # Safety
/// As for [`value_pages`].
#[inline]
#[allow(clippy::needless_range_loop, clippy::too_many_arguments)] // Columns index everything.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
unsafe fn lines<const C: usize, const N: usize>(
    pages: &[(*const u8, *const u8)],
    table: __m512i,
    line: usize,
    w: *const Words,
    page_words: usize,
    steps: &[f32; 4],
    acc: *mut Lane,
    fresh: bool,
) {
    let mut sums = [[[_mm512_setzero_si512(); 2]; C]; N];
    for (page, &(codes, next)) in pages.iter().enumerate() {
        let mut words = [[_mm512_setzero_si512(); C]; 2];
        for odd in 0..2 {
            for c in 0..C {
                // SAFETY: two words per block, page and column.
                words[odd][c] = unsafe { _mm512_load_si512(w.add(page * page_words + odd * C + c).cast()) };
            }
        }
        for n in 0..N {
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(64 * (line + n)).cast());
            // SAFETY: a line of the page.
            let x = levels(unsafe { _mm512_loadu_si512(codes.add(64 * (line + n)).cast()) }, table);
            for odd in 0..2 {
                for c in 0..C {
                    sums[n][c][0] = multiply_add(sums[n][c][0], x[odd], words[odd][c]);
                    sums[n][c][1] = multiply_add(sums[n][c][1], x[2 + odd], words[odd][c]);
                }
            }
        }
    }
    for n in 0..N {
        for c in 0..C {
            // SAFETY: two lanes.
            unsafe {
                let to = acc.add(2 * ((line + n) * C + c)).cast::<f32>();
                let before = if fresh { _mm512_setzero_ps() } else { _mm512_loadu_ps(to) };
                _mm512_storeu_ps(to, _mm512_fmadd_ps(fold(sums[n][c]), _mm512_set1_ps(steps[c]), before));
            }
        }
    }
}

/// [`super::integers::value_pages`].
///
/// # Safety
/// As there, and only where the features were found.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn value_pages<const C: usize>(
    pages: &[(*const u8, *const u8)],
    book: &Levels,
    blocks: &[usize],
    w: *const Words,
    steps: &[[f32; 4]],
    acc: &mut [Lane],
    fresh: bool,
) {
    assert!(acc.len() >= 2 * C * blocks.len());
    let acc = acc.as_mut_ptr();
    let (table, page_words) = (book.load_wide(), steps.len() * 2 * C);
    let mut line = 0;
    while line < blocks.len() {
        let block = blocks[line];
        // SAFETY: the caller's bounds.
        unsafe {
            let w = w.add(block * 2 * C);
            if blocks.get(line + 1) == Some(&block) {
                lines::<C, 2>(pages, table, line, w, page_words, &steps[block], acc, fresh);
                line += 2;
            } else {
                lines::<C, 1>(pages, table, line, w, page_words, &steps[block], acc, fresh);
                line += 1;
            }
        }
    }
}
