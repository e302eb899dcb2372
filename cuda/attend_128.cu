// Decode attention on pages, head size 128: attend_kernel.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 72
#include "attend_kernel.cuh"

ATTEND(attend_channel_128, 128, false, 4, false)
ATTEND(attend_token_128, 128, true, 8, false)
