// A step of decoding, cuda/append_tail.cuh, for every kind of scale and every block that fast ways into pages take.
// target: compute_80
// isa: 8.0
// expect: sm_90 LDG.E.128 >= 2
// expect: sm_90 STG.E.128 >= 2
// expect: sm_90 LDGSTS.E.BYPASS.128 >= 2
#include "append_tail.cuh"

namespace nqkv {

// Fields of a slab's channels and their codes: the same as seal_slab of cuda/seal.cu.
template <class T, int GROUPS> DEVICE void seal_channels(const AppendSide& s, uint8_t* half, uint32_t from, int slab, const Thresholds& thresholds) {
  const int lane = lane_of();
  uint32_t w[4][4];
#pragma unroll
  for (int p = 0; p < 4; p++) load_matrices<false>(w[p], from + in_half(16 * p + lane % 16, 2 * slab + lane / 16));
  // Number j of strip p is token lane / 4 + 16 p + 8 (j / 2 % 2), channel j % 2 + 2 (j / 4) of the lane's four.
  constexpr int STRIPS = 4 / GROUPS, N = 2 * STRIPS;
  uint32_t words[4] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    // Numbers are made again from their words, rather than kept in registers between passes.
    auto again = [&] {
#pragma unroll
      for (int i = 0; i < 4 * STRIPS; i++) asm volatile("" : "+r"(w[g * STRIPS + i / 4][i % 4]));
    };
    auto x = [&](int k, int i) { return number_in<T>(w[g * STRIPS + i / 2][i % 2 + k / 2 * 2], k % 2); };
    float m[4];
    Fields f = {0.f, 0.f};
    if (s.kind == SIGNED_ABSMAX) {
      uint32_t keys[4] = {};
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int i = 0; i < N; i++)
          keys[k] = max(keys[k], extreme_key<T>(w[g * STRIPS + i / 2][i % 2 + k / 2 * 2], k % 2, 8 * i + lane / 4));
      }
      f.scale = round_wide(extreme<T>(gather(keys, Larger())), s.scale_dtype);
    } else if (s.kind == MINMAX) {
      float low[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        m[k] = low[k] = x(k, 0);
#pragma unroll
        for (int i = 1; i < N; i++) m[k] = fmaxf(m[k], x(k, i)), low[k] = fminf(low[k], x(k, i));
      }
      f = middle(gather(m, Larger()), gather(low, Smaller()), s.scale_dtype);
    } else {
      if (s.kind == MEAN_ABSMAX) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float t[N / 2];
#pragma unroll
          for (int i = 0; i < N / 2; i++) t[i] = x(k, i) + x(k, i + N / 2);
          if constexpr (N == 8) m[k] = (t[0] + t[2]) + (t[1] + t[3]);
          else m[k] = t[0] + t[1];
        }
        // Exactly the quotient: the number of tokens is a power of two.
        f.zero = round_wide(gather(m, Sum()) * (float(GROUPS) / PAGE_TOKENS), s.scale_dtype);
      }
      float zero[4];
      spread(zero, f.zero);
      again();
#pragma unroll
      for (int k = 0; k < 4; k++) {
        m[k] = 0.f;
#pragma unroll
        for (int i = 0; i < N; i++) m[k] = fmaxf(m[k], fabsf(x(k, i) - zero[k]));
      }
      f.scale = round_wide(gather(m, Larger()), s.scale_dtype);
    }
    float zero[4], r[4];
    spread(zero, f.zero);
    spread(r, inverse(f.scale));
    again();
    const int k = own<4>(), place = s.fields * (16 * (slab + g * s.slabs) + 4 * (lane % 4)) + k;
    if (!writes_zero<4>()) write_wide(half + s.code_bytes + s.field_size * place, f.scale, s.scale_dtype);
    else if (s.fields == 2) write_wide(half + s.code_bytes + s.field_size * (place + 4), f.zero, s.scale_dtype);
#pragma unroll
    for (int p = 0; p < STRIPS; p++) {
#pragma unroll
      for (int j = 7; j >= 0; j--) {
        const int c = j % 2 + j / 4 * 2;
        words[g * STRIPS + p] = words[g * STRIPS + p] * 16 + thresholds.below((number_in<T>(w[g * STRIPS + p][j / 2], j % 2) - zero[c]) * r[c]);
      }
    }
  }
  ((uint4*)(half + 512 * slab))[lane] = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T, int GROUPS> DEVICE void seal_slabs(const AppendSide& s, const Group& group, uint8_t* half, uint32_t from, const Thresholds& thresholds) {
#pragma unroll 1
  for (int slab = group.warp(); slab < s.slabs; slab += Group::WARPS) seal_channels<T, GROUPS>(s, half, from, slab, thresholds);
}

// Fields of 16 tokens in one block of channels, and their codes into `codes`, 512 bytes for each slab.
template <class T, bool VALUE>
DEVICE void seal_tokens(const AppendSide& s, uint8_t* half, uint32_t from, int strip, int block, const Thresholds& thresholds, uint32_t codes) {
  constexpr int COUNT = VALUE ? 4 : 2;
  const int lane = lane_of(), row = 16 * strip + (VALUE ? lane % 8 + lane / 16 * 8 : lane % 16), second = VALUE ? lane / 8 % 2 : lane / 16;
  const int start = block * s.block, end = min(start + s.block, s.slabs);
  // The token of statistics k; which k number j of a word belongs to.
  auto slot_of = [&](int k) { return 16 * strip + (VALUE ? lane % 4 * 2 + k % 2 + k / 2 * 8 : lane / 4 + 8 * k); };
  constexpr auto which = [](int j) { return VALUE ? j % 2 + j / 4 * 2 : j / 2 % 2; };
  float m[COUNT], low[COUNT];
  uint32_t keys[COUNT], w[4];
#pragma unroll
  for (int k = 0; k < COUNT; k++) m[k] = s.kind == MINMAX ? -INFINITY : 0.f, low[k] = INFINITY, keys[k] = 0;
#pragma unroll 1
  for (int slab = start; slab < end; slab++) {
    load_matrices<VALUE>(w, from + in_half(row, 2 * slab + second));
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float x = number_in<T>(w[j / 2], j % 2);
      if (s.kind == SIGNED_ABSMAX) {
        const int c = 16 * (slab - start) + (VALUE ? lane / 4 + j / 2 % 2 * 8 : lane % 4 * 2 + j % 2 + j / 4 * 8);
        keys[which(j)] = max(keys[which(j)], extreme_key<T>(w[j / 2], j % 2, c));
      } else if (s.kind == MINMAX) {
        m[which(j)] = fmaxf(m[which(j)], x), low[which(j)] = fminf(low[which(j)], x);
      } else {
        m[which(j)] = fmaxf(m[which(j)], fabsf(x));
      }
    }
  }
  Fields f = {0.f, 0.f};
  if (s.kind == SIGNED_ABSMAX) f.scale = round_wide(extreme<T>(gather(keys, Larger())), s.scale_dtype);
  else if (s.kind == MINMAX) f = middle(gather(m, Larger()), gather(low, Smaller()), s.scale_dtype);
  else f.scale = round_wide(gather(m, Larger()), s.scale_dtype);
  float zero[COUNT], r[COUNT];
  spread(zero, f.zero);
  spread(r, inverse(f.scale));
  const int slot = slot_of(own<COUNT>()), place = s.fields * s.blocks * (8 * (slot % 8) + 2 * (slot / 16) + slot / 8 % 2) + block;
  if (!writes_zero<COUNT>()) write_wide(half + s.code_bytes + s.field_size * place, f.scale, s.scale_dtype);
  else if (s.fields == 2) write_wide(half + s.code_bytes + s.field_size * (place + s.blocks), f.zero, s.scale_dtype);
#pragma unroll 1
  for (int slab = start; slab < end; slab++) {
    load_matrices<VALUE>(w, from + in_half(row, 2 * slab + second));
    uint32_t word = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--) word = word * 16 + thresholds.below((number_in<T>(w[j / 2], j % 2) - zero[which(j)]) * r[which(j)]);
    keep_codes(codes, slab, strip, word);
  }
}

template <class T> struct SealAny {
  static constexpr int SHARED = 256;
  static DEVICE void prepare(const AppendArguments& a, uint8_t* shared) {
    if (threadIdx.x < 32) ((float*)shared)[threadIdx.x] = a.side[threadIdx.x / 16].threshold[threadIdx.x % 16];
  }
  template <bool VALUE>
  static DEVICE void seal(const AppendArguments&, const AppendSide& s, const Group& group, uint8_t* half, uint32_t from, uint32_t codes, uint8_t* shared) {
    const Thresholds t((const float*)shared + 16 * VALUE);
    if constexpr (!VALUE) {
      if (s.block == 0) {
        if (s.groups == 1) seal_slabs<T, 1>(s, group, half, from, t);
        else seal_slabs<T, 2>(s, group, half, from, t);
        return;
      }
    }
#pragma unroll 1
    for (int i = group.warp(); i < 4 * s.blocks; i += Group::WARPS) seal_tokens<T, VALUE>(s, half, from, i % 4, i / 4, t, codes);
  }
};

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(512, 1) append_any_f16(const __grid_constant__ AppendArguments a) { append_tail<SealAny<__half>>(a, AsTheyCome()); }
extern "C" __global__ void __launch_bounds__(512, 1) append_any_bf16(const __grid_constant__ AppendArguments a) { append_tail<SealAny<__nv_bfloat16>>(a, AsTheyCome()); }
extern "C" __global__ void __launch_bounds__(512, 1) append_any_transformed_f16(const __grid_constant__ TransformedArguments a) { append_tail<SealAny<__half>>(a.append, Transformed<__half>{a.side}); }
extern "C" __global__ void __launch_bounds__(512, 1) append_any_transformed_bf16(const __grid_constant__ TransformedArguments a) { append_tail<SealAny<__nv_bfloat16>>(a.append, Transformed<__nv_bfloat16>{a.side}); }
