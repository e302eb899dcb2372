// Strips of tokens in registers, and statistics over the lanes that share them: what cuda/seal.cu is built from.
#pragma once
#include "page.cuh"

namespace nqkv {

constexpr unsigned ALL = 0xffffffff;

DEVICE int lane_of() { return threadIdx.x & 31; }

// x over d, of numbers up to 2^13; `by` is ceil(2^31 / d), of src/cuda/paged.rs.
DEVICE int quotient(int x, uint32_t by) { return int(__umulhi(2 * uint32_t(x), by)); }

// 16 bytes to shared memory, zeros if not `take`.
DEVICE void copy_16(uint32_t to, const uint8_t* from, bool take) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(take ? 16 : 0) : "memory");
}

// Four 8 x 8 matrices of a strip: each lane gets two neighbours of a row of each, or of a column.
template <bool COLUMNS> DEVICE void load_matrices(uint32_t (&w)[4], uint32_t at) {
  if constexpr (COLUMNS) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(at) : "memory");
  }
}

// Statistics of 4 things that the 8 lanes of the same lane % 4 share, or of 2 that the 4 lanes of the same lane / 4 do. Each
// lane gets those of one of them, folded in the fixed order; `spread` hands them all to all.
template <class V, class F> DEVICE V gather(const V (&s)[4], F f) {
  const bool h = lane_of() & 16, e = lane_of() & 8;
  const V a = f(h ? s[2] : s[0], __shfl_xor_sync(ALL, h ? s[0] : s[2], 16));
  const V b = f(h ? s[3] : s[1], __shfl_xor_sync(ALL, h ? s[1] : s[3], 16));
  const V c = f(e ? b : a, __shfl_xor_sync(ALL, e ? a : b, 8));
  return f(c, __shfl_xor_sync(ALL, c, 4));
}
template <class V, class F> DEVICE V gather(const V (&s)[2], F f) {
  const bool h = lane_of() & 2;
  const V a = f(h ? s[1] : s[0], __shfl_xor_sync(ALL, h ? s[0] : s[1], 2));
  return f(a, __shfl_xor_sync(ALL, a, 1));
}
DEVICE void spread(float (&s)[4], float x) {
#pragma unroll
  for (int k = 0; k < 4; k++) s[k] = __shfl_sync(ALL, x, (lane_of() & 3) | k / 2 * 16 | k % 2 * 8);
}
DEVICE void spread(float (&s)[2], float x) {
#pragma unroll
  for (int k = 0; k < 2; k++) s[k] = __shfl_sync(ALL, x, (lane_of() & ~3) | k * 2);
}
// Which of them a lane holds, and whether it is the one of two that writes the scale, or the zero.
template <int COUNT> DEVICE int own() { return COUNT == 4 ? lane_of() / 8 : lane_of() / 2 % 2; }
template <int COUNT> DEVICE bool writes_zero() { return lane_of() & (COUNT == 4 ? 4 : 1); }

struct Larger {
  DEVICE float operator()(float x, float y) const { return fmaxf(x, y); }
  DEVICE uint32_t operator()(uint32_t x, uint32_t y) const { return max(x, y); }
};
struct Smaller {
  DEVICE float operator()(float x, float y) const { return fminf(x, y); }
};
struct Sum {
  DEVICE float operator()(float x, float y) const { return x + y; }
};

// The largest magnitude, then the first of its kind, then its sign, as one integer that grows with them.
template <class T> DEVICE uint32_t extreme_key(uint32_t word, int high, int index) {
  const uint32_t bits = high ? word >> 16 : word & 0xffff;
  return (bits & 0x7fff) << 16 | uint32_t(MAX_BLOCK - 1 - index) << 1 | bits >> 15;
}
template <class T> DEVICE float extreme(uint32_t key) {
  const uint32_t bits = key >> 16;
  return bits ? number_in<T>(bits | key << 15 & 0x8000, 0) : 0.f;
}

DEVICE Fields middle(float high, float low, int dtype) {
  const float zero = round_wide(low * 0.5f + high * 0.5f, dtype) + 0.f;
  return {round_wide(fmaxf(high - zero, zero - low), dtype) + 0.f, zero};
}

}  // namespace nqkv
