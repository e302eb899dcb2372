// Whole tensors to codes and fields and back, src/flat.rs.
// target: compute_80
// isa: 8.0
//
// Plain: flat_plain.cuh. Fast: 4-bit codes of whole blocks of 16 to 256 elements (a power of two), a lane for eight elements. Codes
// are chosen by a table of cells. Any: every other spec, in two passes (fields, then codes).
#include "codec.cuh"

struct FlatArguments {
  const void* x;
  void* out;
  uint8_t* codes;
  uint8_t* fields;
  unsigned long long* bad;  // at most the first index of a number that is not finite, within its block; or null
  long long n, row;         // elements, and those of a row
  long long first;          // where `any` begins: what stands before is done
  int blocks_per_row, block, bits, kind, scale_dtype, levels, high_first, divide;
  float cell_scale, cell_offset;  // of the table of cells
  float level[256], threshold[256];
};
static_assert(sizeof(FlatArguments) == 104 + 2048, "as in src/cuda/flat.rs");

#include "flat_plain.cuh"

namespace nqkv {

// Eight elements as they lie in memory, and as numbers.
template <class T> struct Eight {
  uint4 w[sizeof(T) / 2];

  DEVICE void load(const T* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 2); i++) w[i] = __ldcs((const uint4*)from + i);
  }
  DEVICE void numbers(float (&v)[8]) const {
    const uint32_t words[8] = {w[0].x, w[0].y, w[0].z, w[0].w, w[sizeof(T) / 4].x, w[sizeof(T) / 4].y, w[sizeof(T) / 4].z, w[sizeof(T) / 4].w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if constexpr (sizeof(T) == 4) v[j] = __uint_as_float(words[j]);
      else v[j] = number_in<T>(words[j / 2], j % 2);
    }
  }
};

// f over the lanes of a block: LANES, or `lanes` where that is 0.
template <int LANES, class F> DEVICE float over_lanes(float x, int lanes, F f) {
  if constexpr (LANES > 0) {
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2) x = f(x, __shfl_xor_sync(ALL, x, d));
  } else {
#pragma unroll 1
    for (int d = lanes / 2; d > 0; d /= 2) x = f(x, __shfl_xor_sync(ALL, x, d));
  }
  return x;
}

DEVICE float largest(const float (&v)[8], float zero) {
  float m = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) m = fmaxf(m, fabsf(v[i] - zero));
  return m;
}

// Fields of a block that `lanes` lanes hold, eight elements each; every lane gets them.
DEVICE Fields block_fields(const float (&v)[8], int lanes, int kind, int dtype) {
  auto over = [&](float x, auto f) { return over_lanes<0>(x, lanes, f); };
  auto larger = [](float a, float b) { return fmaxf(a, b); };
  // The fixed tree: lanes first, because the upper half of the block lies in the upper lanes.
  auto tree = [&](auto f) {
    float s[8];
#pragma unroll
    for (int i = 0; i < 8; i++) s[i] = f(v[i]);
#pragma unroll 1
    for (int d = lanes / 2; d > 0; d /= 2) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[i] += __shfl_xor_sync(ALL, s[i], d);
    }
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  };
  const float n = float(lanes * 8);
  if (kind == SIGNED_ABSMAX) {
    const float m = over(largest(v, 0.f), larger);
    float mine = 0.f;
    bool found = false;
#pragma unroll
    for (int i = 7; i >= 0; i--)
      if (fabsf(v[i]) == m) mine = v[i], found = true;
    const int base = threadIdx.x & 31 & ~(lanes - 1);
    const unsigned have = __ballot_sync(ALL, found) >> base & (ALL >> (32 - lanes));
    const float e = __shfl_sync(ALL, mine, base + __ffs(have) - 1);
    return {round_field(m > 0.f ? e : 0.f, dtype), 0.f};
  }
  if (kind == MINMAX) {
    float low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; i++) low = fminf(low, v[i]), high = fmaxf(high, v[i]);
    low = over(low, [](float a, float b) { return fminf(a, b); });
    high = over(high, larger);
    const float zero = round_field(low * 0.5f + high * 0.5f, dtype) + 0.f;
    return {round_field(fmaxf(high - zero, zero - low), dtype) + 0.f, zero};
  }
  if (kind == MEAN_ABSMAX) {
    const float zero = round_field(__fdiv_rn(tree([](float x) { return x; }), n), dtype);
    return {round_field(over(largest(v, zero), larger), dtype), zero};
  }
  float top = over(largest(v, 0.f), larger);
  if (kind == RMS && top != 0.f) {
    top = fmaxf(top, 1e-38f);
    const float r = __frcp_rn(top);
    top = top * __fsqrt_rn(__fdiv_rn(tree([&](float x) { return (x * r) * (x * r); }), n));
  }
  return {round_field(top, dtype), 0.f};
}

// Codes of eight numbers, and their block's fields.
DEVICE void quantize_eight(const FlatArguments& a, uint32_t cells, const float (&v)[8], int lane, int lanes, long long i, bool write) {
  const Fields f = block_fields(v, lanes, a.kind, a.scale_dtype);
  float top = 0.f;  // not finite if a number of the eight is not
#pragma unroll
  for (int j = 0; j < 8; j++) top = larger_or_nan(top, fabsf(v[j]));
  const float r = inverse(f.scale), cell_scale = r * a.cell_scale;
  uint32_t word = 0;
#pragma unroll
  for (int j = 7; j >= 0; j--) push_code(word, cells, (v[j] - f.zero) * r, v[j] - f.zero, cell_scale, a.cell_offset);
  if (a.high_first) word = (word & 0x0f0f0f0f) << 4 | (word >> 4 & 0x0f0f0f0f);
  if (!write) return;
  ((uint32_t*)a.codes)[i] = word;
  if ((lane & (lanes - 1)) == 0) {
    const int bytes = bytes_of(a.scale_dtype), kinds = fields_of(a.kind);
    uint8_t* to = a.fields + i / lanes * (kinds * bytes);
    write_field(to, f.scale, a.scale_dtype);
    if (kinds == 2) write_field(to + bytes, f.zero, a.scale_dtype);
  }
  if (!(top <= 3.402823466e38f)) report(a.bad, 8 * i);
}

// Blocks of any kind and dtype: a lane for eight elements.
template <class T> DEVICE void quantize_fast(const FlatArguments& a) {
  __shared__ float2 table[CELLS * 32];
  fill_cells(table, a.threshold, a.levels, a.cell_scale, a.cell_offset);
  __syncthreads();
  const int lane = threadIdx.x & 31, lanes = a.block / 8;
  const uint32_t cells = cells_of_lane(table);
  const long long eights = a.first / 8, stride = (long long)gridDim.x * blockDim.x;
#pragma unroll 1
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i - lane < eights; i += stride) {
    float v[8];
    Eight<T> held = {};
    if (i < eights) held.load((const T*)a.x + 8 * i);
    held.numbers(v);
    quantize_eight(a, cells, v, lane, lanes, i, i < eights);
  }
}

template <class T> DEVICE void store_eight(T* to, const float (&v)[8]) {
  if constexpr (sizeof(T) == 2) {
    T h[8];
#pragma unroll
    for (int j = 0; j < 8; j++) h[j] = from_float<T>(v[j]);
    __stcs((uint4*)to, *(uint4*)h);
  } else {
    __stcs((uint4*)to, *(const uint4*)v);
    __stcs((uint4*)to + 1, *(const uint4*)(v + 4));
  }
}

// 4-bit codes of whole blocks, a lane for eight codes; levels stand in the lanes' registers. PLAIN: see flat_plain.cuh.
template <class T, bool PLAIN> DEVICE void dequantize_fast(const FlatArguments& a) {
  constexpr int AHEAD = 4;
  const int lane = threadIdx.x & 31, bytes = bytes_of(a.scale_dtype), kinds = fields_of(a.kind);
  const float level = a.level[min(lane % 16, a.levels - 1)];
  const uint32_t eights = uint32_t(a.first / 8), per = PLAIN ? 8 : a.block / 8, stride = gridDim.x * blockDim.x * AHEAD;
  for (uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x & ~31) * AHEAD; first < eights; first += stride) {
    uint32_t words[AHEAD] = {};
    Fields fields[AHEAD] = {};
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const uint32_t i = first + 32 * k + lane;
      if (i >= eights) break;
      words[k] = __ldcs((const uint32_t*)a.codes + i);
      if constexpr (PLAIN) {
        fields[k].scale = __ldg((const float*)a.fields + i / per);
      } else {
        const uint8_t* from = a.fields + (long long)(i / per) * (kinds * bytes);
        fields[k] = {read_field(from, a.scale_dtype), kinds == 2 ? read_field(from + bytes, a.scale_dtype) : 0.f};
      }
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      const uint32_t i = first + 32 * k + lane;
      uint32_t w = words[k];
      if (a.high_first) w = (w & 0x0f0f0f0f) << 4 | (w >> 4 & 0x0f0f0f0f);
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = __fmaf_rn(__shfl_sync(ALL, level, w >> 4 * j), fields[k].scale, fields[k].zero);
      if (i < eights) store_eight((T*)a.out + 8ll * i, v);
    }
  }
}

template <class T> DEVICE void dequantize(const FlatArguments& a) {
  if (a.block == 64 && a.scale_dtype == FP32 && fields_of(a.kind) == 1) dequantize_fast<T, true>(a);
  else dequantize_fast<T, false>(a);
}

// The block in which an element lies.
struct Place {
  long long number, start, end;

  DEVICE Place(const FlatArguments& a, long long e) {
    const long long r = e / a.row, b = (e - r * a.row) / a.block;
    number = r * a.blocks_per_row + b;
    start = r * a.row + b * a.block;
    end = min(start + a.block, (r + 1) * a.row);
  }
};

// Fields of any block: one warp each.
template <class T> DEVICE void fields_any(const FlatArguments& a) {
  __shared__ float room[4][2][MAX_BLOCK];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, bytes = bytes_of(a.scale_dtype), kinds = fields_of(a.kind);
  const long long blocks = a.n / a.row * a.blocks_per_row, done = a.first / a.block;
  for (long long b = done + (long long)blockIdx.x * 4 + warp; b < blocks; b += (long long)gridDim.x * 4) {
    const long long r = b / a.blocks_per_row, start = r * a.row + (b - r * a.blocks_per_row) * a.block;
    const int n = int(min((long long)a.block, (r + 1) * a.row - start));
    const T* x = (const T*)a.x + start;
    const Fields f =
        fields_by_warp(room[warp][0], room[warp][1], n, a.kind, a.scale_dtype, [&](int i) { return to_float(x[i]); });
    for (int i = lane; i < n; i += 32)
      if (!(fabsf(to_float(x[i])) <= 3.402823466e38f)) report(a.bad, start + i);
    if (lane == 0) {
      uint8_t* to = a.fields + b * (kinds * bytes);
      write_field(to, f.scale, a.scale_dtype);
      if (kinds == 2) write_field(to + bytes, f.zero, a.scale_dtype);
    }
    __syncwarp();
  }
}

DEVICE Fields fields_at(const FlatArguments& a, long long number) {
  const int bytes = bytes_of(a.scale_dtype), kinds = fields_of(a.kind);
  const uint8_t* from = a.fields + number * (kinds * bytes);
  return {read_field(from, a.scale_dtype), kinds == 2 ? read_field(from + bytes, a.scale_dtype) : 0.f};
}

// Codes of any spec: a thread for eight elements, whose codes are `bits` whole bytes.
template <class T> DEVICE void codes_any(const FlatArguments& a) {
  const long long total = (a.n * a.bits + 7) / 8;
  for (long long g = a.first / 8 + (long long)blockIdx.x * blockDim.x + threadIdx.x; 8 * g < a.n;
       g += (long long)gridDim.x * blockDim.x) {
    unsigned long long word = 0;
    Place place(a, 8 * g);
#pragma unroll 1
    for (int j = 0; j < 8; j++) {
      const long long e = 8 * g + j;
      uint32_t code = 0;
      if (e < a.n) {
        if (e == place.end) place = Place(a, e);
        const Fields f = fields_at(a, place.number);
        const float x = to_float(((const T*)a.x)[e]);
        const bool divide = a.divide && place.end - place.start < a.block;
        const float v = divide ? __fdiv_rn(x, fmaxf(f.scale, 1e-38f)) : (x - f.zero) * inverse(f.scale);
        code = count_below(v, a.threshold, a.levels);
      } else if (a.divide && j % 2 == 1 && e == a.n) {
        code = count_below(0.f, a.threshold, a.levels);  // the unused nibble of bitsandbytes
      }
      word |= (unsigned long long)code << (a.high_first ? (j ^ 1) * 4 : j * a.bits);
    }
#pragma unroll 1
    for (int i = 0; i < a.bits; i++)
      if (g * a.bits + i < total) a.codes[g * a.bits + i] = uint8_t(word >> (8 * i));
  }
}

template <class T> DEVICE void values_any(const FlatArguments& a) {
  for (long long e = a.first + (long long)blockIdx.x * blockDim.x + threadIdx.x; e < a.n;
       e += (long long)gridDim.x * blockDim.x) {
    const long long bit = e * a.bits;
    uint32_t code;
    if (a.high_first) {
      code = a.codes[e / 2] >> (e % 2 ? 0 : 4) & 15;
    } else {
      uint32_t word = a.codes[bit / 8];
      if (bit % 8 + a.bits > 8) word |= uint32_t(a.codes[bit / 8 + 1]) << 8;
      code = word >> (bit % 8) & ((1u << a.bits) - 1);
    }
    const Fields f = fields_at(a, Place(a, e).number);
    ((T*)a.out)[e] = from_float<T>(__fmaf_rn(a.level[min(code, uint32_t(a.levels - 1))], f.scale, f.zero));
  }
}

}  // namespace nqkv
using namespace nqkv;

#define KERNELS(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256, 3) flat_quantize_##NAME(const __grid_constant__ FlatArguments a) { quantize_plain<T>(a); } \
  extern "C" __global__ void __launch_bounds__(256) flat_quantize_fields_##NAME(const __grid_constant__ FlatArguments a) { quantize_fast<T>(a); } \
  extern "C" __global__ void __launch_bounds__(256) flat_dequantize_##NAME(const __grid_constant__ FlatArguments a) { dequantize<T>(a); } \
  extern "C" __global__ void __launch_bounds__(128) flat_fields_any_##NAME(const __grid_constant__ FlatArguments a) { fields_any<T>(a); } \
  extern "C" __global__ void __launch_bounds__(256) flat_codes_any_##NAME(const __grid_constant__ FlatArguments a) { codes_any<T>(a); } \
  extern "C" __global__ void __launch_bounds__(256) flat_values_any_##NAME(const __grid_constant__ FlatArguments a) { values_any<T>(a); }
KERNELS(f32, float)
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
