// A step of decoding for schemes that write single slots: every token's codes go straight into an open page, in one launch. For
// 16-bit tokens and 4-bit slabs in the model's channel order, blocks of up to 256 channels; cuda/append.cu has the others.
// target: compute_80
// isa: 8.0
// expect: sm_90 LDG.E.128 >= 2
#include "append_transformed.cuh"

namespace nqkv {

constexpr int WARPS = 8, THREADS = 32 * WARPS;

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
  if (s.kind == ABSMAX) {
    // Zeros, if not active.
    float m = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) m = fmaxf(m, fabsf(number_in<T>(w[j / 2], j % 2)));
    return {round_wide(over_lanes(m, s.lanes, Larger()), s.scale_dtype), 0.f};
  }
  if (s.kind == SIGNED_ABSMAX) {
    uint32_t key = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) key = max(key, extreme_key<T>(w[j / 2], j % 2, at + j));
    return {round_wide(extreme<T>(over_lanes(active ? key : 0, s.lanes, Larger())), s.scale_dtype), 0.f};
  }
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float x = number_in<T>(w[j / 2], j % 2);
    high = fmaxf(high, x), low = fminf(low, x);
  }
  return middle(over_lanes(active ? high : -INFINITY, s.lanes, Larger()), over_lanes(active ? low : INFINITY, s.lanes, Smaller()), s.scale_dtype);
}

// A lane's 8 codes of keys: a byte holds two channels of a token.
DEVICE void put_key_codes(uint8_t* half, int c, int n, uint32_t codes) {
  uint8_t* to = half + 512 * (c / 16) + 64 * (n % 8) + 4 * (n / 16) + 2 * (c / 8 % 2) + n / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4; i++) to[16 * i] = uint8_t(codes >> 8 * i);
}

// Bits of a word in memory. What else is there has not been read, and nothing waits until it is.
DEVICE void clear_and_set(uint32_t* to, uint32_t clear, uint32_t set) {
  asm volatile("red.relaxed.gpu.global.and.b32 [%0], %1;" ::"l"(to), "r"(~clear) : "memory");
  asm volatile("red.relaxed.gpu.global.or.b32 [%0], %1;" ::"l"(to), "r"(set) : "memory");
}

// Those of values: a byte holds two tokens of a channel, and two channels that lie 8 apart are neighbours, so that two lanes
// share what they write.
DEVICE void put_value_codes(uint8_t* half, int c, int n, uint32_t codes, bool active) {
  const bool second = c / 8 % 2;
  const uint32_t theirs = __shfl_xor_sync(ALL, codes, 1), low = second ? theirs >> 16 : codes, high = second ? codes >> 16 : theirs;
  if (!active) return;
  uint8_t* to = half + 512 * (c / 16) + 64 * (second * 4) + 16 * (n % 8 / 2) + 4 * (n / 16);
  const int which = n / 8 % 2;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t both = (low >> 4 * i & 15) | (high >> 4 * i & 15) << 8;
    // Before an even token the byte holds nothing that counts.
    if (n % 2 == 0) *(uint16_t*)(to + 64 * i + 2 * which) = uint16_t(both);
    else clear_and_set((uint32_t*)(to + 64 * i), 0xf0f0u << 16 * which, both << (16 * which + 4));
  }
}

// A sequence's open page and the one after it. Which they are is in the counts; the table is read while those come, a place or
// more by each thread, rather than after them: a trip to memory less.
struct Entries {
  static constexpr int EACH = 4;
  unsigned long long held[EACH];

  DEVICE Entries(const unsigned long long* table, long long capacity) {
#pragma unroll
    for (int k = 0; k < EACH; k++) held[k] = threadIdx.x + k * THREADS < capacity ? __ldcg(table + threadIdx.x + k * THREADS) : 0;
  }
  // Those before and at place `pages`, for all threads after the next barrier.
  DEVICE void show(unsigned long long (&around)[2], const unsigned long long* table, long long capacity, int pages) const {
#pragma unroll
    for (int k = 0; k < EACH; k++) {
      const int i = threadIdx.x + k * THREADS - pages + 1;
      if (i == 0 || i == 1) around[i] = held[k];
    }
    if (threadIdx.x != 0) return;
    if (pages == 0) around[0] = 0;
    if (pages > EACH * THREADS) around[0] = __ldcg(table + pages - 1);
    if (pages >= EACH * THREADS) around[1] = pages < capacity ? __ldcg(table + pages) : 0;
  }
};

template <class T, class How> DEVICE void append_slots(const AppendArguments& a, const How& how) {
  const int b = blockIdx.y, lane = lane_of();
  const int4 n = __ldcg(a.counts + b);
  unsigned long long* table = a.table + b * a.capacity;
  const Entries entries(table, a.capacity);
  __shared__ float thresholds[2][16];
  const float threshold = __ldg(a.side[lane / 16].threshold + lane % 16);
  // Warps' work: blocks of keys, as many as fit side by side, then those of values.
  const int keys = a.side[0].works, works = keys + a.side[1].works, first = blockIdx.x * WARPS + threadIdx.x / 32;
  // The lane's 8 channels in a piece of work. No integer division: the first load waits for this.
  int h = 0, c = 0, at = 0, block = 0;
  bool active = false;
  auto locate = [&](int work) {
    const AppendSide& s = a.side[work >= keys];
    const int k = ((work >= keys ? work - keys : work) * 32 + lane) >> (31 - __clz(s.lanes)), domain = quotient(k, s.by_per);
    const int start = domain * s.domain + (k - domain * s.per) * s.block, end = min(start + s.block, (domain + 1) * s.domain);
    at = (lane & (s.lanes - 1)) * 8;
    const int slab = start + at / 16;
    active = slab < end && domain * s.domain < s.slabs * a.heads;
    h = active ? quotient(slab, s.by_slabs) : 0, c = at % 16 + (active ? 16 * (slab - h * s.slabs) : 0);
    // A block over several heads is counted over all, and has its place in each.
    block = k - (s.domain == s.slabs ? domain * s.per : quotient(h * s.slabs, s.by_block));
  };
  auto input = [&](int value, int t) {
    const AppendSide& s = a.side[value];
    // A rotation's channels are neighbours in a warp: src/cuda/append.rs makes sure.
    if constexpr (How::TRANSFORMED) return how.number(s, value, b, h, t, c, active, ALL);
    // Lanes without channels read some of head 0, so that nothing branches before the load.
    const uint4 x = __ldcg((const uint4*)(s.x + b * s.stride[0] + h * s.stride[1] + t * s.stride[2] + 2 * c));
    return active ? x : make_uint4(0, 0, 0, 0);
  };
  locate(min(first, works - 1));
  const uint4 ahead = input(first >= keys, 0);

  if (threadIdx.x < 32) thresholds[lane / 16][lane % 16] = threshold;
  __shared__ unsigned long long around[2];
  entries.show(around, table, a.capacity, n.y);
  __syncthreads();
  const unsigned long long open = around[0], next = around[1] & ADDRESS;
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
  for (int work = first; work < works; work += WARPS * gridDim.x) {
    const bool value = work >= keys;
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
      const uint32_t w[4] = {x.x, x.y, x.z, x.w};
      const Fields f = fields_of_lanes<T>(s, w, at, active);
      const float r = inverse(f.scale);
      uint32_t codes = 0;
#pragma unroll
      for (int j = 7; j >= 0; j--) codes = codes * 16 + below.below((number_in<T>(w[j / 2], j % 2) - f.zero) * r);
      if (value) put_value_codes(half, c, slot, codes, active);
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
