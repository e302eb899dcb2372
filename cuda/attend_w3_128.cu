// Decode attention on pages of 3 bits, head size 128: attend_widths.cuh.
// target: compute_80
// isa: 8.0
// expect: sm_90 HMMA.16816.F32 >= 72
#include "attend_kernel.cuh"

ATTEND_WIDE(attend_channel_k3v3_128, 128, false, 4, false, 3, 3)
ATTEND_WIDE(attend_token_k3v3_128, 128, true, 8, false, 3, 3)
