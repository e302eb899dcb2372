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

namespace nqkv {

constexpr int WARPS = 8;

DEVICE float load(const uint8_t* data, long long at, int dtype) {
  switch (dtype) {
    case F64: return __double2float_rn(((const double*)data)[at]);
    case F32: return ((const float*)data)[at];
    case F16: return __half2float(((const __half*)data)[at]);
    default: return __bfloat162float(((const __nv_bfloat16*)data)[at]);
  }
}

DEVICE void store(uint8_t* data, long long at, int dtype, float x) {
  switch (dtype) {
    case F64: ((double*)data)[at] = x; break;
    case F32: ((float*)data)[at] = x; break;
    case F16: ((__half*)data)[at] = __float2half_rn(x); break;
    default: ((__nv_bfloat16*)data)[at] = __float2bfloat16_rn(x);
  }
}

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(32 * WARPS) transform_rows(const __grid_constant__ TransformArguments a) {
  __shared__ float rows[WARPS][MAX_DIM];
  const int lane = threadIdx.x & 31;
  float* x = rows[threadIdx.x / 32];
  const long long all = (long long)a.batch * a.heads * a.tokens;
#pragma unroll 1
  for (long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32; row < all; row += (long long)gridDim.x * WARPS) {
    const int t = int(row % a.tokens), h = int(row / a.tokens % a.heads), b = int(row / a.tokens / a.heads);
    const long long from = b * a.stride[0] + h * a.stride[1] + t * a.stride[2];
#pragma unroll 1
    for (int i = lane; i < a.dim; i += 32) x[i] = load(a.x, from + i * a.stride[3], a.dtype);
    transform_row(a.transform, x, a.dim, b, h, t);
#pragma unroll 1
    for (int i = lane; i < a.dim; i += 32) store(a.out, row * a.dim + i, a.out_dtype, x[i]);
    __syncwarp();
  }
}
