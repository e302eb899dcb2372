// Pages to dense tokens, the fast way: what pages_read does, for 4-bit slabs in the model's channel order when all pages of a
// sequence but its last are full, so that a page's place is its number.
// target: compute_80
// isa: 8.0
//
// A warp takes a tile (read_tile.cuh); blocks are small, since what a warp that is done had stays taken until its block is done.
// Blocks beyond those of the pages write what is exact: sinks, tail, and the zeros past a sequence's end.
#include "read_tile.cuh"

struct ReadArguments {
  const int4* counts;  // sinks, pages, tail, open
  const unsigned long long* table;
  long long capacity;
  int batch, heads, page_bytes, exact, sink_slots, tail_slots;
  int from, tokens, first_page, pages, page_blocks;
  int chunks, front, gap;  // EXACT_TOKENS that may not all be in pages: how many of a head; after so many of them follow others
  ReadSide side[2];
};
static_assert(sizeof(ReadSide) == 88 && sizeof(ReadArguments) == 80 + 2 * 88, "as in src/cuda/read.rs");

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;
constexpr int WARPS = 2, EXACT_TOKENS = 16;

// Tokens of a sequence in pages, if all but the last are full.
DEVICE int packed_of(const ReadArguments& a, int b, const int4& n) {
  return n.y > 0 ? (n.y - 1) * PAGE_TOKENS + int(__ldg(a.table + b * a.capacity + n.y - 1) >> 56) : 0;
}

// One tile of a page by one warp.
template <class T, bool VALUE> DEVICE void read_page(const ReadArguments& a, const ReadSide& s, Room& room, float level, int number) {
  const int lane = lane_of(), rest = number / unsigned(s.tiles), tile = number - rest * s.tiles;
  // Pages that follow each other are written by neighbours: a row of the output stays together.
  const int row = rest / unsigned(a.pages), page = a.first_page + rest - row * a.pages, b = row / unsigned(a.heads), h = row - b * a.heads;
  if (b >= a.batch) return;
  const int4 n = __ldg(a.counts + b);
  const int start = n.x + page * PAGE_TOKENS - a.from;  // of slot 0 in the output
  if (page >= n.y || start >= a.tokens || start + PAGE_TOKENS <= 0) return;
  const unsigned long long entry = __ldg(a.table + b * a.capacity + page);
  Tile t;
  t.head = h, t.first = tile * TILE, t.have = min(TILE, s.slabs - t.first);
  t.low = max(0, -start), t.high = min(int(entry >> 56), a.tokens - start);
  t.half = (const uint8_t*)(entry & ADDRESS) + (long long)h * a.page_bytes + s.half_offset;
  t.out = s.out + ((((long long)b * a.heads + h) * a.tokens + start) * s.slabs + t.first) * (SLAB_CHANNELS * int(sizeof(T)));
  const uint32_t to = uint32_t(__cvta_generic_to_shared(room.codes)) + lane * 16;
#pragma unroll
  for (int i = 0; i < TILE; i++)
    if (i < t.have) copy_16(to + i * SLAB_STRIDE, t.half + SLAB_BYTES * (t.first + i) + lane * 16, true);
  copy_fields(s, t, VALUE || s.per_token, room.fields);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  const bool whole = t.low == 0 && t.high == PAGE_TOKENS && t.have == TILE;
  if constexpr (VALUE) {
    if (whole) read_values<T, true>(s, t, room, level);
    else read_values<T, false>(s, t, room, level);
  } else if (s.per_token) {
    if (whole) read_keys<T, true, true>(s, t, room, level);
    else read_keys<T, true, false>(s, t, room, level);
  } else {
    if (whole) read_keys<T, false, true>(s, t, room, level);
    else read_keys<T, false, false>(s, t, room, level);
  }
}

DEVICE void store_number(float* to, double x) { *to = __double2float_rn(x); }
DEVICE void store_number(__half* to, double x) { *to = __double2half(x); }
DEVICE void store_number(__nv_bfloat16* to, double x) { *to = __double2bfloat16(x); }

// What of EXACT_TOKENS of a head is in no page.
template <class T> DEVICE void read_exact(const ReadArguments& a, const ReadSide& s, int number) {
  const int rest = number / unsigned(a.chunks), chunk = number - rest * a.chunks, b = rest / unsigned(a.heads), h = rest - b * a.heads;
  const int first = (chunk < a.front ? chunk : chunk + a.gap) * EXACT_TOKENS;
  const int4 n = __ldg(a.counts + b);
  const int end = n.x + packed_of(a, b, n), last = min(first + EXACT_TOKENS, a.tokens), dim = s.slabs * SLAB_CHANNELS;
  if (a.from + first >= n.x && a.from + last <= end) return;
#pragma unroll 1
  for (int e = threadIdx.x; e < (last - first) * dim; e += blockDim.x) {
    const int i = first + e / dim, c = e % dim, t = a.from + i;
    if (t >= n.x && t < end) continue;
    double x = 0;
    if (t < n.x) x = load_number(s.sinks, (((long long)b * a.sink_slots + t) * a.heads + h) * dim + c, a.exact);
    else if (t < end + n.z) x = load_number(s.tail, (((long long)b * a.tail_slots + t - end) * a.heads + h) * dim + c, a.exact);
    store_number((T*)s.out + (((long long)b * a.heads + h) * a.tokens + i) * dim + c, x);
  }
}

template <class T> DEVICE void read(const ReadArguments& a) {
  __shared__ __align__(128) Room rooms[WARPS];
  const int side = blockIdx.y, warp = threadIdx.x / 32;
  const ReadSide& s = a.side[side];
  if (int(blockIdx.x) >= a.page_blocks) {
    read_exact<T>(a, s, blockIdx.x - a.page_blocks);
    return;
  }
  const float level = __ldg(s.level + min(lane_of() % 16, s.levels - 1));
  if (side) read_page<T, true>(a, s, rooms[warp], level, blockIdx.x * WARPS + warp);
  else read_page<T, false>(a, s, rooms[warp], level, blockIdx.x * WARPS + warp);
}

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(32 * WARPS, 12) read_f32(const __grid_constant__ ReadArguments a) { read<float>(a); }
extern "C" __global__ void __launch_bounds__(32 * WARPS, 12) read_f16(const __grid_constant__ ReadArguments a) { read<__half>(a); }
extern "C" __global__ void __launch_bounds__(32 * WARPS, 12) read_bf16(const __grid_constant__ ReadArguments a) { read<__nv_bfloat16>(a); }
