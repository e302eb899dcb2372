// Absmax, signed absmax and minmax over blocks of 64: what most tensors are quantized with. Fields are fp32, fp16 or bf16.
//
// A warp takes GROUP runs of four blocks, eight lanes for a block, and has the next ones on their way meanwhile. Lanes exchange
// extremes so that each ends with those of one block, whose fields it makes and stores and whose division it does.
#pragma once
#include <type_traits>

#include "codec.cuh"

namespace nqkv {

constexpr unsigned ALL = 0xffffffff;

DEVICE void report(unsigned long long* bad, unsigned long long index) {
  if (bad) atomicMin(bad, index);
}

// The larger and the smaller; a NaN stays one.
DEVICE float larger_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
DEVICE float smaller_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Cell c holds u = (x - zero) / scale whose u * PLAIN_SCALE is nearest to c - PLAIN_OFFSET. src/cuda/flat.rs says which codebooks
// have at most one threshold in each. The last cells have what lies beyond: scales are saturated, or subnormals far from an extreme.
constexpr float PLAIN_SCALE = 31.f / (CELLS - 1), PLAIN_OFFSET = 32.f / (CELLS - 1);

// Two numbers of 16 bits, or one: the larger of each, the smaller, the magnitudes, and then one number for both.
template <class T> struct Extreme {
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
  static DEVICE W smaller(W x, W y) {
    if constexpr (BF16) asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    else asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(y));
    return x;
  }
  static DEVICE float largest(W x) { return larger_or_nan(number_in<T>(x, 0), number_in<T>(x, 1)); }
  static DEVICE float smallest(W x) { return smaller_or_nan(number_in<T>(x, 0), number_in<T>(x, 1)); }
};
template <> struct Extreme<float> {
  using W = float;
  static DEVICE W magnitude(uint32_t x) { return fabsf(__uint_as_float(x)); }
  static DEVICE W larger(W x, W y) { return larger_or_nan(x, y); }
  static DEVICE W smaller(W x, W y) { return smaller_or_nan(x, y); }
  static DEVICE float largest(W x) { return x; }
  static DEVICE float smallest(W x) { return x; }
};

// f over the words of eight numbers, each after `each`.
template <class T, class E, class F> DEVICE typename Extreme<T>::W fold_eight(const uint4 (&w)[sizeof(T) / 2], E each, F f) {
  auto four = [&](uint4 x) { return f(f(each(x.x), each(x.y)), f(each(x.z), each(x.w))); };
  if constexpr (sizeof(T) == 2) return four(w[0]);
  else return f(four(w[0]), four(w[1]));
}

constexpr uint32_t LOW_FIRST = 0x32441044, HIGH_FIRST = 0x10443244;

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

// The lane of a block's eight that has its fields, in run k of GROUP.
template <int GROUP> DEVICE int owner(int k) { return (threadIdx.x & 24) | (GROUP == 4 ? 2 * k : 4 * k); }

// f over each block's lanes: a lane gets that of one block, in run lane / 2 % 4 or, of two, lane / 4 % 2.
template <class W, class F> DEVICE W gather_blocks(const W (&m)[4], F f) {
  const bool upper = threadIdx.x & 4, second = threadIdx.x & 2;
  const W x = f(upper ? m[2] : m[0], __shfl_xor_sync(ALL, upper ? m[0] : m[2], 4));
  const W y = f(upper ? m[3] : m[1], __shfl_xor_sync(ALL, upper ? m[1] : m[3], 4));
  const W z = f(second ? y : x, __shfl_xor_sync(ALL, second ? x : y, 2));
  return f(z, __shfl_xor_sync(ALL, z, 1));
}
template <class W, class F> DEVICE W gather_blocks(const W (&m)[2], F f) {
  const bool upper = threadIdx.x & 4;
  W x = f(upper ? m[1] : m[0], __shfl_xor_sync(ALL, upper ? m[0] : m[1], 4));
  x = f(x, __shfl_xor_sync(ALL, x, 2));
  return f(x, __shfl_xor_sync(ALL, x, 1));
}

// Of a block with +top and -top in it, the sign of the first one counts. `top` is negative in lanes whose block has no such tie.
template <class T, int GROUP> DEVICE bool first_is_negative(const uint4 (&held)[GROUP][sizeof(T) / 2], float top, int run) {
  bool negative = false;
  const uint32_t ties = __ballot_sync(ALL, top > 0.f);
#pragma unroll
  for (int k = 0; k < GROUP; k++) {
    if ((ties & (GROUP == 4 ? 0x03030303u << 2 * k : 0x0f0f0f0fu << 4 * k)) == 0) continue;
    const float m = __shfl_sync(ALL, top, owner<GROUP>(k));
    bool found = false, minus = false;
#pragma unroll
    for (int j = 7; j >= 0; j--) {
      const float x = number_of<T>(held[k], j, LOW_FIRST);
      if (fabsf(x) == m) found = true, minus = x < 0.f;
    }
    const uint32_t have = __ballot_sync(ALL, found) >> (threadIdx.x & 24) & 255, signs = __ballot_sync(ALL, minus) >> (threadIdx.x & 24);
    if (k == run) negative = signs >> (__ffs(have) - 1 & 7) & 1;
  }
  return negative;
}

template <class T, int KIND, int GROUP>
DEVICE void plain_group(const FlatArguments& a, uint32_t cells, const uint4 (&held)[GROUP][sizeof(T) / 2], uint32_t first, uint32_t eights, uint32_t order) {
  using X = Extreme<T>;
  using W = typename X::W;
  const int lane = threadIdx.x & 31, run = GROUP == 4 ? lane / 2 % 4 : lane / 4 % 2;
  auto same = [](uint32_t x) -> W {
    if constexpr (sizeof(T) == 2) return x;
    else return __uint_as_float(x);
  };
  Fields f = {0.f, 0.f};  // of this lane's block
  bool finite;
  W m[GROUP];
  if constexpr (KIND == ABSMAX) {
#pragma unroll
    for (int k = 0; k < GROUP; k++) m[k] = fold_eight<T>(held[k], X::magnitude, X::larger);
    const float top = X::largest(gather_blocks(m, X::larger));
    finite = top <= 3.402823466e38f;
    f.scale = round_wide(top, a.scale_dtype);
  } else {
#pragma unroll
    for (int k = 0; k < GROUP; k++) m[k] = fold_eight<T>(held[k], same, X::larger);
    const float high = X::largest(gather_blocks(m, X::larger));
#pragma unroll
    for (int k = 0; k < GROUP; k++) m[k] = fold_eight<T>(held[k], same, X::smaller);
    const float low = X::smallest(gather_blocks(m, X::smaller));
    finite = fabsf(high) <= 3.402823466e38f && fabsf(low) <= 3.402823466e38f;
    if constexpr (KIND == MINMAX) {
      f.zero = round_wide(low * 0.5f + high * 0.5f, a.scale_dtype) + 0.f;
      f.scale = round_wide(fmaxf(high - f.zero, f.zero - low), a.scale_dtype) + 0.f;
    } else {
      const bool tie = high == -low && high > 0.f;
      float top = high > -low ? high : high == -low ? 0.f : low;
      if (__any_sync(ALL, tie)) {
        const bool negative = first_is_negative<T>(held, tie ? high : -1.f, run);
        if (tie) top = negative ? low : high;
      }
      f.scale = round_wide(top, a.scale_dtype);
    }
  }
  const uint32_t block = first / 8 + 4 * run + lane / 8;
  if ((lane & (GROUP == 4 ? 1 : 3)) == 0 && 8 * block < eights) {
    const int bytes = a.scale_dtype == FP32 ? 4 : 2;
    uint8_t* to = a.fields + (size_t)block * (KIND == MINMAX ? 2 * bytes : bytes);
    write_wide(to, f.scale, a.scale_dtype);
    if (KIND == MINMAX) write_wide(to + bytes, f.zero, a.scale_dtype);
    if (!finite) report(a.bad, 64ull * block);
  }
  const float inverted = inverse(f.scale);
#pragma unroll
  for (int k = 0; k < GROUP; k++) {
    const float r = __shfl_sync(ALL, inverted, owner<GROUP>(k)), zero = KIND == MINMAX ? __shfl_sync(ALL, f.zero, owner<GROUP>(k)) : 0.f;
    uint32_t word = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--) {
      const float x = number_of<T>(held[k], j, order), u = (KIND == MINMAX ? x - zero : x) * r;
      push_code(word, cells, u, u, PLAIN_SCALE, PLAIN_OFFSET);
    }
    const uint32_t i = first + 32 * k + lane;
    if (i < eights) ((uint32_t*)a.codes)[i] = word;
  }
}

template <class T, int KIND> DEVICE void quantize_plain(const FlatArguments& a, float2* table) {
  constexpr int GROUP = sizeof(T) == 2 ? 4 : 2, WORDS = sizeof(T) / 2;
  fill_cells(table, a.threshold, a.levels, PLAIN_SCALE, PLAIN_OFFSET);
  __syncthreads();
  const int lane = threadIdx.x & 31;
  const uint32_t cells = cells_of_lane(table);
  const uint32_t order = a.high_first ? HIGH_FIRST : LOW_FIRST;
  const uint32_t eights = uint32_t(a.first / 8), stride = gridDim.x * (blockDim.x / 32) * (32 * GROUP);
  const uint4* x = (const uint4*)a.x + lane * WORDS;
  uint4 held[GROUP][WORDS], next[GROUP][WORDS];
  auto load = [&](uint4 (&to)[GROUP][WORDS], uint32_t from) {
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
#pragma unroll
      for (int i = 0; i < WORDS; i++)
        to[k][i] = from + 32 * k + lane < eights ? __ldcs(x + (size_t)(from + 32 * k) * WORDS + i) : make_uint4(0, 0, 0, 0);
    }
  };
  uint32_t first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * (32 * GROUP);
  load(held, first);
  // One copy of the code: two that take turns with the buffers save sixteen moves, and cost a driver three times as long.
#pragma unroll 1
  for (; first < eights; first += stride) {
    load(next, first + stride);
    plain_group<T, KIND>(a, cells, held, first, eights, order);
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
#pragma unroll
      for (int i = 0; i < WORDS; i++) held[k][i] = next[k][i];
    }
  }
}

template <class T> DEVICE void quantize_plain(const FlatArguments& a) {
  __shared__ float2 table[CELLS * 32];
  if (a.kind == ABSMAX) quantize_plain<T, ABSMAX>(a, table);
  else if (a.kind == SIGNED_ABSMAX) quantize_plain<T, SIGNED_ABSMAX>(a, table);
  else quantize_plain<T, MINMAX>(a, table);
}

}  // namespace nqkv
