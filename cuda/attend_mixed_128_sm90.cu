// Decode attention on pages whose keys have slabs of several widths (at most 6, 4 in the mean) in an order of each head, head size 128, with the
// bulk copies of Hopper: attend_widths.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 32
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND_WIDE(attend_mixed_v2_128, 128, false, 4, true, nqkv::MIXED, 2)
ATTEND_WIDE(attend_mixed_v3_128, 128, false, 4, true, nqkv::MIXED, 3)
ATTEND_WIDE(attend_mixed_v4_128, 128, false, 4, true, nqkv::MIXED, 4)
