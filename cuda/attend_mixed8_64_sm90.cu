// Decode attention on pages whose keys have slabs of several widths (at most 8) in an order of each head, head size 64, with the
// bulk copies of Hopper: attend_widths.cuh.
// target: compute_90
// isa: 8.0
// devices: sm_90
// expect: sm_90 HMMA.16816.F32 >= 16
// expect: sm_90 UBLKCP >= 4
#include "attend_kernel.cuh"

ATTEND_WIDE(attend_mixed8_v4_64, 64, false, 4, true, nqkv::MIXED8, 4)
ATTEND_WIDE(attend_mixed8_v8_64, 64, false, 4, true, nqkv::MIXED8, 8)
