// Decode attention on pages, head size 256: attend_kernel.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 144
#include "attend_kernel.cuh"

ATTEND(attend_channel_256, 256, false, 4)
ATTEND(attend_token_256, 256, true, 16)
