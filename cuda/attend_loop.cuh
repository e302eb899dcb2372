// Decode attention on pages: who does what. One launch; every warp takes an equal share of all items (a page, or 16 exact
// tokens) of all units (sequence, KV head, 8 columns), in order, so that it meets one or two units and waits for nobody. A unit
// that one warp has whole is written at once. Parts are merged by the block once its warps are done; parts of blocks by the last
// of them to arrive, always in the same order. The shares follow from the counts on the device: nothing is planned before.
#pragma once
#include "attend_tile.cuh"

namespace nqkv {

// ---- shares

// Where a unit's items begin: those in front are masked for every query.
DEVICE int first_item(const AttendArguments& a, const int4& n, int packed, int low) {
  if (low <= 0) return 0;
  const int sinks = (n.x + TILE_TOKENS - 1) / TILE_TOKENS;
  if (low < n.x) return low / TILE_TOKENS;
  if (low - n.x < packed) return sinks + (low - n.x) / PAGE_TOKENS;
  return sinks + n.y + (low - n.x - packed) / TILE_TOKENS;
}

// Tokens in pages, where all but the last are full.
DEVICE int packed_tokens(const AttendArguments& a, int b, const int4& n) {
  if (n.y == 0) return 0;
  return a.single ? (n.y - 1) * PAGE_TOKENS + int(__ldg(a.table + b * a.capacity + n.y - 1) >> 56) : n.y * PAGE_TOKENS;
}

// Lowest position that any query of sequence b attends.
DEVICE int lowest(const AttendArguments& a, int b, int tokens) {
  const int start = a.starts ? __ldg(a.starts + b) : 0;
  return a.window ? max(start, tokens - a.queries - a.window + 1) : start;
}

// Items of sequence b for one head, at least one, so that somebody writes its result.
template <class S> DEVICE int items_of(const AttendArguments& a, int b, const int4& n) {
  const int all = (n.x + TILE_TOKENS - 1) / TILE_TOKENS + n.y + (n.z + TILE_TOKENS - 1) / TILE_TOKENS;
  if (!S::masked(a) || a.irregular) return max(all, 1);
  const int packed = packed_tokens(a, b, n);
  return max(all - first_item(a, n, packed, lowest(a, b, n.x + packed + n.z)), 1);
}

// Equal shares of items in a row: the first `rest` parts have one more than `each`.
struct Shares {
  int each, rest;
  DEVICE Shares(int items, int parts) : each(int(unsigned(items) / unsigned(parts))), rest(items - each * parts) {}
  DEVICE int begin(int part) const { return each * part + min(part, rest); }
  // The part that has an item.
  DEVICE int part_of(int item) const {
    const int larger = rest * (each + 1);
    return item < larger ? int(unsigned(item) / unsigned(each + 1)) : rest + int(unsigned(item - larger) / unsigned(max(each, 1)));
  }
};

// A sequence, KV head and up to 8 columns.
struct Unit {
  int number, begin, end;  // its items among all
  int b, h, column;        // the first column: a query times the group, plus a head of the group
  int columns;
  int row;  // of the output, of the first query and head
  // Where a row of the output stands: column c.
  template <class S> DEVICE long long row_of(const AttendArguments& a, int c) const {
    if (S::queries(a) == 1) return row + column + c;
    const int group = opaque(a.group), query = (column + c) / group;
    return (long long)row + query * a.heads * group + column + c - query * group;
  }
};

// ---- a warp's walk through its items

struct Item {
  const uint8_t* keys;
  int count;  // valid tokens, and EXACT if they are no page's, and TAIL
  DEVICE bool exact() const { return count & EXACT; }
  DEVICE int tokens() const { return count & (EXACT - 1); }
  DEVICE const uint8_t* values(const AttendArguments& a) const {
    if (!exact()) return keys + a.value_offset;
    return keys + (count & TAIL ? a.tail[1] - a.tail[0] : a.sinks[1] - a.sinks[0]);
  }
};

// What a warp knows of where it is, in shared memory: registers are scarce.
struct Facts {
  int4 n;                     // counts
  int first, packed, low;     // first item; positions only if they matter
  int known, known_position;  // the start of a page, where pages may be partial
  int begin, end;             // the warp's items
  Unit unit, was;             // this one and the one before
  int position[2];            // of the first token of an item: of even ones, of odd ones
};

template <class S> struct Walk {
  Facts* facts;

  // `begin`: the unit's first item.
  DEVICE void open(const AttendArguments& a, const int* prefix, int b, int h, int pass, int begin) {
    const int4 n = __ldg(a.counts + b);
    const int lane = threadIdx.x & 31;
    int first = 0, packed = 0, low = 0;
    if (S::masked(a)) {
      packed = a.irregular ? counted(a, b, 0, n.y) : packed_tokens(a, b, n);
      low = lowest(a, b, n.x + packed + n.z);
      if (!a.irregular) first = first_item(a, n, packed, low);
    }
    __syncwarp();
    if (lane == 0) {
      facts->n = n, facts->first = first, facts->packed = packed, facts->low = low, facts->known = 0, facts->known_position = n.x;
      Unit u;
      u.number = (b * a.heads + h) * a.passes + pass, u.begin = begin, u.end = begin + prefix[b + 1] - prefix[b], u.b = b, u.h = h;
      u.column = pass * COLUMNS, u.columns = min(COLUMNS, S::queries(a) * a.group - u.column), u.row = (b * S::queries(a) * a.heads + h) * a.group;
      facts->unit = u;
    }
    __syncwarp();
  }
  // Tokens of pages from..to, by a warp.
  DEVICE int counted(const AttendArguments& a, int b, int from, int to) const {
    int sum = 0;
#pragma unroll 1
    for (int p = from + (threadIdx.x & 31); p < to; p += 32) sum += int(__ldg(a.table + b * a.capacity + p) >> 56);
    return __reduce_add_sync(~0u, sum);
  }
  // Item `at` of all, which is one of this unit's.
  DEVICE Item current(const AttendArguments& a, int at, int row_bytes) {
    const int4 n = facts->n;
    const int b = facts->unit.b, h = facts->unit.h, sinks = (n.x + TILE_TOKENS - 1) / TILE_TOKENS;
    const int item = at - facts->unit.begin + facts->first, page = item - sinks;
    Item x;
    int position;
    if (page >= 0 && page < n.y) {
      const unsigned long long entry = __ldg(a.table + b * a.capacity + page);
      x.keys = (const uint8_t*)(entry & ADDRESS) + (long long)h * a.page_bytes;
      x.count = int(entry >> 56), position = n.x + page * PAGE_TOKENS;
      if (S::masked(a) && a.irregular) {
        const int known = facts->known;
        position = facts->known_position + counted(a, b, known, page);
        __syncwarp();
        if ((threadIdx.x & 31) == 0) facts->known = page, facts->known_position = position;
      }
    } else {
      const bool tail = page >= 0;
      const int slot = (tail ? page - n.y : item) * TILE_TOKENS, slots = tail ? a.tail_slots : a.sink_slots;
      const long long at = ((long long)b * slots + slot) * (long long)a.heads * row_bytes + h * row_bytes;
      x.keys = (tail ? a.tail[0] : a.sinks[0]) + at;
      x.count = max(min((tail ? n.z : n.x) - slot, TILE_TOKENS), 0) | EXACT | (tail ? TAIL : 0);
      position = slot + (tail ? n.x + facts->packed : 0);
    }
    if (S::masked(a)) {
      if ((threadIdx.x & 31) == 0) facts->position[at & 1] = position;
      __syncwarp();
    }
    return x;
  }
  // Goes on to the next unit, if item `at` is not this one's. True: it is not.
  template <class R> DEVICE bool reach(const AttendArguments& a, const R& room, int at) {
    if (at < facts->unit.end) return false;
    if ((threadIdx.x & 31) == 0) facts->was = facts->unit;
    int b = facts->unit.b, h = facts->unit.h, pass = facts->unit.column / COLUMNS + 1;
    if (pass == a.passes) pass = 0, h++;
    if (h == a.heads) h = 0, b++;
    if (b < a.batch) open(a, room().prefix, b, h, pass, at);
    else __syncwarp();
    return true;
  }
  // Minus infinity where a column may not look. N tiles of 16 tokens. Before `reach`.
  template <int N> DEVICE void mask(const AttendArguments& a, float (&score)[N][4], int at, int count) const {
    const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3, column = facts->unit.column + 2 * t;
    const int tokens = facts->n.x + facts->packed + facts->n.z, position = facts->position[at & 1];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      int from = 0, to = count;
      if (S::masked(a)) {
        const int end = tokens - S::queries(a) + min((column + c) / opaque(a.group), S::queries(a) - 1) + 1;
        to = min(to, end - position);
        from = max(a.window ? end - a.window : 0, a.starts ? __ldg(a.starts + facts->unit.b) : 0) - position;
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int token = 16 * i + 8 * half + g;
          if (token < from || token >= to) score[i][2 * half + c] = -INFINITY;
        }
      }
    }
  }
  DEVICE bool needs_mask(const AttendArguments& a, const Item& x, int at) const {
    if (x.tokens() < (x.exact() ? TILE_TOKENS : PAGE_TOKENS)) return true;
    if (!S::masked(a)) return false;
    const int tokens = facts->n.x + facts->packed + facts->n.z, position = facts->position[at & 1];
    const int last = a.window ? max(tokens - a.window, facts->low) : facts->low;
    return position < last || position + x.tokens() > tokens - S::queries(a) + 1;
  }
};

// ---- parts and results

template <class S> DEVICE uint32_t result_pair(const AttendArguments& a, float low, float high) {
  const __nv_bfloat162 bf = __floats2bfloat162_rn(low, high);
  return S::out_dtype(a) == BF ? *(const uint32_t*)&bf : pair_of(low, high);
}

template <class S> DEVICE void store_lse(const AttendArguments& a, long long row, float most, float sum) {
  if (S::says_lse(a)) a.lse[row] = sum > 0.f ? (most + log2f(sum)) * 0.6931471805599453f : -INFINITY;
}

// A warp's whole unit: out, with the factors of its lanes' two columns.
template <class S> DEVICE void store_unit(const AttendArguments& a, const Unit& u, const State<S>& state) {
  const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
  const float one = power_of_two(state.unit);
  const float f0 = state.sum[0] > 0.f ? __fdividef(one, state.sum[0]) : 0.f, f1 = state.sum[1] > 0.f ? __fdividef(one, state.sum[1]) : 0.f;
  if (S::out_dtype(a) == F32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (2 * t + i >= u.columns) continue;
      float* const to = (float*)a.out + u.template row_of<S>(a, 2 * t + i) * S::D + g;
#pragma unroll
      for (int j = 0; j < S::SLABS; j++) to[16 * j] = state.out[j][i] * (i ? f1 : f0), to[16 * j + 8] = state.out[j][2 + i] * (i ? f1 : f0);
    }
  } else {
    // Transposed, a lane has two channels of column g.
    uint32_t* const to = (uint32_t*)((uint16_t*)a.out + u.template row_of<S>(a, min(g, u.columns - 1)) * S::D + 2 * t);
#pragma unroll
    for (int j = 0; j < S::SLABS; j++) {
      const uint32_t low = transposed(result_pair<S>(a, state.out[j][0] * f0, state.out[j][1] * f1));
      const uint32_t high = transposed(result_pair<S>(a, state.out[j][2] * f0, state.out[j][3] * f1));
      if (g < u.columns) to[8 * j] = low, to[8 * j + 4] = high;
    }
  }
  if (g == 0 && 2 * t < u.columns) store_lse<S>(a, u.template row_of<S>(a, 2 * t), state.most[0], state.sum[0]);
  if (g == 0 && 2 * t + 1 < u.columns) store_lse<S>(a, u.template row_of<S>(a, 2 * t + 1), state.most[1], state.sum[1]);
}

// A part of a unit: [column][channel].
template <class S> DEVICE void store_part(const State<S>& state, float* to) {
  const int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
  const float one = power_of_two(state.unit);
  to += 2 * t * S::PART_ROW + g;
#pragma unroll
  for (int j = 0; j < S::SLABS; j++) {
    to[16 * j] = state.out[j][0] * one, to[16 * j + S::PART_ROW] = state.out[j][1] * one;
    to[16 * j + 8] = state.out[j][2] * one, to[16 * j + 8 + S::PART_ROW] = state.out[j][3] * one;
  }
}

// Maximum and sum of each column of a part; its numbers stand elsewhere.
struct alignas(16) Part {
  float2 column[COLUMNS];
  Unit unit;  // number -1: none
};

// Four channels of a column of several parts.
struct Sum {
  float most, sum, number[4];
  DEVICE void clear() { most = NOTHING, sum = number[0] = number[1] = number[2] = number[3] = 0.f; }
  DEVICE void rescale(float top) {
    const float f = exp2_of(most - top);
    most = top, sum *= f, number[0] *= f, number[1] *= f, number[2] *= f, number[3] *= f;
  }
  DEVICE void add_scaled(float f, float4 x) {
    number[0] = fmaf(f, x.x, number[0]), number[1] = fmaf(f, x.y, number[1]);
    number[2] = fmaf(f, x.z, number[2]), number[3] = fmaf(f, x.w, number[3]);
  }
  // A part whose maximum is not above.
  DEVICE void add_below(float2 part, float4 x) {
    const float f = exp2_of(part.x - most);
    sum = fmaf(f, part.y, sum), add_scaled(f, x);
  }
  DEVICE void add(float2 part, float4 x) { rescale(fmaxf(most, part.x)), add_below(part, x); }
  DEVICE float4 numbers() const { return make_float4(number[0], number[1], number[2], number[3]); }
};

// Four channels of a column.
template <class S> DEVICE void finish(const AttendArguments& a, const Unit& u, int c, int channel, const Sum& x) {
  const long long row = u.template row_of<S>(a, c), at = row * S::D + channel;
  const float f = x.sum > 0.f ? __fdividef(1.f, x.sum) : 0.f;
  if (S::out_dtype(a) == F32) *(float4*)((float*)a.out + at) = make_float4(x.number[0] * f, x.number[1] * f, x.number[2] * f, x.number[3] * f);
  else *(uint2*)((uint16_t*)a.out + at) = make_uint2(result_pair<S>(a, x.number[0] * f, x.number[1] * f), result_pair<S>(a, x.number[2] * f, x.number[3] * f));
  if (channel == 0) store_lse<S>(a, row, x.most, x.sum);
}

}  // namespace nqkv
