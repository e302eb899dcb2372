// Decode attention on pages with groups of 32 tokens and zero points, head size 64, with the bulk copies of Hopper: attend_grouped.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 40
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND_GROUPED(attend_kivi_64, 64, true)
ATTEND_GROUPED_2(attend_kivi_k2v2_64, 64, true)
