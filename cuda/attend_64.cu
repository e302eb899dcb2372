// Decode attention on pages, head size 64: attend_kernel.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 36
#include "attend_kernel.cuh"

ATTEND(attend_channel_64, 64, false, 4, false)
ATTEND(attend_token_64, 64, true, 4, false)
