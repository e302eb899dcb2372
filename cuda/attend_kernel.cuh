// Decode attention on pages: the kernel. See attend_loop.cuh.
#pragma once
#include "attend_split.cuh"

namespace nqkv {

// The table: 16 bytes at a time, since all lanes have the same word. A half warp makes a row.
template <int UNROLL> DEVICE void fill_table(const AttendArguments& a, uint8_t* table) {
  const int lane = threadIdx.x & 31, side = lane / 8 % 2;
  const uint32_t levels = a.level[0][lane % 16] | uint32_t(a.level[1][lane % 16]) << 16;
#pragma unroll UNROLL
  for (int row = threadIdx.x / 16; row < 256; row += blockDim.x / 16) {
    const uint32_t low = __shfl_sync(~0u, levels, row % 16), high = __shfl_sync(~0u, levels, row / 16);
    const uint32_t x = __byte_perm(low, high, side ? 0x7632 : 0x5410);
    *(uint4*)(table + 256 * row + lane % 16 * 16) = make_uint4(x, x, x, x);
  }
}

// prefix[b] = items of the sequences before b, for one head; returns all.
template <class S> DEVICE int scan_items(const AttendArguments& a, int* prefix, const int4& ahead) {
  if (threadIdx.x < 32) {
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < a.batch; first += 32) {
      const int b = first + threadIdx.x;
      int x = b < a.batch ? items_of<S>(a, b, first == 0 ? ahead : __ldg(a.counts + b)) : 0;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const int y = __shfl_up_sync(~0u, x, d);
        if (int(threadIdx.x) >= d) x += y;
      }
      if (b < a.batch) prefix[b + 1] = before + x;
      before += __shfl_sync(~0u, x, 31);
    }
    if (threadIdx.x == 0) prefix[0] = 0;
  }
  __syncthreads();
  return prefix[a.batch];
}

// The walk that begins at an item of all.
template <class S> DEVICE void begin_walk(const AttendArguments& a, const int* prefix, int at, Walk<S>& walk) {
  const int places = a.heads * a.passes, inside = int(unsigned(at) / unsigned(places));
  int b = 0;
#pragma unroll 1
  for (int first = 1; first <= a.batch; first += 32) {
    const int i = first + (threadIdx.x & 31);
    const unsigned found = __ballot_sync(~0u, i <= a.batch && prefix[i] <= inside);
    b += __popc(found);
    if (found != ~0u) break;
  }
  const int length = prefix[b + 1] - prefix[b], rest = at - prefix[b] * places, place = int(unsigned(rest) / unsigned(length));
  const int h = a.passes == 1 ? place : place / a.passes;
  walk.open(a, prefix, b, h, place - h * a.passes, at - (rest - place * length));
}

// Shared memory.
template <class S> struct Room {
  uint8_t *table, *stages;
  Part* parts;         // of warp w: 2 w, of a unit that began before; 2 w + 1, of its last one
  Facts* facts;
  int *last, *prefix;  // what is known of two units; where each sequence begins
  float* numbers;      // of parts that have room of their own
  DEVICE Room(const AttendArguments& a, int warps) {
    uint8_t* const dynamic = shared_memory();
    // Dynamic shared memory begins at or before TABLE_AT; the launch has room for the difference.
    table = dynamic + (TABLE_AT - shared_address(dynamic));
    stages = table + S::TABLES;
    parts = (Part*)(stages + warps * S::STAGE);
    facts = (Facts*)(parts + 2 * warps);
    last = (int*)(facts + warps), prefix = last + 8;
    numbers = a.parts_shared ? (float*)(stages + a.parts_shared)
                             : a.partial + 2ll * blocks_of_grid() * COLUMNS * (S::D + 2) + (long long)S::PARTS * blockIdx.x * warps * COLUMNS * S::PART_ROW;
  }
  // [column][channel] of a part.
  DEVICE float* part(int p) const {
    if (S::BULK) return p % 2 ? (float*)(stages + p / 2 * S::STAGE) : numbers + p / 2 * COLUMNS * S::PART_ROW;
    return numbers + p * COLUMNS * S::PART_ROW;
  }
};

// What a lane adds of a column: four channels. Several warps take a column of more than 128.
template <class S> struct Piece {
  static constexpr int OF_COLUMN = (S::D + 127) / 128;
  int column, channel;
  bool have;
  DEVICE Piece(int task) : column(task / OF_COLUMN), channel((task % OF_COLUMN * 32 + int(threadIdx.x & 31)) * 4), have(channel < S::D) {}
};

// Parts of one unit in this block's warps, `its` of all parts: maxima by lanes, one part each, and the numbers two parts at a time.
template <class S> DEVICE Sum merge_parts(const Room<S>& room, unsigned its, const Piece<S>& piece) {
  const int lane = threadIdx.x & 31;
  float2 part = make_float2(NOTHING, 0.f);
  if (its >> lane & 1) part = room.parts[lane].column[piece.column];
  Sum sum;
  sum.clear();
  sum.most = largest_of_warp(part.x);
  const float factor = exp2_of(part.x - sum.most), weight = factor * part.y;
  const int at = piece.column * S::PART_ROW + (piece.have ? piece.channel : 0);
#pragma unroll 1
  while (its) {
    const int p = __ffs(its) - 1, rest = its & (its - 1), next = rest ? __ffs(rest) - 1 : p;
    const float4 x = *(const float4*)(room.part(p) + at), y = *(const float4*)(room.part(next) + at);
    const float f = __shfl_sync(~0u, factor, p), g = rest ? __shfl_sync(~0u, factor, next) : 0.f;
    sum.sum += __shfl_sync(~0u, weight, p) + (rest ? __shfl_sync(~0u, weight, next) : 0.f);
    sum.add_scaled(f, x);
    if (rest) sum.add_scaled(g, y);
    its = rest & (rest - 1);
  }
  return sum;
}

// Parts of a unit in blocks: `count` of those from `slot` on, two slots apart, the first of them at slot `begun`. Six at a time: one
// trip to memory.
template <class S> DEVICE Sum merge_blocks(const AttendArguments& a, const float2* columns, int begun, int slot, int count, const Piece<S>& piece) {
  Sum sum;
  sum.clear();
  int k = 0;
#pragma unroll 1
  do {
    float4 x[6];
    float2 part[6];
    float top = sum.most;
#pragma unroll
    for (int j = 0; j < 6; j++) {
      const int at = (j == 0 && k == 0 ? begun : slot + 2 * (k + j)) * COLUMNS + piece.column;
      part[j] = make_float2(NOTHING, 0.f), x[j] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (k + j < count) part[j] = __ldcg(columns + at), x[j] = __ldcg((const float4*)(a.partial + (long long)at * S::D + (piece.have ? piece.channel : 0)));
    }
#pragma unroll
    for (int j = 0; j < 6; j++) top = fmaxf(top, part[j].x);
    sum.rescale(top);
#pragma unroll
    for (int j = 0; j < 6; j++) sum.add_below(part[j], x[j]);
    k += 6;
  } while (k < count);
  return sum;
}

// Parts of this block's warps, which stand in the order of their items; then parts of blocks, by the last of a unit's to arrive. A
// warp takes a column of a unit. What this costs is trips, one after the other, to memory and to instructions that have not run
// yet: what a lane needs it asks for at once, by as few instructions as can be.
template <class S> DEVICE void merge(const AttendArguments& a) {
  const int warps = opaque(blockDim.x) / 32, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const Room<S> room(a, warps);
  const Part* const parts = room.parts;
  int *const last = room.last, *const prefix = room.prefix;
  const int items = *(const volatile int*)(prefix + a.batch) * a.heads * a.passes;
  const int blocks = blocks_of_grid();
  const Shares of_blocks(items, min(blocks, items));
  const int block_begin = of_blocks.begin(blockIdx.x), block_end = of_blocks.begin(blockIdx.x + 1);
  float2* const block_columns = (float2*)(a.partial + 2ll * blocks * COLUMNS * S::D);
  int early = -1, late = -1;  // a part of the unit that other blocks have begun, and of the one that others go on with
  const int number = lane < 2 * warps ? parts[lane].unit.number : -1;
  unsigned left = __ballot_sync(~0u, number != -1);
  int task = warp;
#pragma unroll 1
  while (left) {
    const int first = __ffs(left) - 1;
    const unsigned its = left & __ballot_sync(~0u, number == __shfl_sync(~0u, number, first));
    left &= ~its;
    const Unit& u = parts[first].unit;
    const bool whole = u.begin >= block_begin && u.end <= block_end, is_late = u.begin > block_begin;
    if (!whole) (is_late ? late : early) = first;
    const int tasks = u.columns * Piece<S>::OF_COLUMN;
#pragma unroll 1
    for (; task < tasks; task += warps) {
      const Piece<S> piece(task);
      const Sum sum = merge_parts(room, its, piece);
      if (!piece.have) continue;
      if (whole) {
        finish<S>(a, u, piece.column, piece.channel, sum);
      } else {
        const int at = (2 * blockIdx.x + is_late) * COLUMNS + piece.column;
        *(float4*)(a.partial + (long long)at * S::D + piece.channel) = sum.numbers();
        if (piece.channel == 0) block_columns[at] = make_float2(sum.most, sum.sum);
      }
    }
    task -= tasks;
  }
  // All warps know the same of these.
  if (early < 0 && late < 0) return;
  // Lane 0 has the early unit, all others the late one.
  const int part = lane == 0 ? early : late;
  const Unit& its = parts[max(part, 0)].unit;
  const int from = of_blocks.part_of(its.begin), to = of_blocks.part_of(its.end - 1);
  __syncthreads();
  if (threadIdx.x < 2) {
    const bool is_last = part >= 0 && arrive(a.arrived + its.number) == to - from;
    if (is_last) a.arrived[its.number] = 0;
    last[threadIdx.x] = is_last;
  }
  __syncthreads();
#pragma unroll 1
  for (int which = 0; which < 2; which++) {
    if (!last[which]) continue;
    const Unit& u = parts[__shfl_sync(~0u, part, which)].unit;
    const int first_block = __shfl_sync(~0u, from, which), count = __shfl_sync(~0u, to, which) - first_block + 1;
    // In its first block a unit may begin in the middle; there it is the last one.
    const int begun = 2 * first_block + (u.begin > of_blocks.begin(first_block));
    // Warps that have no column of their own share one: each takes some of the parts, and the table's room takes what they find.
    const int tasks = u.columns * Piece<S>::OF_COLUMN;
    const int helpers = max(warps / tasks, 1), each = (count + helpers - 1) / helpers;
    float* const found = (float*)(room.table + which * 32768) + lane * 4;
    float2* const sums = (float2*)(room.table + which * 32768 + 16384);
#pragma unroll 1
    for (int t = warp; t < tasks * helpers; t += warps) {
      const int helper = t / tasks, skipped = helper * each;
      const Piece<S> piece(t - helper * tasks);
      const int slot = 2 * (first_block + skipped);
      const Sum sum = merge_blocks(a, block_columns, skipped ? slot : begun, slot, min(each, count - skipped), piece);
      if (helpers == 1) {
        if (piece.have) finish<S>(a, u, piece.column, piece.channel, sum);
      } else {
        *(float4*)(found + 128 * t) = sum.numbers(), sums[t] = make_float2(sum.most, sum.sum);
      }
    }
    if (helpers == 1) continue;
    __syncthreads();
    if (warp < tasks) {
      const Piece<S> piece(warp);
      Sum sum;
      sum.clear();
#pragma unroll 1
      for (int t = warp; t < tasks * helpers; t += tasks) sum.add(sums[t], *(const float4*)(found + 128 * t));
      if (piece.have) finish<S>(a, u, piece.column, piece.channel, sum);
    }
  }
}

template <class S> DEVICE void load_keys(const AttendArguments& a, Raw<S>& raw, const Item& x) {
  if (x.exact()) load_exact(raw, Rows(x.keys, opaque(a.heads) * 2 * S::D, x.tokens()));
  else if constexpr (S::WIDE && !S::BULK) stream_keys(raw, x.keys);
  else load_page(raw, x.keys + (threadIdx.x & 31) * 16);
}

// A page's halves on their way into a warp's room: all of them, or the fields.
template <class S> DEVICE void copy_keys(const AttendArguments& a, uint32_t to, const Item& x, uint32_t barrier) {
  if constexpr (!S::BULK) copy_fields<S::KEY_FIELDS>(to, x.keys + S::KEY_CODES);
  else if ((threadIdx.x & 31) == 0) bulk_copy(to, x.keys, S::ORDERED ? a.value_offset : S::KEY_BYTES, barrier);
}
template <class S> DEVICE void copy_values(const AttendArguments& a, uint32_t to, const Item& x, uint32_t barrier) {
  if constexpr (!S::BULK) copy_fields<S::VALUE_FIELDS>(to, x.values(a) + S::VALUE_CODES);
  else if ((threadIdx.x & 31) == 0) bulk_copy(to, x.values(a), S::VALUE_BYTES, barrier);
}

// Asks for the table, all blocks together, and for the queries that this block will probably begin with, as if all sequences were
// equally long: a first trip to memory is long.
template <class S> DEVICE void ask_ahead(const AttendArguments& a) {
  const long long entry = 16ll * (blockIdx.x * blockDim.x + threadIdx.x);
  if (entry < a.batch * a.capacity) ask_for(a.table + entry);
  if (threadIdx.x / 32 != (blockDim.x > 32)) return;
  constexpr int LINES = (2 * S::D + 127) / 128;  // of a row
  const unsigned unit = blockIdx.x * unsigned(a.batch * a.heads) / unsigned(blocks_of_grid()), b = unit / unsigned(a.heads), h = unit - b * a.heads;
  const int lane = threadIdx.x & 31, head = h * a.group + lane / LINES;
  if (head < a.heads * a.group) ask_for(a.q + b * a.q_stride[0] + head * a.q_stride[1] + lane % LINES * 128);
}

template <class S> DEVICE void attend(const AttendArguments& a) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  int4 ahead = make_int4(0, 0, 0, 0);
  if (int(threadIdx.x) < min(32, a.batch)) ahead = __ldg(a.counts + threadIdx.x);
  ask_ahead<S>(a);
  const Room<S> room(a, warps);
  int* const prefix = room.prefix;
  const uint32_t keys = shared_address(room.stages + warp * S::STAGE);  // all else of the stage is a constant away
  if (S::BULK && lane == 0) begin_barrier(keys + S::BARRIERS_AT), begin_barrier(keys + S::BARRIERS_AT + 8), publish_barriers();
  __syncwarp();
  if (lane < 2) room.parts[2 * warp + lane].unit.number = -1;
  const int places = a.heads * a.passes, items = scan_items<S>(a, prefix, ahead) * places;
  const int blocks = min(blocks_of_grid(), items);  // with fewer items than blocks, the last ones have nothing to do
  if (int(blockIdx.x) >= blocks) return;
  const Shares of_blocks(items, blocks);
  const int block_begin = of_blocks.begin(blockIdx.x), block_end = of_blocks.begin(blockIdx.x + 1);
  const Shares of_warps(block_end - block_begin, warps);
  const int begin = block_begin + of_warps.begin(warp), end = block_begin + of_warps.begin(warp + 1);

  Walk<S> walk;
  walk.facts = room.facts + warp;
  Queries<S> q;
  q.shared = keys + S::QUERIES_AT + 8 * lane;
  Raw<S> raw;
  Item x;
  if (begin < end) {
    if (lane == 0) walk.facts->begin = begin, walk.facts->end = end;
    begin_walk(a, prefix, begin, walk);
    q.fetch(a, walk.facts->unit.b, walk.facts->unit.h, walk.facts->unit.column);
    x = walk.current(a, begin, 2 * S::D);
    if (!S::BULK) load_keys(a, raw, x);
    if (!x.exact()) copy_keys<S>(a, keys, x, keys + S::BARRIERS_AT), copy_values<S>(a, keys + S::KEY_ROOM, x, keys + S::BARRIERS_AT + 8);
  }
  if constexpr (S::WIDE) fill_wide<S>(a, room.table);
  else fill_table<S::D == 128 || S::D == 64 ? 4 : 1>(a, room.table);
  __syncthreads();
  if (begin < end) {
    State<S> state;
    q.prepare(a);
    state.clear();
    const uint32_t lane4 = lane * 4;
    // Rarely needed: found again then, not held in registers.
    const auto room_again = [&] { return Room<S>(a, opaque(blockDim.x) / 32); };
    uint32_t phase = 0;  // of both barriers: that of the page in hand
#pragma unroll 1
    for (int at = begin;; at++) {
      int stop = end;
      if constexpr (S::BULK) stop = *(const volatile int*)&walk.facts->end;
      const bool more = at + 1 < stop;
      float score[4][4];
      if (!S::BULK) await_fields();
      if (x.exact()) {
        if constexpr (S::ORDERED) load_ordered(a, raw, x, walk.facts->unit.h);
        else if constexpr (S::BULK && !S::FEW) load_keys(a, raw, x);
        if constexpr (S::FEW) {
          exact_scores_again(score[0], a, q, Rows(x.keys, opaque(a.heads) * 2 * S::D, x.tokens()));
        } else {
          exact_scores(score[0], a, q, raw);
          load_exact(raw, Rows(x.values(a), opaque(a.heads) * 2 * S::D, x.tokens()));
        }
      } else if constexpr (S::BULK) {
        await_barrier(keys + S::BARRIERS_AT, phase);
        if constexpr (S::ORDERED) mixed_scores(score, a, q, keys, lane4);
        else scores_of(score, q, staged<S, 0>(keys), keys + S::KEY_FIELDS_AT, lane4);
      } else {
        scores_of(score, q, streamed<S, 0>(raw, x.values(a)), keys + S::KEY_FIELDS_AT, lane4);
      }
      if (S::capped(a)) {
        if (x.exact()) cap_scores((float(&)[1][4])score, a.soft_cap);
        else cap_scores(score, a.soft_cap);
      }
      if (walk.needs_mask(a, x, at)) {
        if (x.exact()) walk.mask(a, (float(&)[1][4])score, at, x.tokens());
        else walk.mask(a, score, at, x.tokens());
      }
      const bool done = walk.reach(a, room_again, at + 1);
      Item y = x;
      if (more) y = walk.current(a, at + 1, 2 * S::D);
      const bool page = more && !y.exact();
      __syncwarp();
      if (page) copy_keys<S>(a, keys, y, keys + S::BARRIERS_AT);
      if (x.exact()) {
        uint32_t weight[2];
        weigh<S, 1>(weight, (float(&)[1][4])score, state);
        if constexpr (S::FEW) add_exact_again(state, a, weight, Rows(x.values(a), opaque(a.heads) * 2 * S::D, x.tokens()));
        else add_exact(state, a, weight, raw);
        if (page) copy_values<S>(a, keys + S::KEY_ROOM, y, keys + S::BARRIERS_AT + 8);
        if (!S::BULK && more) load_keys(a, raw, y);
      } else {
        uint32_t weight[8];
        weigh<S, 4>(weight, score, state);
        auto scale = fields_of_values(q);
        if (S::BULK) await_barrier(keys + S::BARRIERS_AT + 8, phase), phase ^= 1;
        scale.load(keys + S::KEY_ROOM + S::VALUE_FIELDS_AT, x.tokens());
        if constexpr (S::BULK) {
          add_page(state, weight, staged<S, 1>(keys + S::KEY_ROOM), scale, lane4);
          __syncwarp();
          if (page) copy_values<S>(a, keys + S::KEY_ROOM, y, keys + S::BARRIERS_AT + 8);
        } else {
          __syncwarp();
          if (page) copy_values<S>(a, keys + S::KEY_ROOM, y, keys + S::BARRIERS_AT + 8);
          add_page(state, weight, streamed<S, 1>(raw, page ? y.keys : nullptr), scale, lane4);
        }
        if (!S::BULK && more && !page) load_keys(a, raw, y);
      }
      x = y;
      if (!done && more) continue;
      // The end of a unit, or of this warp's share.
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) {
        state.sum[0] += __shfl_xor_sync(~0u, state.sum[0], d);
        state.sum[1] += __shfl_xor_sync(~0u, state.sum[1], d);
      }
      if constexpr (S::GROUPED) add_zeros(state);
      const Unit* const u = done ? &walk.facts->was : &walk.facts->unit;
      if (done && u->begin >= walk.facts->begin) {
        store_unit(a, *u, state);
      } else {
        // A share has at most one unit that began before it and goes on to another one, and one that goes on after it.
        const Room<S> its = room_again();
        const int p = 2 * (opaque(threadIdx.x) / 32) + (more ? 0 : 1);
        store_part(state, its.part(p));
        if (lane < 4) {
          its.parts[p].column[2 * lane] = make_float2(state.most[0], state.sum[0]);
          its.parts[p].column[2 * lane + 1] = make_float2(state.most[1], state.sum[1]);
        }
        if (lane == 0) its.parts[p].unit = *u;
      }
      if (!more) break;
      q.fetch(a, walk.facts->unit.b, walk.facts->unit.h, walk.facts->unit.column);
      q.prepare(a);
      state.clear();
    }
  }
  __syncthreads();
  merge<S>(a);
}

}  // namespace nqkv

#define ATTEND_KERNEL(NAME, ...)                                                                                           \
  extern "C" __global__ void __launch_bounds__(32 * __VA_ARGS__::MOST_WARPS, 1) NAME(const __grid_constant__ AttendArguments a) { \
    nqkv::attend<__VA_ARGS__>(a);                                                                                          \
  }
// Any call, and plain ones in bfloat16 and float16.
#define ATTEND(NAME, ...)                                 \
  ATTEND_KERNEL(NAME, nqkv::Shape<__VA_ARGS__>)            \
  ATTEND_KERNEL(NAME##_bf16, nqkv::Shape<__VA_ARGS__, BF>) \
  ATTEND_KERNEL(NAME##_fp16, nqkv::Shape<__VA_ARGS__, F16>)

// Keys of KEY bits, or mixed, and values of VALUE bits.
#define ATTEND_WIDE(NAME, D, PER_TOKEN, BLOCK, BULK, KEY, VALUE) ATTEND_KERNEL(NAME, nqkv::Wide<D, PER_TOKEN, BLOCK, BULK, KEY, VALUE>)

// Zero points: keys and values of 4 bits, and of 2.
#define ATTEND_GROUPED(NAME, D, BULK)                                           \
  ATTEND_KERNEL(NAME, nqkv::Grouped<nqkv::Shape<D, false, 2, BULK>>)            \
  ATTEND_KERNEL(NAME##_bf16, nqkv::Grouped<nqkv::Shape<D, false, 2, BULK, BF>>) \
  ATTEND_KERNEL(NAME##_fp16, nqkv::Grouped<nqkv::Shape<D, false, 2, BULK, F16>>)
#define ATTEND_GROUPED_2(NAME, D, BULK) ATTEND_KERNEL(NAME, nqkv::Grouped<nqkv::Wide<D, false, 2, BULK, 2, 2>>)

// Two scales of a token.
#define ATTEND_SPLIT(NAME, ...)                           \
  ATTEND_KERNEL(NAME, nqkv::Split<__VA_ARGS__>)            \
  ATTEND_KERNEL(NAME##_bf16, nqkv::Split<__VA_ARGS__, BF>) \
  ATTEND_KERNEL(NAME##_fp16, nqkv::Split<__VA_ARGS__, F16>)
