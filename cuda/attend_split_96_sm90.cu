// Decode attention on pages with two scales of a token, head size 96, with the bulk copies of Hopper: attend_split.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 48
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND_SPLIT(attend_split_96, 96, true)
