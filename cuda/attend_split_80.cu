// Decode attention on pages with two scales of a token, head size 80: attend_split.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 40
#include "attend_kernel.cuh"

ATTEND_SPLIT(attend_split_80, 80, false)
