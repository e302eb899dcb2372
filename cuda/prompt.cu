// Prompts into pages, the fastest way: 16-bit tokens into 4-bit slabs, absmax or mean_absmax, fp16 scales.
// target: compute_80
// isa: 8.0
// expect: sm_90 LDSM.16.M88.4 >= 8
// expect: sm_90 LDSM.16.MT88.4 >= 4
// expect: sm_90 LDGSTS.E.BYPASS.128 >= 8
//
// What cuda/seal.cu does for every kind of block, cuda/seal.cuh does here for these. Warps walk along the tokens of tiles of 4
// slabs (8 of a longer block, so that fewer warps have to agree), the next 64 tokens or strips of 16 on their way while they work.
// Per channel two warps share a tile, since memory wants rows of 128 bytes. Per token a warp has a tile of its own; warps of a team
// exchange the largest magnitudes of a longer block.
#include "seal.cuh"
#include "seal_arguments.cuh"

namespace nqkv {

constexpr int STAGE_BYTES = 8192;  // of a warp

// A team's part of the list of pages, all sequences' one after the other, for one tile of each.
struct Run {
  int tile, at, end;

  // Parts are numbered tiles first, so that warps side by side read rows side by side.
  DEVICE Run(const SealArguments& a, const SealSide& s, int part) {
    const int parts = s.parts, number = part / unsigned(s.tiles), pages = a.batch * s.units, each = pages / unsigned(parts);
    const int more = pages - each * parts;
    tile = part - number * s.tiles;
    at = number * each + min(number, more), end = at + each + (number < more);
  }
};

// What is needed now and then is made anew then, rather than held in registers: the compiler takes this for another number.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Where a slab of the row of all stands: its codes in a row of pages, its number in its head.
struct Place {
  int codes, in_head;
  DEVICE Place(const SealArguments& a, const SealSide& s, int slab) {
    const int head = quotient(slab, s.by_slabs);
    in_head = slab - head * s.slabs, codes = head * a.page_bytes + s.half_offset + 512 * in_head;
  }
};

// A lane's 16 bytes of a token, 8 channels of a slab.
struct Column {
  int head, channel;
  DEVICE Column(const SealSide& s, int slab, int half) : head(quotient(slab, s.by_slabs)) {
    channel = (slab - head * s.slabs) * SLAB_CHANNELS + half * 8;
  }
};

// Where the tokens of a sequence's pages come from: page `unit` begins `low` before token 64 unit of the stream, of which
// `limit` go to pages. Slots below `low` of page 0 have been written before.
struct Source {
  int b, unit, entry, limit, low;
  int ready;             // pages before it need tokens of the tail, or have slots that are written already
  const uint8_t* input;  // this lane's 16 bytes of token 0 of the stream, had it come in

  DEVICE int slot_0() const { return unit * PAGE_TOKENS - low; }
  DEVICE int from() const { return unit == 0 ? low : 0; }
  DEVICE int to() const { return min(PAGE_TOKENS, limit - slot_0()); }
  // Whether all of its 64 tokens have come in.
  DEVICE bool direct() const { return unit >= ready && limit - slot_0() >= PAGE_TOKENS; }

  DEVICE void open(const SealArguments& a, const SealSide& s, int at, const Column& column) {
    b = at / unsigned(s.units), unit = at - b * s.units;
    const int4 n = __ldg(a.counts + b);
    const int skip = min(a.tokens, a.sink_slots - n.x), incoming = a.tokens - skip;
    low = 0, ready = (n.z + PAGE_TOKENS - 1) / PAGE_TOKENS;
    entry = int(b * a.capacity) + n.y;
    if (a.single_slots) {
      const int last = n.y > 0 ? int(__ldg(a.table + entry - 1) >> 56) : PAGE_TOKENS, room = n.w ? PAGE_TOKENS - last : 0;
      if (room > 0) entry--, low = last, ready = 1;
      limit = incoming;
    } else {
      const int beyond = n.z + incoming - a.window;
      limit = beyond > 0 ? beyond & -PAGE_TOKENS : 0;
    }
    input = s.x + b * s.stride[0] + column.head * s.stride[1] + (skip - n.z) * s.stride[2] + 2 * column.channel;
  }
  // Of token i of the stream.
  DEVICE const uint8_t* at(const SealArguments& a, const SealSide& s, const Column& column, int i) const {
    if (i >= __ldg(&a.counts[b].z)) return input + (long long)i * int(s.stride[2]);
    return s.tail + 2 * ((((long long)b * a.tail_slots + i) * a.heads + column.head) * s.slabs * SLAB_CHANNELS + column.channel);
  }
  DEVICE uint8_t* row(const SealArguments& a) const { return (uint8_t*)(__ldg(a.table + entry + unit) & ADDRESS); }
};

DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
  __syncwarp();
}

// Neighbouring warps: 1, 2 or 4. Which of them a warp is, it finds out each time.
struct Team {
  int warps;
  uint32_t room;  // of two times four numbers for each of 16 tokens

  DEVICE static int warp() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x >> 5;
  }
  DEVICE int rank() const { return warp() & (warps - 1); }
  DEVICE void wait() const { asm volatile("bar.sync %0, %1;" ::"r"(1 + (warp() >> warps / 2)), "r"(warps * 32) : "memory"); }
};

// The largest of a team's magnitudes of each of 16 tokens.
template <int COUNT> DEVICE float over_team(float x, Team& team) {
  if (team.warps == 1) return x;
  const int lane = lane_of(), token = COUNT == 4 ? lane % 4 * 4 + own<4>() : lane / 4 * 2 + own<2>();
  const uint32_t at = team.room + token * 16;
  if (!writes_zero<COUNT>()) asm volatile("st.shared.f32 [%0], %1;" ::"r"(at + team.rank() * 4), "f"(x) : "memory");
  team.wait();
  float y[4];
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3]) : "r"(at) : "memory");
  // Two rooms in turn: a warp may be a strip ahead of one that still reads.
  team.room ^= 256;
  return fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3]));
}

// Per channel: tiles of 64 tokens x 4 slabs, two stages. A warp of two copies 32 tokens, and seals 2 slabs.
template <class T> DEVICE void prompt_channels(const SealArguments& a, const SealSide& s, const Run& run, uint32_t stages, const Codes& code, const Team& team) {
  const int lane = lane_of();
  auto column_of = [&](int tile) { return Column(s, min(4 * tile + lane % 8 / 2, a.heads * s.slabs - 1), lane % 2); };
  uint32_t to = stages + (32 * team.rank() + lane / 8) * 128 + (lane ^ lane / 8) % 8 * 16;
  uint32_t from = stages + lane % 16 * 128 + (4 * team.rank() + lane / 16 ^ lane % 8) * 16;
  int other = STAGE_BYTES;
  const Place first(a, s, 4 * run.tile + 2 * team.rank());
  Source source;
  source.open(a, s, run.at, column_of(run.tile));
  int left = run.end - run.at;
  // Starts a page's tile on its way to a stage. Its row, or null.
  auto copy = [&]() -> uint8_t* {
    uint8_t* row = nullptr;
    if (left > 0 && source.to() > 0) {
      row = source.row(a);
      int i = source.slot_0() + 32 * team.rank() + lane / 8;
      if (source.direct()) {
        const int stride = int(s.stride[2]);
        const uint8_t* x = source.input + (long long)i * stride;
#pragma unroll
        for (int p = 0; p < 8; p++, x += 4 * stride) copy_16((to ^ 64 * (p % 2)) + 512 * p, x, true);
      } else {
        const Column column = column_of(opaque(run.tile));
#pragma unroll 1
        for (int p = 0; p < 8; p++, i += 4) copy_16((to ^ 64 * (p % 2)) + 512 * p, source.at(a, s, column, i), true);
      }
    }
    commit();
    if (++source.unit == s.units && left > 1) source.open(a, s, (source.b + 1) * s.units, column_of(opaque(run.tile)));
    left--, to += other, other = -other;
    return row;
  };
  uint8_t* ahead = copy();
#pragma unroll 1
  while (left >= 0) {
    uint8_t* const row = ahead;
    wait<0>();
    team.wait();  // the tile has come, and the stage that is written next has been read
    ahead = copy();
    if (row) {
      const int slabs = min(2, a.heads * s.slabs - 4 * run.tile - 2 * team.rank());
#pragma unroll 1
      for (int i = 0; i < slabs; i++) {
        Place place = first;
        if (i) place.codes += 512, place.in_head++;
        if (i && s.slabs % 2) place = Place(a, s, 4 * opaque(run.tile) + 2 * team.rank() + 1);  // perhaps the next head's first
        uint8_t* codes = row + place.codes;
        seal_channel_slab<T>(from ^ 32 * i, 2048, codes, codes + (s.code_bytes - 448 * place.in_head), code);
      }
    }
    from += other;
  }
}

// A tile of a team: its first slab in the row of all slabs, and how many; the same of one of its warps, which has SLABS at most.
template <int SLABS> struct Tile {
  int first, have, slab, slabs;
  DEVICE Tile(const SealSide& s, int tile, int rank) {
    const int domain = quotient(tile, s.by_domain_tiles), start = (tile - domain * s.domain_tiles) * s.tile;
    first = domain * s.domain + start, have = min(s.tile, s.domain - start);
    slab = first + SLABS * rank, slabs = min(SLABS, have - SLABS * rank);
  }
  // A lane's bytes of a run of four slabs; any, if it has none.
  DEVICE Column column(const SealSide& s, int lane, int run) const {
    const int i = 4 * run + lane % 8 / 2;
    return Column(s, i < slabs ? slab + i : first, lane % 2);
  }
};

// Per token: tiles of 64 tokens x SLABS slabs, a stage for each strip that is on its way: four of four slabs, or two of eight. A
// strip stands in runs of four slabs.
template <class T, bool VALUE, int SLABS>
DEVICE void prompt_tokens(const SealArguments& a, const SealSide& s, const Run& run, uint32_t stages, const Codes& code, Team& team) {
  constexpr int COUNT = VALUE ? 4 : 2, STRIP = 16, RUNS = SLABS / 4, RUN_BYTES = STRIP * 128, STRIP_BYTES = RUNS * RUN_BYTES;
  // Strips that are on their way: all but the one that is worked on or, of two stages, both, the older one taken up again as soon
  // as its numbers are held.
  constexpr int STAGES = STAGE_BYTES / STRIP_BYTES, AHEAD = RUNS == 1 ? 3 : 2;
  const int lane = lane_of();
  const uint32_t to = stages + lane / 8 * 128 + (lane ^ lane / 8) % 8 * 16;
  const int read_row = VALUE ? lane % 8 + lane / 16 * 8 : lane % 16, second = VALUE ? lane / 8 % 2 : lane / 16;
  const uint32_t from = stages + read_row * 128 + (second ^ lane % 8) * 16;
  const Tile<SLABS> tile(s, run.tile, team.rank());
  const int slabs = tile.slabs;
  auto take = [&](int r) { return 4 * r + lane % 8 / 2 < slabs; };
  // From a lane's bytes of the first run to those of the second.
  int apart = 0;
  if (RUNS > 1 && take(1)) {
    const Column near = tile.column(s, lane, 0), far = tile.column(s, lane, 1);
    apart = int((far.head - near.head) * s.stride[1] + 2 * (far.channel - near.channel));
  }
  // This lane's scales of strip 0, if it writes any: of one block of a head, by one warp, or of a block over several heads, the
  // same for all of them, by the team's warps in turn.
  auto own_slot = [](int lane) { return VALUE ? lane % 4 * 2 + lane / 8 % 2 + lane / 16 * 8 : lane / 4 + 8 * (lane / 2 % 2); };
  int scales, copies;
  {
    const int head = quotient(tile.first, s.by_slabs), last = quotient(tile.first + tile.have - 1, s.by_slabs);
    const int block = s.domain == s.slabs && s.blocks > 1 ? (tile.first - head * s.slabs) / s.block : 0;
    const int slot = own_slot(lane);
    scales = (head + team.rank()) * a.page_bytes + s.half_offset + s.code_bytes + 2 * ((8 * (slot % 8) + slot / 8) * s.blocks + block);
    copies = writes_zero<COUNT>() ? 0 : (last - head - team.rank() + team.warps) / team.warps;
  }
  Source source;
  source.open(a, s, run.at, tile.column(s, lane, 0));
  int left = run.end - run.at;
  // The next page's strips start on their way one by one.
  auto copy = [&](int strip) {
    if (left > 0) {
      const uint32_t at = to + STRIP_BYTES * (strip % STAGES);
      const int stride = int(s.stride[2]);
      if (source.direct()) {
        const uint8_t* x = source.input + (long long)(source.slot_0() + STRIP * strip + lane / 8) * stride;
#pragma unroll
        for (int p = 0; p < 4; p++, x += 4 * stride) {
          copy_16((at ^ 64 * (p % 2)) + 512 * p, x, take(0));
          if (RUNS > 1) copy_16((at ^ 64 * (p % 2)) + 512 * p + RUN_BYTES, x + apart, take(1));
        }
      } else {
        const int low = source.from(), high = source.to();
#pragma unroll 1
        for (int r = 0; r < RUNS; r++) {
          const Column column = Tile<SLABS>(s, opaque(run.tile), team.rank()).column(s, lane, r);
          // Of the second run, as `input` is of the first.
          const int beyond = r ? apart : 0;
#pragma unroll 1
          for (int p = 0; p < 4; p++) {
            const int n = STRIP * strip + lane / 8 + 4 * p, i = source.slot_0() + n;
            const bool there = take(r) && n >= low && n < high, came = i >= __ldg(&a.counts[source.b].z);
            copy_16((at ^ 64 * (p % 2)) + 512 * p + RUN_BYTES * r, there ? source.at(a, s, column, i) + (came ? beyond : 0) : s.x, there);
          }
        }
      }
    }
    commit();
  };
#pragma unroll 1
  for (int strip = 0; strip < AHEAD; strip++) copy(strip);
#pragma unroll 1
  while (left > 0) {
    // Slots from low to high are written: both in one register.
    const int span = max(source.to(), 0) << 8 | source.from();
    auto low = [&] { return span & 255; };
    auto high = [&] { return span >> 8; };
    const bool whole = span == PAGE_TOKENS << 8;
    uint8_t* const row = high() > low() ? source.row(a) : nullptr;
    uint3 kept[SLABS];
#pragma unroll 1
    for (int strip = 0; strip < 4; strip++) {
      uint32_t w[4][4], words[SLABS];
      const uint32_t at = from + STRIP_BYTES * (strip % STAGES);
      // The page after this one begins where this one's last strips still are to come.
      auto next = [&] {
        if (strip + AHEAD == 4) {
          if (++source.unit == s.units && left > 1)
            source.open(a, s, (source.b + 1) * s.units, Tile<SLABS>(s, opaque(run.tile), team.rank()).column(s, lane, 0));
          left--;
        }
        copy((strip + AHEAD) % 4);
      };
      auto take_run = [&](int r) {
#pragma unroll
        for (int i = 0; i < 4; i++) load_matrices<VALUE>(w[i], (at ^ i * 32) + RUN_BYTES * r);
      };
      wait<AHEAD - 1>();
      if (RUNS == 1) next();  // the stage that is written next has been read
      if (STRIP * strip >= high() || STRIP * (strip + 1) <= low()) {
        if (RUNS > 1) next();
        continue;
      }
      float top = 0.f;
#pragma unroll
      for (int r = RUNS - 1; r >= 0; r--) take_run(r), top = fmaxf(top, largest_of_tokens<T, VALUE>(w));
      top = over_team<COUNT>(top, team);
      const float scale = rounded_scale(top);
      const int slot = STRIP * strip + own_slot(opaque(lane_of()));
      if (whole || (slot >= low() && slot < high())) {
        uint8_t* at = row + (scales + 4 * strip * s.blocks);
#pragma unroll 1
        for (int i = 0; i < copies; i++, at += team.warps * a.page_bytes) store_global(at, __float2half_rn(scale));
      }
#pragma unroll
      for (int r = 0; r < RUNS; r++) {
        // A second run is read again, rather than held; the stage that is written next is the one that it is read from.
        if (r > 0) {
          take_run(r);
          __syncwarp();
          next();
        }
        codes_of_tokens<T, VALUE>(w, top, scale, code, *(uint32_t(*)[4])(words + 4 * r));
      }
      if (whole) {
#pragma unroll
        for (int i = 0; i < SLABS; i++) {
          if (strip == 0) kept[i].x = words[i];
          else if (strip == 1) kept[i].y = words[i];
          else if (strip == 2) kept[i].z = words[i];
        }
        if (strip == 3) {
          const Tile<SLABS> again(s, opaque(run.tile), team.rank());
          const Place place(a, s, max(again.slabs, 0) > 0 ? again.slab : again.first);
          uint8_t* codes = row + (place.codes + 16 * lane);
          const int rest = s.slabs - place.in_head;  // of the first head
#pragma unroll
          for (int i = 0; i < SLABS; i++) {
            if (i == rest || (i > rest && (i - rest) % s.slabs == 0)) codes += a.page_bytes - 512 * s.slabs;
            if (i >= again.slabs) continue;
            store_global(codes + 512 * i, make_uint4(kept[i].x, kept[i].y, kept[i].z, words[i]));
          }
        }
        continue;
      }
      // Part of a page.
      uint32_t mask = 0;
#pragma unroll
      for (int k = 0; k < COUNT; k++) {
        const int n = STRIP * strip + (VALUE ? lane % 4 * 2 + k % 2 + k / 2 * 8 : lane / 4 + 8 * k);
        const uint32_t nibbles = VALUE ? (k % 2 ? 0xf0f0u : 0x0f0fu) << k / 2 * 16 : 0x00ff00ffu << k * 8;
        if (n >= low() && n < high()) mask |= nibbles;
      }
      const Tile<SLABS> again(s, opaque(run.tile), team.rank());
#pragma unroll
      for (int i = 0; i < SLABS; i++) {
        if (i >= again.slabs || mask == 0) break;
        uint32_t* at = (uint32_t*)(row + Place(a, s, again.slab + i).codes) + 4 * lane + strip;
        *at = mask == ALL ? words[i] : (*at & ~mask) | (words[i] & mask);
      }
    }
  }
}

// One half of the pages: as many blocks as the device holds, of a table and a stage for each warp.
template <class T, Half HALF> DEVICE void prompt(const SealArguments& a) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ __align__(512) float room[8][2][16][4];
  const SealSide& s = a.side[HALF == VALUES];
  fill_codes((float2*)shared, s.threshold, s.levels);
  // What a team of two leaves out counts as 0.
  if (HALF != KEYS_PER_CHANNEL)
    for (int i = threadIdx.x; i < 8 * 128; i += blockDim.x) (&room[0][0][0][0])[i] = 0.f;
  __syncthreads();
  const Codes code((const float2*)shared);
  const int warps = s.warps, warp = threadIdx.x / 32, team = warp / warps, teams = blockDim.x / 32 / warps;
  if (team >= teams) return;
  const uint32_t all_stages = uint32_t(__cvta_generic_to_shared(shared)) + CODES_BYTES;
  Team mine = {warps, uint32_t(__cvta_generic_to_shared(room[team % 8]))};
#pragma unroll 1
  for (int part = blockIdx.x * teams + team; part < s.tiles * s.parts; part += gridDim.x * teams) {
    const Run run(a, s, part);
    if (run.at == run.end) continue;
    if constexpr (HALF == KEYS_PER_CHANNEL) prompt_channels<T>(a, s, run, all_stages + team * 2 * STAGE_BYTES, code, mine);
    else if (s.wide) prompt_tokens<T, HALF == VALUES, 8>(a, s, run, all_stages + warp * STAGE_BYTES, code, mine);
    else prompt_tokens<T, HALF == VALUES, 4>(a, s, run, all_stages + warp * STAGE_BYTES, code, mine);
    wait<0>();
    if (HALF == KEYS_PER_CHANNEL) mine.wait();
  }
}

}  // namespace nqkv
using namespace nqkv;

#define KERNELS(NAME, T)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256, 2) prompt_channels_##NAME(const __grid_constant__ SealArguments a) { prompt<T, KEYS_PER_CHANNEL>(a); } \
  extern "C" __global__ void __launch_bounds__(256, 2) prompt_keys_##NAME(const __grid_constant__ SealArguments a) { prompt<T, KEYS>(a); } \
  extern "C" __global__ void __launch_bounds__(256, 2) prompt_values_##NAME(const __grid_constant__ SealArguments a) { prompt<T, VALUES>(a); }
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
