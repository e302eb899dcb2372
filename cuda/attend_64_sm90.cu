// Decode attention on pages, head size 64, with the bulk copies of Hopper: attend_kernel.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 36
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND(attend_channel_64, 64, false, 4, true)
ATTEND(attend_token_64, 64, true, 4, true)
