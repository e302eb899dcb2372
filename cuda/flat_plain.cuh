// Absmax in fp32 over blocks of 64: what most tensors are quantized with.
//
// A warp takes GROUP runs of four blocks, eight lanes for a block, and has the next ones on their way meanwhile. Lanes exchange maxima
// so that each ends with that of one block, for which it does the division and stores the scale.
#pragma once
#include <type_traits>

#include "codec.cuh"

namespace nqkv {

constexpr unsigned ALL = 0xffffffff;

DEVICE void report(unsigned long long* bad, unsigned long long index) {
  if (bad) atomicMin(bad, index);
}

// The larger magnitude; a NaN stays one.
DEVICE float larger_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(fabsf(y)));
  return z;
}

// Cell c holds u = x / scale whose u * PLAIN_SCALE is nearest to c - PLAIN_OFFSET. src/cuda/flat.rs says which codebooks have at most
// one threshold in each.
constexpr float PLAIN_SCALE = 31.f, PLAIN_OFFSET = 32.f;

// Two numbers of 16 bits, or one, as magnitudes go: the larger of each.
template <class T> struct Top {
  using W = uint32_t;
  static constexpr bool BF16 = std::is_same_v<T, __nv_bfloat16>;

  static DEVICE W magnitude(W x) {
    if constexpr (BF16) asm("abs.bf16x2 %0, %0;" : "+r"(x));
    else asm("abs.f16x2 %0, %0;" : "+r"(x));
    return x;
  }
  static DEVICE W larger(W x, W y) {
    if constexpr (BF16) asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    else asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
  }
  static DEVICE float number(W x) { return larger_or_nan(number_in<T>(x, 0), number_in<T>(x, 1)); }
};
template <> struct Top<float> {
  using W = float;
  static DEVICE W magnitude(uint32_t x) { return fabsf(__uint_as_float(x)); }
  static DEVICE W larger(W x, W y) { return larger_or_nan(x, y); }
  static DEVICE float number(W x) { return x; }
};

template <class T> DEVICE typename Top<T>::W top_of(const uint4 (&w)[sizeof(T) / 2]) {
  using M = Top<T>;
  auto four = [](uint4 x) {
    return M::larger(M::larger(M::magnitude(x.x), M::magnitude(x.y)), M::larger(M::magnitude(x.z), M::magnitude(x.w)));
  };
  if constexpr (sizeof(T) == 2) return four(w[0]);
  else return M::larger(four(w[0]), four(w[1]));
}

// Number j of eight; `order` swaps those that share a byte if the first of them is to be its high nibble.
template <class T> DEVICE float number_of(const uint4 (&w)[sizeof(T) / 2], int j, uint32_t order) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t word = j < 2 ? w[0].x : j < 4 ? w[0].y : j < 6 ? w[0].z : w[0].w;
    // Bytes 2 and 3 of the selector pick the two that are the number; in order 0 its low half is the first.
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(__byte_perm(word, 0, j % 2 ? order >> 16 : order));
    else return number_in<T>(__byte_perm(word, 0, j % 2 ? order >> 16 : order), 1);
  } else {
    const uint4 q = w[j / 4];
    const uint32_t pair[2] = {j % 4 < 2 ? q.x : q.z, j % 4 < 2 ? q.y : q.w};
    return __uint_as_float((order & 0x2000) ? pair[1 - j % 2] : pair[j % 2]);
  }
}

template <class T, bool WHOLE, int GROUP>
DEVICE void plain_group(const FlatArguments& a, uint32_t cells, const uint4 (&held)[GROUP][sizeof(T) / 2], uint32_t first, uint32_t eights, uint32_t order) {
  using W = typename Top<T>::W;
  const int lane = threadIdx.x & 31;
  W m[GROUP];
#pragma unroll
  for (int k = 0; k < GROUP; k++) m[k] = top_of<T>(held[k]);
  // Bit 2 of the lane says which half of the runs, bit 1 which of those.
  const bool upper = lane & 4, second = lane & 2;
  W mine;
  auto exchange = [](W x, int d) { return __shfl_xor_sync(ALL, x, d); };
  if constexpr (GROUP == 4) {
    const W x = Top<T>::larger(upper ? m[2] : m[0], exchange(upper ? m[0] : m[2], 4));
    const W y = Top<T>::larger(upper ? m[3] : m[1], exchange(upper ? m[1] : m[3], 4));
    mine = Top<T>::larger(second ? y : x, exchange(second ? x : y, 2));
  } else {
    mine = Top<T>::larger(upper ? m[1] : m[0], exchange(upper ? m[0] : m[1], 4));
    mine = Top<T>::larger(mine, exchange(mine, 2));
  }
  mine = Top<T>::larger(mine, exchange(mine, 1));
  const float top = Top<T>::number(mine);
  const int run = GROUP == 4 ? lane / 2 % 4 : lane / 4 % 2;
  const uint32_t block = first / 8 + 4 * run + lane / 8;
  if ((lane & (GROUP == 4 ? 1 : 3)) == 0 && (WHOLE || 8 * block < eights)) {
    ((float*)a.fields)[block] = top;
    if (!(top <= 3.402823466e38f)) report(a.bad, 64ull * block);
  }
  // As `inverse`, but NaN for NaN, so that u is at most 1 or NaN.
  float floor;
  asm("max.NaN.f32 %0, %1, 0f006CE3EE;" : "=f"(floor) : "f"(top));
  const float inverted = top == 0.f ? 0.f : __frcp_rn(floor);
#pragma unroll
  for (int k = 0; k < GROUP; k++) {
    const float r = __shfl_sync(ALL, inverted, (lane & 24) | (GROUP == 4 ? 2 * k : 4 * k));
    uint32_t word = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--) {
      const float u = number_of<T>(held[k], j, order) * r;
      // 2^23 is the magic number: the low bits of the sum are the cell, rounded; of a NaN they are -1.
      const uint32_t cell = __float_as_uint(__fmaf_rn(u, PLAIN_SCALE, 8388608.f + PLAIN_OFFSET)) * 256 + cells;
      float threshold;
      uint32_t below;
      asm("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(threshold), "=r"(below) : "r"(cell));
      word = word * 16 + below;
      asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p add.u32 %0, %0, 1;}" : "+r"(word) : "f"(u), "f"(threshold));
    }
    const uint32_t i = first + 32 * k + lane;
    if (WHOLE || i < eights) ((uint32_t*)a.codes)[i] = word;
  }
}

template <class T> DEVICE void quantize_plain(const FlatArguments& a) {
  constexpr int GROUP = sizeof(T) == 2 ? 4 : 2, WORDS = sizeof(T) / 2;
  __shared__ float2 table[(1 + CELLS) * 32];  // the first ones are what NaNs find
  fill_cells(table + 32, a.threshold, a.levels, PLAIN_SCALE / (CELLS - 1), PLAIN_OFFSET / (CELLS - 1));
  __syncthreads();
  const int lane = threadIdx.x & 31;
  const uint32_t cells = cells_of_lane(table + 32);
  const uint32_t order = a.high_first ? 0x10443244 : 0x32441044;
  const uint32_t eights = uint32_t(a.first / 8), stride = gridDim.x * (blockDim.x / 32) * (32 * GROUP);
  const uint32_t whole = eights / (32 * GROUP) * (32 * GROUP);
  uint32_t first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * (32 * GROUP);
  const uint4* x = (const uint4*)a.x + lane * WORDS;
  uint4 held[GROUP][WORDS], next[GROUP][WORDS];
  auto load = [&](uint4 (&to)[GROUP][WORDS], uint32_t from) {
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
#pragma unroll
      for (int i = 0; i < WORDS; i++) to[k][i] = __ldcs(x + (size_t)(from + 32 * k) * WORDS + i);
    }
  };
  if (first < whole) load(held, first);
#pragma unroll 1
  while (first < whole) {
    if (first + stride < whole) load(next, first + stride);
    plain_group<T, true>(a, cells, held, first, eights, order);
    first += stride;
    if (first >= whole) break;
    if (first + stride < whole) load(held, first + stride);
    plain_group<T, true>(a, cells, next, first, eights, order);
    first += stride;
  }
  if (first == whole && whole < eights) {
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
#pragma unroll
      for (int i = 0; i < WORDS; i++) held[k][i] = whole + 32 * k + lane < eights ? __ldcs(x + (size_t)(whole + 32 * k) * WORDS + i) : make_uint4(0, 0, 0, 0);
    }
    plain_group<T, false>(a, cells, held, whole, eights, order);
  }
}

}  // namespace nqkv
