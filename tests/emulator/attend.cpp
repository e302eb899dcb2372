// The kernels of cuda/attend_*.cu on a CPU, for tests/test_attend_emulated.py.
#include "simt.hpp"

#include <vector_types.h>
#include <vector_functions.h>
#define NQKV_EMULATED
#include "attend_kernel.cuh"

extern "C" int emulate(const AttendArguments* a, int dim, int per_token, int bulk, int blocks, int warps, int late, int first_address, unsigned seed) {
  nqkv::copies_come_late = late, nqkv::first_address = first_address;
  auto run = [&](auto shape) {
    run_grid(blocks, 32 * warps, [a] { nqkv::attend<decltype(shape)>(*a); }, nqkv::dynamic, sizeof nqkv::dynamic, seed);
    return 0;
  };
#define SHAPE(D, PER_TOKEN, BLOCK) \
  case D + 1000 * PER_TOKEN: return bulk ? run(nqkv::Shape<D, PER_TOKEN, BLOCK, true>()) : run(nqkv::Shape<D, PER_TOKEN, BLOCK, false>());
  switch (dim + 1000 * per_token) {
    SHAPE(64, false, 4)
    SHAPE(80, false, 4)
    SHAPE(96, false, 4)
    SHAPE(128, false, 4)
    SHAPE(256, false, 4)
    SHAPE(64, true, 4)
    SHAPE(128, true, 8)
    SHAPE(256, true, 16)
    default: return 1;
  }
}
