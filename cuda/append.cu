// A step of decoding, cuda/append_tail.cuh, for keys of mean_absmax per channel and values of absmax per token, in blocks of 64
// with fp16 scales.
// target: compute_80
// isa: 8.0
// expect: sm_90 LDG.E.128 >= 2
// expect: sm_90 STG.E.128 >= 2
// expect: sm_90 LDGSTS.E.BYPASS.128 >= 2
// expect: sm_90 LDSM.16.M88.4 >= 8
#include "append_tail.cuh"
#include "seal.cuh"

namespace nqkv {

template <class T> struct SealFast {
  static constexpr int SHARED = 2 * CODES_BYTES;

  static DEVICE void prepare(const AppendArguments& a, uint8_t* shared) {
#pragma unroll 1
    for (int side = 0; side < 2 - a.one_book; side++) fill_codes((float2*)(shared + side * CODES_BYTES), a.side[side].threshold, 16);
  }

  template <bool VALUE>
  static DEVICE void seal(const AppendArguments& a, const AppendSide& s, const Group& group, uint8_t* half, uint32_t from, uint32_t codes, uint8_t* shared) {
    const Codes code((const float2*)(shared + (VALUE && !a.one_book ? CODES_BYTES : 0)));
    const int lane = lane_of();
    if constexpr (!VALUE) {
#pragma unroll 1
      for (int slab = group.warp(); slab < s.slabs; slab += Group::WARPS)
        seal_channel_slab<T>(from + in_half(lane % 16, 2 * slab + lane / 16), STRIP_BYTES, half + 512 * slab, half + s.code_bytes + 64 * slab, code);
    } else {
#pragma unroll 1
      for (int item = group.warp(); item < 4 * s.blocks; item += Group::WARPS) {
        const int strip = item % 4, block = item / 4;
        uint32_t w[4][4], words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (4 * block + i < s.slabs) load_matrices<true>(w[i], from + in_half(16 * strip + lane % 8 + lane / 16 * 8, 8 * block + 2 * i + lane / 8 % 2));
          else w[i][0] = w[i][1] = w[i][2] = w[i][3] = 0;
        }
        const float top = largest_of_tokens<T, true>(w), scale = rounded_scale(top);
        const int k = own<4>(), slot = 16 * strip + lane % 4 * 2 + k % 2 + k / 2 * 8;
        const int place = s.blocks * (8 * (slot % 8) + 2 * (slot / 16) + slot / 8 % 2) + block;
        if (!writes_zero<4>()) store_global(half + s.code_bytes + 2 * place, __float2half_rn(scale));
        codes_of_tokens<T, true>(w, top, scale, code, words);
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (4 * block + i < s.slabs) keep_codes(codes, 4 * block + i, strip, words[i]);
      }
    }
  }
};

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(512, 1) append_f16(const __grid_constant__ AppendArguments a) { append_tail<SealFast<__half>>(a, AsTheyCome()); }
extern "C" __global__ void __launch_bounds__(512, 1) append_bf16(const __grid_constant__ AppendArguments a) { append_tail<SealFast<__nv_bfloat16>>(a, AsTheyCome()); }
extern "C" __global__ void __launch_bounds__(512, 1) append_transformed_f16(const __grid_constant__ TransformedArguments a) { append_tail<SealFast<__half>>(a.append, Transformed<__half>{a.side}); }
extern "C" __global__ void __launch_bounds__(512, 1) append_transformed_bf16(const __grid_constant__ TransformedArguments a) { append_tail<SealFast<__nv_bfloat16>>(a.append, Transformed<__nv_bfloat16>{a.side}); }
