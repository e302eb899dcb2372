// Decode attention on pages with groups of 32 tokens and zero points, head size 64: attend_grouped.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 40
#include "attend_kernel.cuh"

ATTEND_GROUPED(attend_kivi_64, 64, false)
ATTEND_GROUPED_2(attend_kivi_k2v2_64, 64, false)
