// Decode attention on pages, head size 256, with the bulk copies of Hopper: attend_kernel.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 144
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND(attend_channel_256, 256, false, 4, true)
ATTEND(attend_token_256, 256, true, 16, true)
