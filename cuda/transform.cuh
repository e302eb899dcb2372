// Rotary embedding, centring and Hadamard rotation of a token's head by one warp: src/transform.rs, bit for bit.
#pragma once
#include "codec.cuh"

struct Transform {
  const float *cos, *sin;  // [rope_batch][tokens][pairs], or null
  const float* centre;     // [heads][dim], or null
  int rope_batch, tokens, pairs, interleaved;
  int block;               // channels that are rotated together; 0: none
  float unit;
};

namespace nqkv {

// A warp's share of a head of up to 256 channels: number j of a lane is channel lane + 32 j.
constexpr int SHARE = 8;

template <class T> DEVICE void read_numbers(float (&v)[SHARE], const T* from, long long stride, int dim) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < SHARE; j++) v[j] = lane + 32 * j < dim ? float(from[(lane + 32 * j) * stride]) : 0.f;
}

// The numbers of a tensor's row, of which element `at` is the first.
DEVICE void read_row(float (&v)[SHARE], const uint8_t* data, long long at, long long stride, int dim, int dtype) {
  switch (dtype) {
    case F64: read_numbers(v, (const double*)data + at, stride, dim); break;
    case F32: read_numbers(v, (const float*)data + at, stride, dim); break;
    case F16: read_numbers(v, (const __half*)data + at, stride, dim); break;
    default: read_numbers(v, (const __nv_bfloat16*)data + at, stride, dim);
  }
}

// Transforms token t of head h. `room` is shared memory for dim numbers that no other warp uses.
DEVICE void transform_row(const Transform& a, float (&v)[SHARE], float* room, int dim, int b, int h, int t) {
  const int lane = threadIdx.x & 31;
  if (a.cos) {
#pragma unroll
    for (int j = 0; j < SHARE; j++)
      if (lane + 32 * j < dim) room[lane + 32 * j] = v[j];
    __syncwarp();
    const long long at = ((long long)(a.rope_batch == 1 ? 0 : b) * a.tokens + t) * a.pairs;
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
      const int i = lane + 32 * j;
      if (i >= 2 * a.pairs) continue;
      const bool second = a.interleaved ? i % 2 : i >= a.pairs;
      const int k = a.interleaved ? i / 2 : second ? i - a.pairs : i, other = a.interleaved ? i ^ 1 : second ? k : i + a.pairs;
      const float turned = room[other] * a.sin[at + k];
      v[j] = v[j] * a.cos[at + k] + (second ? turned : -turned);
    }
    __syncwarp();
  }
  if (a.centre) {
#pragma unroll
    for (int j = 0; j < SHARE; j++)
      if (lane + 32 * j < dim) v[j] -= a.centre[h * dim + lane + 32 * j];
  }
  if (a.block == 0) return;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= a.block) break;
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
      if (32 * j >= dim) break;
      const float other = __shfl_xor_sync(0xffffffff, v[j], distance);
      v[j] = lane & distance ? other - v[j] : v[j] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < SHARE; step *= 2) {
    if (32 * step >= a.block) break;
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
      if (j & step) continue;
      const float p = v[j], q = v[j + step];
      v[j] = p + q;
      v[j + step] = p - q;
    }
  }
#pragma unroll
  for (int j = 0; j < SHARE; j++) v[j] *= a.unit;
}

}  // namespace nqkv
