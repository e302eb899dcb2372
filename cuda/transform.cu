// Whole tensors through a transform: a warp for each token of a head.
// target: compute_80
// isa: 8.0
#include "page.cuh"
#include "transform.cuh"

struct TransformArguments {
  const uint8_t* x;
  long long stride[4];  // batch, heads, tokens, dim, in elements
  uint8_t* out;         // contiguous
  Transform transform;
  int batch, heads, tokens, dim, dtype, out_dtype;
};
static_assert(sizeof(Transform) == 48 && sizeof(TransformArguments) == 48 + 48 + 24, "as in src/cuda/transform.rs");

template <> DEVICE double from_float(float x) { return x; }

namespace nqkv {

constexpr int WARPS = 8;

template <class T> DEVICE void write_numbers(const float (&v)[SHARE], T* to, int dim) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < SHARE; j++)
    if (lane + 32 * j < dim) to[lane + 32 * j] = from_float<T>(v[j]);
}

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(32 * WARPS) transform_rows(const __grid_constant__ TransformArguments a) {
  __shared__ float rooms[WARPS][MAX_DIM];
  float* room = rooms[threadIdx.x / 32];
  const long long all = (long long)a.batch * a.heads * a.tokens;
#pragma unroll 1
  for (long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32; row < all; row += (long long)gridDim.x * WARPS) {
    const int t = int(row % a.tokens), h = int(row / a.tokens % a.heads), b = int(row / a.tokens / a.heads);
    float v[SHARE];
    read_row(v, a.x, b * a.stride[0] + h * a.stride[1] + t * a.stride[2], a.stride[3], a.dim, a.dtype);
    transform_row(a.transform, v, room, a.dim, b, h, t);
    switch (a.out_dtype) {
      case F64: write_numbers(v, (double*)a.out + row * a.dim, a.dim); break;
      case F32: write_numbers(v, (float*)a.out + row * a.dim, a.dim); break;
      case F16: write_numbers(v, (__half*)a.out + row * a.dim, a.dim); break;
      default: write_numbers(v, (__nv_bfloat16*)a.out + row * a.dim, a.dim);
    }
  }
}
