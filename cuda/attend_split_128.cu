// Decode attention on pages with two scales of a token, head size 128: attend_split.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 64
#include "attend_kernel.cuh"

ATTEND_SPLIT(attend_split_128, 128, false)
