// Decode attention on pages of 2 bits, head size 128, with the bulk copies of Hopper: attend_widths.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 72
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND_WIDE(attend_channel_k2v2_128, 128, false, 4, true, 2, 2)
ATTEND_WIDE(attend_token_k2v2_128, 128, true, 8, true, 2, 2)
