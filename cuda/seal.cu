// Tokens into pages, the fast way: what pages_seal does, for 16-bit tokens and 4-bit slabs in the model's channel order.
// target: compute_80
// isa: 8.0
// expect: sm_90 LDSM.16.M88.4 >= 8
// expect: sm_90 LDSM.16.MT88.4 >= 4
// expect: sm_90 LDGSTS.E.BYPASS.128 >= 8
//
// The channels of all heads stand in one row of slabs. A warp works on a strip: 16 tokens x 4 slabs, copied to shared memory
// two steps ahead, from where ldmatrix hands each lane the numbers of its bytes in fragment order. Per token: a warp, or a team
// of 2 or 4 where a block is longer than 4 slabs, goes through the four strips of a page, keeps the words of codes and stores 16
// bytes a lane. Per channel: four warps share four strips, a slab each, and go through four pages. Codes by a table of cells.
#include "page.cuh"
#include "strip.cuh"
#include "seal_arguments.cuh"

namespace nqkv {

constexpr int WARPS = 8, STAGES = 3, STRIP_TOKENS = 16, STRIP_BYTES = 16 * 128;
constexpr int TABLE_BYTES = CELLS * 32 * 8;

// One piece of work of a team. Slots count from the first token of its page (per channel: of its four pages).
struct Item {
  // The lane's 16 bytes of token 0 of the stream, if it came in, or stood in the tail; null if the lane has none.
  const uint8_t *input, *tail;
  int entry;                        // of its page in the tables
  int held, first, low, high;       // tokens of the tail; token of slot 0; slots that are written
  int slab, slabs;                  // this warp's first of the row, and how many
};

DEVICE Item item_of(const SealArguments& a, const SealSide& s, int number, int warp) {
  Item it;
  const int lane = lane_of(), rest = number / unsigned(s.tiles), tile = number - rest * s.tiles;
  const int b = rest / unsigned(s.units), unit = rest - b * s.units;
  const int domain = tile / unsigned(s.domain_tiles), start = (tile - domain * s.domain_tiles) * s.tile;
  const int have = min(s.tile, s.domain - start), v = domain * s.domain + start;
  const int4 n = __ldg(a.counts + b);
  const int skip = min(a.tokens, a.sink_slots - n.x), incoming = a.tokens - skip;
  const unsigned long long* table = a.table + b * a.capacity;
  int page = n.y;
  it.held = n.z;
  if (a.single_slots) {
    const int last = n.y > 0 ? int(__ldg(table + n.y - 1) >> 56) : PAGE_TOKENS, room = n.w ? PAGE_TOKENS - last : 0;
    if (room > 0) page--;
    page += unit;
    it.low = room > 0 && unit == 0 ? last : 0;
    it.first = room > 0 ? unit * PAGE_TOKENS - last : unit * PAGE_TOKENS;
    it.high = min(PAGE_TOKENS, incoming - it.first);
  } else {
    const int beyond = n.z + incoming - a.window, due = beyond > 0 ? beyond / PAGE_TOKENS : 0, pages = s.per_token ? 1 : 4;
    page += unit * pages;
    it.low = 0, it.first = unit * pages * PAGE_TOKENS;
    it.high = PAGE_TOKENS * min(pages, due - unit * pages);
  }
  it.entry = int(b * a.capacity) + page;
  // The lane copies 8 channels: per token of this warp's own slabs, per channel of the team's.
  const int mine = s.per_token ? 4 * warp : 0, at = mine + lane % 8 / 2, h = (v + at) / unsigned(s.slabs);
  const int c = ((v + at) - h * s.slabs) * SLAB_CHANNELS + lane % 2 * 8, dim = s.slabs * SLAB_CHANNELS;
  it.input = at >= have ? nullptr : s.x + b * s.stride[0] + h * s.stride[1] + (skip - n.z) * s.stride[2] + 2 * c;
  it.tail = s.tail + 2 * (((long long)b * a.tail_slots * a.heads + h) * dim + c);
  it.slab = v + (s.per_token ? mine : warp);
  it.slabs = s.per_token ? min(4, have - mine) : warp < have;
  return it;
}

DEVICE void copy_strip(const SealArguments& a, const SealSide& s, const Item& it, int slot, uint32_t to) {
  const int lane = lane_of();
  if (slot >= it.high || slot + STRIP_TOKENS <= it.low) return;
  const long long token = 2ll * a.heads * s.slabs * SLAB_CHANNELS;
#pragma unroll
  for (int p = 0; p < 4; p++) {
    const int row = lane / 8 + 4 * p, at = slot + row, i = it.first + at;
    const bool take = it.input && at >= it.low && at < it.high;
    const uint8_t* from = i >= it.held ? it.input + i * s.stride[2] : it.tail + i * token;
    copy_16(to + row * 128 + ((lane ^ row) % 8 * 16), take ? from : s.x, take);
  }
}

DEVICE uint8_t* half_of(const SealArguments& a, const SealSide& s, int entry, int head) {
  return (uint8_t*)(__ldg(a.table + entry) & ADDRESS) + (long long)head * a.page_bytes + s.half_offset;
}

// Per channel: this warp's slab of a page, whose strips stand `apart` bytes from each other.
template <class T, int GROUPS> DEVICE void seal_slab(const SealArguments& a, const SealSide& s, const Item& it, int page, uint32_t strips, int apart, uint32_t cells, int warp) {
  const int lane = lane_of(), head = it.slab / s.slabs, slab = it.slab - head * s.slabs;
  uint8_t* half = half_of(a, s, it.entry + page, head);
  const uint32_t row = lane % 16, at = row * 128 + ((2 * warp + lane / 16) ^ lane % 8) * 16;
  uint32_t w[4][4];
#pragma unroll
  for (int p = 0; p < 4; p++) load_matrices<false>(w[p], strips + p * apart + at);
  // Number j of strip p is token lane / 8 + 16 p + 8 (j / 2 % 2), channel j % 2 + 2 (j / 4) of the lane's four.
  constexpr int STRIPS = 4 / GROUPS, N = 2 * STRIPS;
  uint32_t words[4] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    float x[4][N];
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int i = 0; i < N; i++) x[k][i] = number_in<T>(w[g * STRIPS + i / 2][i % 2 + k / 2 * 2], k % 2);
    }
    float m[4];
    Fields f = {0.f, 0.f};
    if (s.kind == SIGNED_ABSMAX) {
      uint32_t keys[4] = {};
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int i = 0; i < N; i++)
          keys[k] = max(keys[k], extreme_key<T>(w[g * STRIPS + i / 2][i % 2 + k / 2 * 2], k % 2, 8 * i + lane / 4));
      }
      f.scale = round_wide(extreme<T>(gather(keys, Larger())), s.scale_dtype);
    } else if (s.kind == MINMAX) {
      float low[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        m[k] = low[k] = x[k][0];
#pragma unroll
        for (int i = 1; i < N; i++) m[k] = fmaxf(m[k], x[k][i]), low[k] = fminf(low[k], x[k][i]);
      }
      f = middle(gather(m, Larger()), gather(low, Smaller()), s.scale_dtype);
    } else {
      if (s.kind == MEAN_ABSMAX) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float t[N / 2];
#pragma unroll
          for (int i = 0; i < N / 2; i++) t[i] = x[k][i] + x[k][i + N / 2];
          if constexpr (N == 8) m[k] = (t[0] + t[2]) + (t[1] + t[3]);
          else m[k] = t[0] + t[1];
        }
        // Exactly the quotient: the number of tokens is a power of two.
        f.zero = round_wide(gather(m, Sum()) * (float(GROUPS) / PAGE_TOKENS), s.scale_dtype);
      }
      float zero[4];
      spread(zero, f.zero);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        m[k] = 0.f;
#pragma unroll
        for (int i = 0; i < N; i++) m[k] = fmaxf(m[k], fabsf(x[k][i] - zero[k]));
      }
      f.scale = round_wide(gather(m, Larger()), s.scale_dtype);
    }
    float zero[4], r[4];
    spread(zero, f.zero);
    spread(r, inverse(f.scale));
    const int k = own<4>(), place = s.fields * (16 * (slab + g * s.slabs) + 4 * (lane % 4)) + k;
    if (!writes_zero<4>()) write_wide(half + s.code_bytes + s.field_size * place, f.scale, s.scale_dtype);
    else if (s.fields == 2) write_wide(half + s.code_bytes + s.field_size * (place + 4), f.zero, s.scale_dtype);
#pragma unroll
    for (int p = 0; p < STRIPS; p++) {
#pragma unroll
      for (int j = 7; j >= 0; j--) {
        const int c = j % 2 + j / 4 * 2;
        uint32_t& word = w[g * STRIPS + p][j / 2];
        // The number is made again from its word, rather than kept in a register since the statistics.
        if (j % 2) asm volatile("" : "+r"(word));
        const float v = number_in<T>(word, j % 2) - zero[c];
        push_code(words[g * STRIPS + p], cells, v * r[c], v, r[c] * s.cell_scale, s.cell_offset);
      }
    }
  }
  ((uint4*)(half + 512 * slab))[lane] = make_uint4(words[0], words[1], words[2], words[3]);
}

struct Team {
  int warps, warp;
  uint32_t room;  // of two times 16 numbers for each warp
};

// Statistics of a team's warps as one: 16 tokens' worth, in shared memory.
template <int COUNT, class V, class F> DEVICE V over_team(V x, const Team& team, uint32_t room, F f) {
  if (team.warps == 1) return x;
  const int lane = lane_of(), token = COUNT == 4 ? lane % 4 * 4 + own<4>() : lane / 4 * 2 + own<2>();
  if (!writes_zero<COUNT>()) asm volatile("st.shared.b32 [%0], %1;" ::"r"(room + (team.warp * 16 + token) * 4), "r"(*(const uint32_t*)&x) : "memory");
  asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / 32 / team.warps), "r"(team.warps * 32) : "memory");
#pragma unroll 1
  for (int w = 0; w < team.warps; w++) {
    uint32_t bits;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(room + (w * 16 + token) * 4) : "memory");
    x = f(x, *(const V*)&bits);
  }
  return x;
}

// Per token: this warp's strip of a page. Words of codes go to `kept`, or, for part of a page, to memory.
template <class T, bool VALUE>
DEVICE void seal_strip(const SealArguments& a, const SealSide& s, const Item& it, int strip, uint32_t from, uint32_t cells, const Team& team, uint4 (&kept)[4], bool keep) {
  constexpr int COUNT = VALUE ? 4 : 2;
  const int lane = lane_of(), row = VALUE ? lane % 8 + lane / 16 * 8 : lane % 16, second = VALUE ? lane / 8 % 2 : lane / 16;
  const uint32_t at = from + row * 128, column = (second ^ lane % 8) * 16;
  // The token of statistics k, and of number j of a word.
  auto slot_of = [&](int k) { return STRIP_TOKENS * strip + (VALUE ? lane % 4 * 2 + k % 2 + k / 2 * 8 : lane / 4 + 8 * k); };
  constexpr auto which = [](int j) { return VALUE ? j % 2 + j / 4 * 2 : j / 2 % 2; };
  uint32_t w[4][4], words[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) load_matrices<VALUE>(w[i], at + (column ^ (i * 32)));
  // What lies beyond the last slab counts as nothing: zeros do not move a magnitude.
  float m[COUNT];
  Fields f = {0.f, 0.f};
  if (s.kind == SIGNED_ABSMAX) {
    uint32_t keys[COUNT] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int c = 16 * (i + team.warp * 4) + (VALUE ? lane / 4 + j / 2 % 2 * 8 : lane % 4 * 2 + j % 2 + j / 4 * 8);
        keys[which(j)] = max(keys[which(j)], extreme_key<T>(w[i][j / 2], j % 2, c));
      }
    }
    f.scale = round_wide(extreme<T>(over_team<COUNT>(gather(keys, Larger()), team, team.room, Larger())), s.scale_dtype);
  } else if (s.kind == MINMAX) {
    float low[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) m[k] = -INFINITY, low[k] = INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i >= it.slabs) break;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float x = number_in<T>(w[i][j / 2], j % 2);
        m[which(j)] = fmaxf(m[which(j)], x), low[which(j)] = fminf(low[which(j)], x);
      }
    }
    const float high = over_team<COUNT>(gather(m, Larger()), team, team.room, Larger());
    f = middle(high, over_team<COUNT>(gather(low, Smaller()), team, team.room + team.warps * 64, Smaller()), s.scale_dtype);
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; k++) m[k] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 8; j++) m[which(j)] = fmaxf(m[which(j)], fabsf(number_in<T>(w[i][j / 2], j % 2)));
    }
    f.scale = round_wide(over_team<COUNT>(gather(m, Larger()), team, team.room, Larger()), s.scale_dtype);
  }
  float zero[COUNT], r[COUNT];
  spread(zero, f.zero);
  spread(r, inverse(f.scale));
  const int slot = slot_of(own<COUNT>());
  if ((it.slabs > 0 || team.warps > 1) && slot >= it.low && slot < it.high && (!writes_zero<COUNT>() || s.fields == 2)) {
    // A block over several heads is the only one of each, and written in each, by the team's warps in turn.
    const int start = it.slab - 4 * team.warp, first = start / s.slabs;
    const int end = s.domain == s.slabs ? start + 1 : min(start + s.block, s.domain), b = s.domain == s.slabs ? (start - first * s.slabs) / s.block : 0;
    const int place = s.fields * s.blocks * (8 * (slot % 8) + 2 * (slot / 16) + slot / 8 % 2) + (writes_zero<COUNT>() ? s.blocks : 0) + b;
#pragma unroll 1
    for (int h = first + team.warp; h * s.slabs < end; h += team.warps)
      write_wide(half_of(a, s, it.entry, h) + s.code_bytes + s.field_size * place, writes_zero<COUNT>() ? f.zero : f.scale, s.scale_dtype);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (i % 2 == 0 && i >= it.slabs) break;
#pragma unroll
    for (int j = 7; j >= 0; j--) {
      if (j % 2) asm volatile("" : "+r"(w[i][j / 2]));  // as in seal_slab
      const float v = number_in<T>(w[i][j / 2], j % 2) - zero[which(j)];
      push_code(words[i], cells, v * r[which(j)], v, r[which(j)] * s.cell_scale, s.cell_offset);
    }
  }
  if (keep) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (strip == 0) kept[i].x = words[i];
      else if (strip == 1) kept[i].y = words[i];
      else if (strip == 2) kept[i].z = words[i];
      else kept[i].w = words[i];
    }
    return;
  }
  int head = it.slab / s.slabs, slab = it.slab - head * s.slabs;
  uint32_t mask = 0;
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    const uint32_t nibbles = VALUE ? (k % 2 ? 0xf0f0u : 0x0f0fu) << k / 2 * 16 : 0x00ff00ffu << k * 8;
    if (slot_of(k) >= it.low && slot_of(k) < it.high) mask |= nibbles;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (i >= it.slabs) break;
    uint32_t* to = (uint32_t*)(half_of(a, s, it.entry, head) + 512 * slab) + 4 * lane + strip;
    if (mask != 0) *to = mask == ALL ? words[i] : (*to & ~mask) | (words[i] & mask);
    if (++slab == s.slabs) slab = 0, head++;
  }
}

// The steps of a team: four for each of its items, and at the end single steps of the items that are too few for all teams.
struct Steps {
  int team, teams, whole, count;

  DEVICE Steps(int items, int team, int teams) : team(team), teams(teams), whole(items / teams * 4) {
    const int rest = 4 * items - whole * teams;
    count = whole + (team < rest ? (rest - team - 1) / teams + 1 : 0);
  }
  DEVICE int item(int step) const { return step < whole ? team + step / 4 * teams : whole / 4 * teams + single(step) / 4; }
  DEVICE int part(int step) const { return step < whole ? step % 4 : single(step) % 4; }
  DEVICE bool starts(int step) const { return step >= whole || step % 4 == 0; }
  DEVICE int single(int step) const { return team + (step - whole) * teams; }
};

template <class T, int GROUPS> DEVICE void seal_channels(const SealArguments& a, const SealSide& s, const Steps& steps, uint32_t stages, uint32_t cells, int barrier, int warp) {
  Item ahead, now;
  // Strip w of a team is copied by its warp w; a warp's stages stand together.
  const uint32_t own_stages = stages + warp * STAGES * STRIP_BYTES;
  auto copy = [&](int step) {
    if (step < steps.count) {
      if (steps.starts(step)) ahead = item_of(a, s, steps.item(step), warp);
      copy_strip(a, s, ahead, PAGE_TOKENS * steps.part(step) + STRIP_TOKENS * warp, own_stages + step % STAGES * STRIP_BYTES);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll 1
  for (int step = 1 - STAGES; step < steps.count; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
    if (step >= steps.whole) now = item_of(a, s, steps.item(step), warp);
    else if (step >= 0 && step % 4 == 0) now = ahead;
    copy(step + STAGES - 1);
    if (step < 0) continue;
    const int page = steps.part(step);
    if (PAGE_TOKENS * page < now.high && now.slabs > 0)
      seal_slab<T, GROUPS>(a, s, now, page, stages + step % STAGES * STRIP_BYTES, STAGES * STRIP_BYTES, cells, warp);
  }
}

template <class T, bool VALUE> DEVICE void seal_tokens(const SealArguments& a, const SealSide& s, const Steps& steps, uint32_t stages, uint32_t cells, Team team) {
  Item ahead, now;
  uint4 kept[4];
  auto copy = [&](int step) {
    if (step < steps.count) {
      if (steps.starts(step)) ahead = item_of(a, s, steps.item(step), team.warp);
      copy_strip(a, s, ahead, STRIP_TOKENS * steps.part(step), stages + step % STAGES * STRIP_BYTES);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll 1
  for (int step = 1 - STAGES; step < steps.count; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncwarp();
    if (step >= steps.whole) now = item_of(a, s, steps.item(step), team.warp);
    else if (step >= 0 && step % 4 == 0) now = ahead;
    copy(step + STAGES - 1);
    if (step < 0) continue;
    const int strip = steps.part(step);
    if (STRIP_TOKENS * strip >= now.high || STRIP_TOKENS * (strip + 1) <= now.low) continue;
    const bool keep = step < steps.whole && now.low == 0 && now.high == PAGE_TOKENS;
    // Two rooms in turn: a warp may be a step ahead of one that still reads.
    team.room ^= team.warps * 128;
    seal_strip<T, VALUE>(a, s, now, strip, stages + step % STAGES * STRIP_BYTES, cells, team, kept, keep);
    if (!keep || strip < 3) continue;
    int head = now.slab / s.slabs, slab = now.slab - head * s.slabs;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i >= now.slabs) break;
      ((uint4*)(half_of(a, s, now.entry, head) + 512 * slab))[lane_of()] = kept[i];
      if (++slab == s.slabs) slab = 0, head++;
    }
  }
}

// One half of the pages: as many blocks as the device holds.
template <class T, Half HALF> DEVICE void seal(const SealArguments& a) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32;
  const SealSide& s = a.side[HALF == VALUES];
  fill_cells((float2*)shared, s.threshold, s.levels, s.cell_scale, s.cell_offset);
  __syncthreads();
  const uint32_t cells = cells_of_lane((const float2*)shared), stages = uint32_t(__cvta_generic_to_shared(shared)) + TABLE_BYTES;
  const int warps = HALF == KEYS_PER_CHANNEL ? 4 : s.warps, teams = WARPS / warps, team = warp / warps, rank = warp % warps;
  const Steps steps(a.batch * s.units * s.tiles, blockIdx.x * teams + team, gridDim.x * teams);
  if constexpr (HALF == KEYS_PER_CHANNEL) {
    const uint32_t first = stages + team * 4 * STAGES * STRIP_BYTES;
    if (s.groups == 1) seal_channels<T, 1>(a, s, steps, first, cells, 1 + team, rank);
    else seal_channels<T, 2>(a, s, steps, first, cells, 1 + team, rank);
  } else {
    __shared__ __align__(1024) float room[WARPS][2][2][16];
    const Team mine = {warps, rank, uint32_t(__cvta_generic_to_shared(room)) + team * warps * 256};
    seal_tokens<T, HALF == VALUES>(a, s, steps, stages + warp * STAGES * STRIP_BYTES, cells, mine);
  }
}

}  // namespace nqkv
using namespace nqkv;

#define KERNELS(NAME, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 3) seal_channels_##NAME(const __grid_constant__ SealArguments a) { seal<T, KEYS_PER_CHANNEL>(a); } \
  extern "C" __global__ void __launch_bounds__(256, 2) seal_keys_##NAME(const __grid_constant__ SealArguments a) { seal<T, KEYS>(a); } \
  extern "C" __global__ void __launch_bounds__(256, 2) seal_values_##NAME(const __grid_constant__ SealArguments a) { seal<T, VALUES>(a); }
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
