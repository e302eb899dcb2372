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

// Changes `x`, dim numbers in shared memory that this warp has written.
DEVICE void transform_row(const Transform& a, float* x, int dim, int b, int h, int t) {
  const int lane = threadIdx.x & 31;
  __syncwarp();
  if (a.cos) {
    const long long at = ((long long)(a.rope_batch == 1 ? 0 : b) * a.tokens + t) * a.pairs;
#pragma unroll 1
    for (int k = lane; k < a.pairs; k += 32) {
      const int i = a.interleaved ? 2 * k : k, j = a.interleaved ? 2 * k + 1 : a.pairs + k;
      const float c = a.cos[at + k], s = a.sin[at + k], p = x[i], q = x[j];
      x[i] = p * c - q * s;
      x[j] = q * c + p * s;
    }
    __syncwarp();
  }
  if (a.centre) {
#pragma unroll 1
    for (int i = lane; i < dim; i += 32) x[i] -= a.centre[h * dim + i];
    __syncwarp();
  }
  if (a.block == 0) return;
#pragma unroll 1
  for (int distance = 1; distance < a.block; distance *= 2) {
#pragma unroll 1
    for (int k = lane; k < dim / 2; k += 32) {
      const int i = k / distance * 2 * distance + k % distance;
      const float p = x[i], q = x[i + distance];
      x[i] = p + q;
      x[i + distance] = p - q;
    }
    __syncwarp();
  }
#pragma unroll 1
  for (int i = lane; i < dim; i += 32) x[i] *= a.unit;
  __syncwarp();
}
