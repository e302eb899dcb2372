// Decode attention on pages, head size 96, with the bulk copies of Hopper: attend_kernel.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 54
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND(attend_channel_96, 96, false, 4, true)
