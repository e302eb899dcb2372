// A step of decoding for schemes that write single slots: every token's codes go straight into an open page, in one launch. For
// 16-bit tokens and 4-bit slabs in the model's channel order, blocks of up to 256 channels; cuda/append.cu has the others.
// target: compute_80
// isa: 8.0
// expect: sm_90 LDG.E.128 >= 2
#include "append_transformed.cuh"

namespace nqkv {

constexpr int WARPS = 8;

// Statistics of a block over its lanes, a power of two of neighbours.
template <class V, class F> DEVICE V over_lanes(V x, int lanes, F f) {
#pragma unroll
  for (int k = 1; k < 32; k *= 2) {
    const V y = __shfl_xor_sync(ALL, x, k);
    if (k < lanes) x = f(x, y);
  }
  return x;
}

// Fields of a block, of which this lane has 8 numbers, the first of them at `at`; none if not `active`.
template <class T> DEVICE Fields fields_of_lanes(const AppendSide& s, const uint32_t (&w)[4], int at, bool active) {
  float m = s.kind == MINMAX ? -INFINITY : 0.f, low = INFINITY;
  uint32_t key = 0;
#pragma unroll
  for (int j = 0; j < (active ? 8 : 0); j++) {
    const float x = number_in<T>(w[j / 2], j % 2);
    if (s.kind == SIGNED_ABSMAX) key = max(key, extreme_key<T>(w[j / 2], j % 2, at + j));
    else if (s.kind == MINMAX) m = fmaxf(m, x), low = fminf(low, x);
    else m = fmaxf(m, fabsf(x));
  }
  if (s.kind == SIGNED_ABSMAX) return {round_wide(extreme<T>(over_lanes(key, s.lanes, Larger())), s.scale_dtype), 0.f};
  m = over_lanes(m, s.lanes, Larger());
  if (s.kind == MINMAX) return middle(m, over_lanes(low, s.lanes, Smaller()), s.scale_dtype);
  return {round_wide(m, s.scale_dtype), 0.f};
}

// Where a token goes.
struct Slot {
  uint8_t* page;
  int n;
};

// A lane's 8 codes of keys: a byte holds two channels of a token.
DEVICE void put_key_codes(uint8_t* half, int c, int n, uint32_t codes) {
  uint8_t* to = half + 512 * (c / 16) + 64 * (n % 8) + 4 * (n / 16) + 2 * (c / 8 % 2) + n / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4; i++) to[16 * i] = uint8_t(codes >> 8 * i);
}

// Those of values: a byte holds two tokens of a channel, and two channels that lie 8 apart are neighbours, so that two lanes
// share what they write.
struct ValueCodes {
  uint16_t* to;
  uint16_t old[4];
  DEVICE ValueCodes(uint8_t* half, int c, int n, bool active) {
    to = (uint16_t*)(half + 512 * (c / 16) + 64 * (c / 8 % 2 * 4) + 16 * (n % 8 / 2) + 4 * (n / 16) + 2 * (n / 8 % 2));
    // Before an even token the byte holds nothing that counts.
#pragma unroll
    for (int i = 0; i < 4; i++) old[i] = active && n % 2 ? to[32 * i] : 0;
  }
  DEVICE void put(int c, int n, uint32_t codes, bool active) const {
    const bool second = c / 8 % 2;
    const uint32_t theirs = __shfl_xor_sync(ALL, codes, 1), low = second ? theirs >> 16 : codes, high = second ? codes >> 16 : theirs;
    if (!active) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t both = (low >> 4 * i & 15) | (high >> 4 * i & 15) << 8;
      to[32 * i] = uint16_t(n % 2 ? (old[i] & 0x0f0f) | both << 4 : both);
    }
  }
};

template <class T, class How> DEVICE void append_slots(const AppendArguments& a, const How& how) {
  const int b = blockIdx.y, lane = lane_of();
  const int4 n = __ldcg(a.counts + b);
  unsigned long long* table = a.table + b * a.capacity;
  __shared__ float thresholds[2][16];
  if (threadIdx.x < 32) thresholds[threadIdx.x / 16][threadIdx.x % 16] = a.side[threadIdx.x / 16].threshold[threadIdx.x % 16];
  // Warps' work: blocks of keys, as many as fit side by side, then those of values.
  int works[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const AppendSide& s = a.side[i];
    const int blocks = (s.domain + s.block - 1) / s.block * (s.slabs * a.heads / s.domain);
    works[i] = (blocks * s.lanes + 31) / 32;
  }
  const int first = blockIdx.x * WARPS + threadIdx.x / 32;
  // The lane's 8 channels in a piece of work.
  int h = 0, c = 0, at = 0, block = 0;
  bool active = false;
  auto locate = [&](int work) {
    const AppendSide& s = a.side[work >= works[0]];
    const int per = (s.domain + s.block - 1) / s.block, k = ((work >= works[0] ? work - works[0] : work) * 32 + lane) / s.lanes, domain = k / per;
    const int start = 16 * (domain * s.domain + (k - domain * per) * s.block), end = min(start + 16 * s.block, 16 * (domain + 1) * s.domain);
    at = lane % s.lanes * 8;
    active = start + at < end && domain * s.domain < s.slabs * a.heads;
    h = active ? (start + at) / (16 * s.slabs) : 0, c = active ? start + at - h * 16 * s.slabs : at % 16;
    // A block over several heads is counted over all, and has its place in each.
    block = s.domain == s.slabs ? k - domain * per : k - h * s.slabs / s.block;
  };
  auto input = [&](int value, int t) {
    const AppendSide& s = a.side[value];
    // A rotation's channels are neighbours in a warp: src/cuda/append.rs makes sure.
    if constexpr (How::TRANSFORMED) return how.number(s, value, b, h, t, c, active, ALL);
    else return active ? __ldcg((const uint4*)(s.x + b * s.stride[0] + h * s.stride[1] + t * s.stride[2] + 2 * c)) : make_uint4(0, 0, 0, 0);
  };
  uint4 ahead = {};
  if (first < works[0] + works[1]) locate(first), ahead = input(first >= works[0], 0);

  const unsigned long long open = n.y > 0 ? __ldcg(table + n.y - 1) : 0, next = n.y < a.capacity ? __ldcg(table + n.y) & ADDRESS : 0;
  const int last = int(open >> 56), room = n.y > 0 && n.w ? PAGE_TOKENS - last : 0;
  const int skip = min(a.tokens, a.sink_slots - n.x), incoming = a.tokens - skip;
  // No page in reserve: the sequence stays as it is.
  if (incoming > room && next == 0) return;
  if (settles(a.arrived + b)) {
    if (room > 0 && incoming > 0) table[n.y - 1] = (open & ADDRESS) | (unsigned long long)(last + min(incoming, room)) << 56;
    if (incoming > room) table[n.y] = next | (unsigned long long)(incoming - room) << 56;
    a.counts[b] = make_int4(n.x + skip, n.y + (incoming > room), 0, n.w || incoming > 0);
  }
#pragma unroll 1
  for (int work = first; work < works[0] + works[1]; work += WARPS * gridDim.x) {
    const bool value = work >= works[0];
    const AppendSide& s = a.side[value];
    if (work != first) locate(work);
    const Thresholds below(thresholds[value]);
#pragma unroll 1
    for (int t = 0; t < a.tokens; t++) {
      const uint4 x = t == 0 && work == first ? ahead : input(value, t);
      if (t < skip) {
        if (active) *(uint4*)exact_at(s.sinks, a, a.sink_slots, b, n.x + t, h, 2 * s.slabs, c / 8) = x;
        continue;
      }
      const int i = t - skip, slot = i < room ? last + i : i - room;
      uint8_t* half = (uint8_t*)(i < room ? open & ADDRESS : next) + (long long)h * a.page_bytes + s.half_offset;
      // What is there is on its way while the statistics are made.
      const ValueCodes to(half, c, slot, active && value);
      const uint32_t w[4] = {x.x, x.y, x.z, x.w};
      const Fields f = fields_of_lanes<T>(s, w, at, active);
      const float r = inverse(f.scale);
      uint32_t codes = 0;
#pragma unroll
      for (int j = 7; j >= 0; j--) codes = codes * 16 + below.below((number_in<T>(w[j / 2], j % 2) - f.zero) * r);
      if (value) to.put(c, slot, codes, active);
      else if (active) put_key_codes(half, c, slot, codes);
      if (active && (at == 0 || c == 0)) {
        const int place = s.fields * s.blocks * (8 * (slot % 8) + 2 * (slot / 16) + slot / 8 % 2) + block;
        write_wide(half + s.code_bytes + s.field_size * place, f.scale, s.scale_dtype);
        if (s.fields == 2) write_wide(half + s.code_bytes + s.field_size * (place + s.blocks), f.zero, s.scale_dtype);
      }
    }
  }
}

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(256, 3) append_slots_f16(const __grid_constant__ AppendArguments a) { append_slots<__half>(a, AsTheyCome()); }
extern "C" __global__ void __launch_bounds__(256, 3) append_slots_bf16(const __grid_constant__ AppendArguments a) { append_slots<__nv_bfloat16>(a, AsTheyCome()); }
extern "C" __global__ void __launch_bounds__(256, 3) append_slots_transformed_f16(const __grid_constant__ TransformedArguments a) { append_slots<__half>(a.append, Transformed<__half>{a.side}); }
extern "C" __global__ void __launch_bounds__(256, 3) append_slots_transformed_bf16(const __grid_constant__ TransformedArguments a) { append_slots<__nv_bfloat16>(a.append, Transformed<__nv_bfloat16>{a.side}); }
