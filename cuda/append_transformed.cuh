// Tokens of 16-bit numbers that are transformed on their way into a cache, 8 numbers of a head to a lane: what cuda/transform.cu
// writes and an append reads again, bit for bit, without the trip to memory and without the launch.
#pragma once
#include "append.cuh"
#include "transform.cuh"

struct TransformedArguments {
  AppendArguments append;
  Transform side[2];
};
static_assert(sizeof(TransformedArguments) == sizeof(AppendArguments) + 2 * 48, "as in src/cuda/append.rs");

namespace nqkv {

// What an append does to its tokens: nothing. Kernels that do something are entry points of their own, so that those that do
// not stay what they are.
struct AsTheyCome {
  static constexpr bool TRANSFORMED = false;
};

DEVICE uint16_t bits_of(__half x) { return __half_as_ushort(x); }
DEVICE uint16_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
template <class T> DEVICE uint32_t pair_of(float low, float high) { return bits_of(from_float<T>(low)) | uint32_t(bits_of(from_float<T>(high))) << 16; }
template <class T> DEVICE void numbers_of(float (&v)[8], uint4 x) {
  const uint32_t w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int j = 0; j < 8; j++) v[j] = number_in<T>(w[j / 2], j % 2);
}

template <int N> DEVICE void floats_at(float (&v)[N], const float* from) {
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const float4 x = __ldg((const float4*)(from + j));
    v[j] = x.x, v[j + 1] = x.y, v[j + 2] = x.z, v[j + 3] = x.w;
  }
}

template <class T> struct Transformed {
  static constexpr bool TRANSFORMED = true;
  const Transform* side;

  // Numbers c..c + 8 of a head's token in `row`; the other half of a pair is read again, from wherever it is. All or none of the
  // eight turn: src/cuda/append.rs makes sure, and that angles and centres can be read 16 bytes at a time.
  DEVICE static void rope(float (&v)[8], const Transform& f, const uint8_t* row, int b, int t, int c) {
    const long long at = ((long long)(f.rope_batch == 1 ? 0 : b) * f.tokens + t) * f.pairs;
    if (f.interleaved) {
      float cos[4], sin[4];
      floats_at(cos, f.cos + at + c / 2), floats_at(sin, f.sin + at + c / 2);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float p = v[2 * j], q = v[2 * j + 1];
        v[2 * j] = p * cos[j] - q * sin[j];
        v[2 * j + 1] = q * cos[j] + p * sin[j];
      }
    } else {
      float cos[8], sin[8], other[8];
      const bool second = c >= f.pairs;
      const int i = second ? c - f.pairs : c;
      floats_at(cos, f.cos + at + i), floats_at(sin, f.sin + at + i);
      numbers_of<T>(other, __ldcg((const uint4*)(row + 2 * (second ? i : i + f.pairs))));
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float turned = other[j] * sin[j];
        v[j] = v[j] * cos[j] + (second ? turned : -turned);
      }
    }
  }

  // Numbers c..c + 8 of token t of head h of a side as a cache takes them. All of `lanes` call this together: at least those that
  // have the channels of one rotation, which lie side by side, from a multiple of their number. `active`: there are such channels.
  DEVICE uint4 number(const AppendSide& s, int value, int b, int h, int t, int c, bool active, uint32_t lanes) const {
    const Transform& f = side[value];
    const uint8_t* row = s.x + b * s.stride[0] + h * s.stride[1] + t * s.stride[2];
    const uint4 x = active ? __ldcg((const uint4*)(row + 2 * c)) : make_uint4(0, 0, 0, 0);
    if (!f.cos && !f.centre && f.block == 0) return x;
    float v[8];
    numbers_of<T>(v, x);
    if (f.cos && c < 2 * f.pairs && active) rope(v, f, row, b, t, c);
    if (f.centre && active) {
      float centre[8];
      floats_at(centre, f.centre + h * 16 * s.slabs + c);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] -= centre[j];
    }
    if (f.block != 0) {
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (j & distance) continue;
          const float p = v[j], q = v[j + distance];
          v[j] = p + q;
          v[j + distance] = p - q;
        }
      }
#pragma unroll 1
      for (int distance = 8; distance < f.block; distance *= 2) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const float other = __shfl_xor_sync(lanes, v[j], distance / 8);
          v[j] = c & distance ? other - v[j] : v[j] + other;
        }
      }
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] *= f.unit;
    }
    return make_uint4(pair_of<T>(v[0], v[1]), pair_of<T>(v[2], v[3]), pair_of<T>(v[4], v[5]), pair_of<T>(v[6], v[7]));
  }
};

}  // namespace nqkv
