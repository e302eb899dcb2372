// Decode attention on pages of 3 bits, head size 64, with the bulk copies of Hopper: attend_widths.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 36
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND_WIDE(attend_channel_k3v3_64, 64, false, 4, true, 3, 3)
ATTEND_WIDE(attend_token_k3v3_64, 64, true, 4, true, 3, 3)
