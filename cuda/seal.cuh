// 16-bit tokens in shared memory into one half of a page of 4-bit slabs: blocks of absmax or mean_absmax with fp16 scales, by
// warps. Bit for bit what src/seal.rs does, at some ten instructions an element.
//
// A warp works on 16 blocks of (up to) 64 numbers at a time: per channel 64 tokens x 1 slab, per token 16 tokens x 4 slabs.
// ldmatrix hands each lane the 32 numbers of its codes in fragment order. In every such block |u| <= 1 but for the rounding of
// the scale, so that cells of a fixed width find the code with neither clamp nor search; a block whose scale is saturated, or a
// subnormal far from its extreme, is clamped first, which moves no number over a threshold.
#pragma once
#include "strip.cuh"

namespace nqkv {

// Cell c of 64 holds u in [c - 32, c + 1 - 32) / 29, and at most one threshold: src/cuda/seal.rs checks it.
constexpr float CELLS_PER_UNIT = 29.f, MOST = 1.0625f;
// u - t, times this, is at least 1 or at most 0: thresholds are no smaller than 2^-20.
constexpr float STEEP = 1152921504606846976.f;  // 2^60
constexpr int CODES_BYTES = CELLS * 32 * 8;

// For each cell, a copy for each lane: its threshold, as what u * STEEP needs to become u - t, and the thresholds below it.
DEVICE void fill_codes(float2* table, const float* thresholds, int levels) {
#pragma unroll 1
  for (int e = threadIdx.x; e < CELLS * 4; e += blockDim.x) {
    const int cell = e / 4;
    const float low = float(cell - CELLS / 2) / CELLS_PER_UNIT - 1e-3f;
    int below = 0;
#pragma unroll 1
    for (int i = 0; i < levels - 1; i++) below += __ldg(thresholds + i) < low;
    const float t = below < levels - 1 ? __ldg(thresholds + below) : INFINITY;
    // Each of a warp's threads in turn at banks that no other one is at.
#pragma unroll 1
    for (int i = 0; i < 8; i++) table[cell * 32 + (i + cell) % 8 * 4 + e % 4] = make_float2(-t * STEEP, float(below));
  }
}

// The table as this lane reads it: at a multiple of 256 bytes, in the first 48 KiB of shared memory.
struct Codes {
  float middle;   // of the magic number below
  uint32_t lane;
  DEVICE explicit Codes(const float2* table) {
    // Opaque, lest they are made anew each time.
    asm volatile("mov.b32 %0, %1;" : "=f"(middle) : "f"(32768.f + CELLS / 2 + float(uint32_t(__cvta_generic_to_shared(table)) / 256)));
    asm volatile("mov.b32 %0, %1;" : "=r"(lane) : "r"(lane_of() * 8));
  }

  // The code of u, as a whole number.
  DEVICE float operator()(float u) const {
    // The magic number 2^15: the last 8 bits of the sum are fractions of a cell, and the 8 above them are the cell's place,
    // which is an address less its low byte.
    const uint32_t z = __float_as_uint(__fmaf_rn(u, CELLS_PER_UNIT, middle));
    float t, below;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(t), "=f"(below) : "r"(__byte_perm(z, lane, 0x5514)));
    return below + __saturatef(__fmaf_rn(u, STEEP, t));
  }
  // Eight numbers' codes, the first one lowest. Sums of four are exact, and end in the low 16 bits.
  template <class U> DEVICE uint32_t word(U u) const {
    float sum[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      sum[k] = 8388608.f + (*this)(u(4 * k));
#pragma unroll
      for (int j = 1; j < 4; j++) sum[k] = __fmaf_rn((*this)(u(4 * k + j)), float(1 << 4 * j), sum[k]);
    }
    return __byte_perm(__float_as_uint(sum[0]), __float_as_uint(sum[1]), 0x5410);
  }
};

// Two 16-bit numbers at once.
template <class T> struct Pair;
template <> struct Pair<__half> {
  using Type = __half2;
  static DEVICE __half2 all(float x) { return __float2half2_rn(x); }
};
template <> struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static DEVICE __nv_bfloat162 all(float x) { return __float2bfloat162_rn(x); }
};
template <class T> DEVICE typename Pair<T>::Type pair_of(uint32_t word) { return *(typename Pair<T>::Type*)&word; }
template <class P> DEVICE uint32_t word_of(P pair) { return *(uint32_t*)&pair; }
// The larger of each half; the magnitude of each.
template <class T> DEVICE uint32_t larger_of_both(uint32_t x, uint32_t y) { return word_of(__hmax2(pair_of<T>(x), pair_of<T>(y))); }
template <class T> DEVICE uint32_t magnitudes(uint32_t x) { return word_of(__habs2(pair_of<T>(x))); }

// Memory of the device, whose pointers come from a table of numbers.
DEVICE void store_global(uint8_t* to, __half x) { asm volatile("st.global.b16 [%0], %1;" ::"l"(to), "h"(__half_as_ushort(x)) : "memory"); }
DEVICE void store_global(uint8_t* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// A magnitude as an fp16 scale, and what codes are chosen by: the IEEE reciprocal, for scales need no range of fp32.
DEVICE float rounded_scale(float top) { return __half2float(__float2half_rn(fminf(top, 65504.f))); }
DEVICE float inverse_of(float scale) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(scale));
  r = __fmaf_rn(__fmaf_rn(-scale, r, 1.f), r, r);
  return scale == 0.f ? 0.f : r;
}

// A saturated scale, or one rounded down far: numbers beyond count as 1.03 of it. The same for two tokens, or one.
template <class T> DEVICE void clamp_words(uint32_t& word, float low, float high) {
  const float x = fminf(fmaxf(number_in<T>(word, 0), -low), low), y = fminf(fmaxf(number_in<T>(word, 1), -high), high);
  typename Pair<T>::Type p;
  p.x = from_float<T>(x), p.y = from_float<T>(y);
  word = word_of(p);
}

// Per channel, mean_absmax: fields and codes of one slab of a page. `at` is where this lane's row of ldmatrix begins, 16 tokens
// are `apart` bytes; `codes` is the slab's place, `fields` that of its fields.
template <class T> DEVICE void seal_channel_slab(uint32_t at, int apart, uint8_t* codes, uint8_t* fields, const Codes& code) {
  const int lane = lane_of();
  // Number i of channel k of the lane's four is token lane / 4 + 8 i.
  float x[4][8];
#pragma unroll
  for (int p = 0; p < 4; p++) {
    uint32_t w[4];
    load_matrices<false>(w, at + p * apart);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j % 2 + j / 4 * 2][2 * p + j / 2 % 2] = number_in<T>(w[j / 2], j % 2);
  }
  float m[4], r[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    float t[4];
#pragma unroll
    for (int i = 0; i < 4; i++) t[i] = x[k][i] + x[k][i + 4];
    m[k] = (t[0] + t[2]) + (t[1] + t[3]);
  }
  // Exactly the quotient.
  const float zero = round_field(gather(m, Sum()) * (1.f / PAGE_TOKENS), FP16);
  spread(r, zero);
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[k][i] -= r[k];
    m[k] = fabsf(x[k][0]);
#pragma unroll
    for (int i = 1; i < 8; i++) m[k] = fmaxf(m[k], fabsf(x[k][i]));
  }
  const float top = gather(m, Larger()), scale = rounded_scale(top), inverted = inverse_of(scale);
  if (__any_sync(ALL, top * inverted > MOST)) {
    spread(m, MOST * scale);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int i = 0; i < 8; i++) x[k][i] = fminf(fmaxf(x[k][i], -m[k]), m[k]);
    }
  }
  spread(r, inverted);
  const bool second = writes_zero<4>();
  store_global(fields + 2 * (8 * (lane % 4) + own<4>() + (second ? 4 : 0)), __float2half_rn(second ? zero : scale));
  uint32_t words[4];
#pragma unroll
  for (int p = 0; p < 4; p++)
    words[p] = code.word([&](int j) { return x[j % 2 + j / 4 * 2][2 * p + j / 2 % 2] * r[j % 2 + j / 4 * 2]; });
  store_global(codes + 16 * lane, make_uint4(words[0], words[1], words[2], words[3]));
}

// Per token: statistics of a strip's 16 tokens x 4 slabs in `w`. Each lane gets the magnitude of one of its tokens, own<>().
template <class T, bool VALUE> DEVICE float largest_of_tokens(const uint32_t (&w)[4][4]) {
  // Values: each word holds one channel of two tokens, and the words of a matrix pair 8 tokens further. Keys: two channels.
  uint32_t m[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int next = VALUE ? 1 : 2, first = VALUE ? 2 * k : k;
    m[k] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) m[k] = larger_of_both<T>(larger_of_both<T>(m[k], magnitudes<T>(w[i][first])), magnitudes<T>(w[i][first + next]));
  }
  const bool h = lane_of() & (VALUE ? 16 : 2);
  uint32_t x = larger_of_both<T>(h ? m[1] : m[0], __shfl_xor_sync(ALL, h ? m[0] : m[1], VALUE ? 16 : 2));
  if constexpr (VALUE) {
    x = larger_of_both<T>(x, __shfl_xor_sync(ALL, x, 8));
    x = larger_of_both<T>(x, __shfl_xor_sync(ALL, x, 4));
    return number_in<T>(lane_of() & 8 ? x >> 16 : x & 0xffff, 0);
  } else {
    x = larger_of_both<T>(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(number_in<T>(x, 0), number_in<T>(x, 1));
  }
}

// Codes of a strip in `w`: word i belongs to slab i. `top` and `scale` are those of the lane's own token.
template <class T, bool VALUE> DEVICE void codes_of_tokens(uint32_t (&w)[4][4], float top, float scale, const Codes& code, uint32_t (&words)[4]) {
  constexpr int COUNT = VALUE ? 4 : 2;
  constexpr auto which = [](int j) { return VALUE ? j % 2 + j / 4 * 2 : j / 2 % 2; };
  const float inverted = inverse_of(scale);
  if (__any_sync(ALL, top * inverted > MOST)) {
    float most[COUNT];
    spread(most, 1.03f * scale);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) clamp_words<T>(w[i][j], most[which(2 * j)], most[which(2 * j + 1)]);
    }
  }
  float r[COUNT];
  spread(r, inverted);
#pragma unroll
  for (int i = 0; i < 4; i++)
    words[i] = code.word([&](int j) { return number_in<T>(w[i][j / 2], j % 2) * r[which(j)]; });
}

}  // namespace nqkv
