// Decode attention on pages, head size 80: attend_kernel.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 45
#include "attend_kernel.cuh"

ATTEND(attend_channel_80, 80, false, 4, false)
