// Decode attention on pages, head size 96: attend_kernel.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 54
#include "attend_kernel.cuh"

ATTEND(attend_channel_96, 96, false, 4, false)
