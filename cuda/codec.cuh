// Numbers, fields and codes: the rules of src/codec.rs, bit for bit. Compiled with -fmad=false: an fma stands where one is
// written. Subnormals count, division is IEEE.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__

enum ScaleKind { ABSMAX, SIGNED_ABSMAX, MINMAX, MEAN_ABSMAX, RMS };
enum ScaleDtype { FP32, FP16, BF16, E4M3 };
enum Dtype { F64, F32, F16, BF };

DEVICE int fields_of(int kind) { return kind == MINMAX || kind == MEAN_ABSMAX ? 2 : 1; }
DEVICE int bytes_of(int scale_dtype) { return scale_dtype == FP32 ? 4 : scale_dtype == E4M3 ? 1 : 2; }

DEVICE double load_number(const uint8_t* data, long long at, int dtype) {
  switch (dtype) {
    case F64: return ((const double*)data)[at];
    case F32: return ((const float*)data)[at];
    case F16: return __half2float(((const __half*)data)[at]);
    default: return __bfloat162float(((const __nv_bfloat16*)data)[at]);
  }
}

template <class T> DEVICE float to_float(T x);
template <> DEVICE float to_float(float x) { return x; }
template <> DEVICE float to_float(__half x) { return __half2float(x); }
template <> DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float(float x) { return x; }
template <> DEVICE __half from_float(float x) { return __float2half_rn(x); }
template <> DEVICE __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// fp32 to e4m3 and back, src/codec.rs.
DEVICE uint32_t e4m3_from_float(float x) {
  uint32_t sign = __float_as_uint(x) >> 31 << 7;
  float a = fabsf(x);
  if (isnan(a)) return sign | 0x7f;
  if (a >= 448.f) return sign | 0x7e;
  int exponent = max(int(__float_as_uint(a) >> 23) - 127, -6);
  // A power of two: as exact as the division in src/codec.rs.
  float per_quantum = __uint_as_float(uint32_t(3 - exponent + 127) << 23);
  uint32_t steps = uint32_t(rintf(a * per_quantum));
  uint32_t magnitude = exponent == -6 && steps < 8 ? steps : uint32_t(exponent + 7) * 8 + steps - 8;
  return sign | min(magnitude, 0x7eu);
}
DEVICE float e4m3_to_float(uint32_t byte) {
  uint32_t e = byte >> 3 & 15, m = byte & 7;
  float a = (byte & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000)
            : e == 0              ? float(m) * 0.001953125f
                                  : float(8 + m) * __uint_as_float((e + 117) << 23);
  return byte & 0x80 ? -a : a;
}

// A field as its dtype gives it back.
DEVICE float round_field(float x, int dtype) {
  switch (dtype) {
    case FP16: return __half2float(__float2half_rn(fminf(fmaxf(x, -65504.f), 65504.f)));
    case BF16: {
      const float most = __uint_as_float(0x7f7f0000);
      return __bfloat162float(__float2bfloat16_rn(fminf(fmaxf(x, -most), most)));
    }
    case E4M3: return e4m3_to_float(e4m3_from_float(x));
    default: return x;
  }
}
DEVICE void write_field(uint8_t* to, float x, int dtype) {
  switch (dtype) {
    case FP16: *(__half*)to = __float2half_rn(x); break;
    case BF16: *(__nv_bfloat16*)to = __float2bfloat16_rn(x); break;
    case E4M3: *to = uint8_t(e4m3_from_float(x)); break;
    default: *(float*)to = x;
  }
}
DEVICE float read_field(const uint8_t* from, int dtype) {
  switch (dtype) {
    case FP16: return __half2float(*(const __half*)from);
    case BF16: return __bfloat162float(*(const __nv_bfloat16*)from);
    case E4M3: return e4m3_to_float(*from);
    default: return *(const float*)from;
  }
}

// A field as fp16, bf16 or fp32 gives it back, and written: e4m3, which takes a hundred times the code, goes the other way.
DEVICE float round_wide(float x, int dtype) {
  return dtype == FP16 ? round_field(x, FP16) : dtype == BF16 ? round_field(x, BF16) : x;
}
DEVICE void write_wide(uint8_t* to, float x, int dtype) {
  if (dtype == FP16) write_field(to, x, FP16);
  else if (dtype == BF16) write_field(to, x, BF16);
  else write_field(to, x, FP32);
}

struct Fields {
  float scale, zero;
};

// The reciprocal that codes are chosen by: 0 for scale 0.
DEVICE float inverse(float scale) {
  if (scale == 0.f) return 0.f;
  return __frcp_rn(copysignf(fmaxf(fabsf(scale), 1e-38f), scale));
}

// Thresholds below v: the code. A NaN counts as 0.
DEVICE uint32_t count_below(float v, const float* thresholds, int levels) {
  if (isnan(v)) v = 0.f;
  uint32_t low = 0, high = levels - 1;
  while (low < high) {
    uint32_t middle = (low + high) / 2;
    if (v > thresholds[middle]) low = middle + 1; else high = middle;
  }
  return low;
}

// Codes of at most 16 levels by a table of cells in shared memory, one copy for each lane, so that no two lanes meet in a bank:
// a cell holds at most one threshold, and how many lie below the cell. src/cuda/codec.rs says which codebooks have one.
constexpr int CELLS = 64;

// The table's threshold and count, a copy for each lane. Four threads for a cell, each in turn at banks that no other one of
// its warp is at.
DEVICE void fill_cells(float2* table, const float* thresholds, int levels, float scale, float offset) {
#pragma unroll 1
  for (int e = threadIdx.x; e < CELLS * 4; e += blockDim.x) {
    const int cell = e / 4;
    // Cell c holds v whose clamp(v * scale + offset) is nearest to c of 63; a hair more, since that is rounded.
    const float low = ((float(cell) - 0.5f) / (CELLS - 1) - 1e-4f - offset) / scale;
    uint32_t below = 0;
#pragma unroll 1
    for (int i = 0; i < levels - 1; i++) below += cell > 0 && thresholds[i] < low;
    const float t = below < uint32_t(levels - 1) ? thresholds[below] : INFINITY;
#pragma unroll 1
    for (int i = 0; i < 8; i++) table[cell * 32 + (i + cell) % 8 * 4 + e % 4] = make_float2(t, __uint_as_float(below));
  }
}

// Address of this lane's cell 0, less what the magic number below adds.
DEVICE uint32_t cells_of_lane(const float2* table) {
  return uint32_t(__cvta_generic_to_shared(table + (threadIdx.x & 31))) - 0x4b000000u * 256;
}

// Shifts the code of u = x / scale into the low nibble of a word; `cell_scale` is the table's over the scale.
DEVICE void push_code(uint32_t& word, uint32_t cells, float u, float x, float cell_scale, float cell_offset) {
  // 2^23 is the magic number: the low bits of the sum are the cell, rounded. One multiplication makes them an address.
  const float y = __saturatef(__fmaf_rn(x, cell_scale, cell_offset));
  const uint32_t cell = __float_as_uint(__fmaf_rn(y, float(CELLS - 1), 8388608.f)) * 256 + cells;
  float threshold;
  uint32_t below;
  asm("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(threshold), "=r"(below) : "r"(cell));
  word = word * 16 + below;
  asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p add.u32 %0, %0, 1;}" : "+r"(word) : "f"(u), "f"(threshold));
}

// One of the two 16-bit numbers of a word.
template <class T> DEVICE float number_in(uint32_t word, int high);
template <> DEVICE float number_in<__nv_bfloat16>(uint32_t word, int high) {
  return __uint_as_float(high ? word & 0xffff0000 : word << 16);
}
template <> DEVICE float number_in<__half>(uint32_t word, int high) {
  return __half2float(__ushort_as_half(uint16_t(high ? word >> 16 : word)));
}

constexpr int MAX_BLOCK = 512;

// Fields of n numbers by one warp, in the order of src/codec.rs. `v` and `w` hold MAX_BLOCK numbers each.
template <class F> DEVICE Fields fields_by_warp(float* v, float* w, int n, int kind, int dtype, F number) {
  const int lane = threadIdx.x & 31;
  __syncwarp();  // lanes may still read what the block before left here
#pragma unroll 1
  for (int i = lane; i < n; i += 32) v[i] = number(i);
  __syncwarp();
  // f over the block, folded by g in the fixed order.
  auto folded = [&](auto f, float rest, auto g) {
    int half = 1;
#pragma unroll 1
    while (half < n) half *= 2;
#pragma unroll 1
    for (int i = lane; i < half; i += 32) w[i] = i < n ? f(v[i]) : rest;
    __syncwarp();
#pragma unroll 1
    for (half /= 2; half > 0; half /= 2) {
#pragma unroll 1
      for (int i = lane; i < half; i += 32) w[i] = g(w[i], w[i + half]);
      __syncwarp();
    }
    const float x = w[0];
    __syncwarp();
    return x;
  };
  auto same = [](float x) { return x; };
  auto larger = [](float x, float y) { return fmaxf(x, y); };
  auto sum = [](float x, float y) { return x + y; };
  if (n == 0) return {0.f, 0.f};
  if (kind == MINMAX) {
    const float high = folded(same, -INFINITY, larger);
    const float low = folded(same, INFINITY, [](float x, float y) { return fminf(x, y); });
    const float zero = round_field(low * 0.5f + high * 0.5f, dtype) + 0.f;
    return {round_field(fmaxf(high - zero, zero - low), dtype) + 0.f, zero};
  }
  const float zero = kind == MEAN_ABSMAX ? round_field(__fdiv_rn(folded(same, 0.f, sum), float(n)), dtype) : 0.f;
  const float top = folded([&](float x) { return fabsf(x - zero); }, 0.f, larger);
  if (kind == SIGNED_ABSMAX) {
    float e = 0.f;
#pragma unroll 1
    for (int i = n - 1; i >= 0; i--)
      if (top > 0.f && fabsf(v[i]) == top) e = v[i];
    return {round_field(e, dtype), 0.f};
  }
  if (kind == RMS) {
    if (top == 0.f) return {0.f, 0.f};
    const float t = fmaxf(top, 1e-38f), r = __frcp_rn(t);
    return {round_field(t * __fsqrt_rn(__fdiv_rn(folded([&](float x) { return (x * r) * (x * r); }, 0.f, sum), float(n))), dtype), 0.f};
  }
  return {round_field(top, dtype), zero};
}
