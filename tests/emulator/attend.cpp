// The kernels of cuda/attend_*.cu on a CPU, for tests/test_attend_emulated.py.
#include "simt.hpp"

#include <vector_types.h>
#include <vector_functions.h>
#define NQKV_EMULATED
#include "attend_kernel.cuh"

extern "C" int emulate(const AttendArguments* a, int dim, int kind, int bulk, int blocks, int warps, int late, int first_address, unsigned seed) {
  nqkv::copies_come_late = late, nqkv::first_address = first_address;
  auto run = [&](auto shape) {
    run_grid(blocks, 32 * warps, [a] { nqkv::attend<decltype(shape)>(*a); }, nqkv::dynamic, sizeof nqkv::dynamic, seed);
    return 0;
  };
#define SHAPE(D, PER_TOKEN, BLOCK) \
  case D + 1000 * PER_TOKEN: return bulk ? run(nqkv::Shape<D, PER_TOKEN, BLOCK, true>()) : run(nqkv::Shape<D, PER_TOKEN, BLOCK, false>());
// Kinds that are even have keys with fields per channel, odd ones with one scale per token. Twice ten times the bits of values plus
// 1 plus what Wide says of keys: other widths than 4.
#define WIDE(D, PER_TOKEN, BLOCK, KEY, VALUE)                                                                            \
  case D + 1000 * (PER_TOKEN + 2 * (10 * VALUE + KEY + 1)):                                                              \
    return bulk ? run(nqkv::Wide<D, PER_TOKEN, BLOCK, true, KEY, VALUE>()) : run(nqkv::Wide<D, PER_TOKEN, BLOCK, false, KEY, VALUE>());
#define MIXED_KEYS(D, KEY, VALUE) \
  case D + 1000 * 2 * (10 * VALUE + KEY + 1): return run(nqkv::Wide<D, false, 4, true, KEY, VALUE>());
// Zero points: kind 400, and 402 with codes of 2 bits; two scales of a token: kind 405. Ten times the type of a plain call more.
#define ZERO_POINTS(D, TYPE)              \
  case D + 1000 * (400 + 10 * TYPE):      \
    return bulk ? run(nqkv::Grouped<nqkv::Shape<D, false, 2, true, TYPE>>()) : run(nqkv::Grouped<nqkv::Shape<D, false, 2, false, TYPE>>());
#define ZERO_POINTS_2(D) \
  case D + 1000 * 402:   \
    return bulk ? run(nqkv::Grouped<nqkv::Wide<D, false, 2, true, 2, 2>>()) : run(nqkv::Grouped<nqkv::Wide<D, false, 2, false, 2, 2>>());
#define TWO_SCALES(D, TYPE) \
  case D + 1000 * (405 + 10 * TYPE): return bulk ? run(nqkv::Split<D, true, TYPE>()) : run(nqkv::Split<D, false, TYPE>());
  switch (dim + 1000 * kind) {
#ifdef WIDTHS
    WIDE(64, false, 4, 2, 2)
    WIDE(64, false, 4, 3, 3)
    WIDE(64, false, 4, 8, 8)
    WIDE(128, false, 4, 2, 2)
    WIDE(128, false, 4, 3, 3)
    WIDE(128, false, 4, 8, 8)
    WIDE(64, true, 4, 2, 2)
    WIDE(64, true, 4, 3, 3)
    WIDE(64, true, 4, 8, 8)
    WIDE(128, true, 8, 2, 2)
    MIXED_KEYS(64, nqkv::MIXED, 2)
    MIXED_KEYS(64, nqkv::MIXED, 3)
    MIXED_KEYS(64, nqkv::MIXED, 4)
    MIXED_KEYS(64, nqkv::MIXED8, 4)
    MIXED_KEYS(64, nqkv::MIXED8, 8)
    MIXED_KEYS(128, nqkv::MIXED, 2)
    MIXED_KEYS(128, nqkv::MIXED, 4)
    MIXED_KEYS(128, nqkv::MIXED8, 8)
#elif defined(GROUPS)
    ZERO_POINTS(64, 0)
    ZERO_POINTS(64, BF)
    ZERO_POINTS(128, 0)
    ZERO_POINTS(128, BF)
    ZERO_POINTS(128, F16)
    ZERO_POINTS_2(64)
    ZERO_POINTS_2(128)
#elif defined(TWO)
    TWO_SCALES(64, 0)
    TWO_SCALES(80, 0)
    TWO_SCALES(80, BF)
    TWO_SCALES(96, 0)
    TWO_SCALES(128, 0)
    TWO_SCALES(128, F16)
#else
    SHAPE(64, false, 4)
    SHAPE(80, false, 4)
    SHAPE(96, false, 4)
    SHAPE(128, false, 4)
    SHAPE(256, false, 4)
    SHAPE(64, true, 4)
    SHAPE(128, true, 8)
    SHAPE(256, true, 16)
#endif
    default: return 1;
  }
}
