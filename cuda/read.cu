// Pages to dense tokens, the fast way: what pages_read does, for 4-bit slabs in the model's channel order when all pages of a
// sequence but its last are full, so that a page's place is its number.
// target: compute_80
// isa: 8.0
//
// A warp takes 64 tokens of as many slabs of a head as make 128 bytes a token, its codes 16 bytes a lane. Numbers go through
// shared memory, since in fragment order a lane's neighbours in memory are other lanes'. The levels stand there too, a copy for
// each lane. Blocks beyond those of the pages write what is exact: sinks, tail, and the zeros past a sequence's end.
#include "page.cuh"

struct ReadSide {
  uint8_t* out;  // [batch, heads, tokens, dim]
  const uint8_t *sinks, *tail;
  const float* level;
  int slabs, tiles;      // of a head
  int per_token, block;  // slabs of a per-token block
  int group;             // tokens of a per-channel block
  int spans_heads, blocks, code_bytes, half_offset, fields, field_size, scale_dtype, levels, padding;
};

struct ReadArguments {
  const int4* counts;  // sinks, pages, tail, open
  const unsigned long long* table;
  long long capacity;
  int batch, heads, page_bytes, exact, sink_slots, tail_slots;
  int from, tokens, first_page, pages, page_blocks;
  int chunks, front, gap;  // 64 tokens that may not all be in pages: how many of a head; after so many of them follow others
  ReadSide side[2];
};
static_assert(sizeof(ReadSide) == 88 && sizeof(ReadArguments) == 80 + 2 * 88, "as in src/cuda/read.rs");

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;
constexpr int WARPS = 8, ROW_BYTES = 128;

// Tokens of a sequence in pages, if all but the last are full.
DEVICE int packed_of(const ReadArguments& a, int b, const int4& n) {
  return n.y > 0 ? (n.y - 1) * PAGE_TOKENS + int(__ldg(a.table + b * a.capacity + n.y - 1) >> 56) : 0;
}

// e4m3, which takes a hundred times the code, goes the other way.
DEVICE float field(const ReadSide& s, const uint8_t* half, int place) {
  const uint8_t* from = half + s.code_bytes + s.field_size * place;
  if (s.scale_dtype == FP32) return read_field(from, FP32);
  return s.scale_dtype == FP16 ? read_field(from, FP16) : read_field(from, BF16);
}

// Four of 16 bits that follow each other, the first of them on a place divisible by four.
DEVICE void four_fields(float (&x)[4], const ReadSide& s, const uint8_t* half, int place) {
  const uint8_t* from = half + s.code_bytes + s.field_size * place;
  const uint2 w = __ldg((const uint2*)from);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const uint32_t word = k < 2 ? w.x : w.y;
    x[k] = s.scale_dtype == FP16 ? number_in<__half>(word, k % 2) : number_in<__nv_bfloat16>(word, k % 2);
  }
}

// Eight numbers of a word of codes: number j with the fields that which(j) names.
template <int COUNT, class W> DEVICE void decode(float (&x)[8], uint32_t w, const char* levels, const float (&scale)[COUNT], const float (&zero)[COUNT], W which) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const uint32_t at = (j < 2 ? w << (7 - 4 * j) : w >> (4 * j - 7)) & 0x780;
    x[j] = __fmaf_rn(*(const float*)(levels + at), scale[which(j)], zero[which(j)]);
  }
}

template <class T> DEVICE uint32_t bits_of(float low, float high);
template <> DEVICE uint32_t bits_of<__half>(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *(const uint32_t*)&h;
}
template <> DEVICE uint32_t bits_of<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
  return *(const uint32_t*)&h;
}

// Eight keys or values of strip a, slab i, into this warp's tokens in shared memory: 16-byte pieces of a token are in the order of
// its last three bits.
template <class T, bool VALUE> DEVICE void put(uint8_t* room, const float (&x)[8], int strip, int slab) {
  const int lane = threadIdx.x & 31, q = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 4; m++) {
    const int n = 16 * strip + (VALUE ? 2 * t + m / 2 * 8 : q + m % 2 * 8), c = 16 * slab + (VALUE ? q + m % 2 * 8 : 2 * t + m / 2 * 8);
    auto at = [&](int n, int c) { return room + n * ROW_BYTES + ((c * int(sizeof(T)) / 16 ^ n % 8) * 16 | c * int(sizeof(T)) % 16); };
    if constexpr (VALUE) {
      *(T*)at(n, c) = from_float<T>(x[2 * m]);
      *(T*)at(n + 1, c) = from_float<T>(x[2 * m + 1]);
    } else if constexpr (sizeof(T) == 2) {
      *(uint32_t*)at(n, c) = bits_of<T>(x[2 * m], x[2 * m + 1]);
    } else {
      *(float2*)at(n, c) = make_float2(x[2 * m], x[2 * m + 1]);
    }
  }
}

template <class T, bool VALUE> DEVICE void read_page(const ReadArguments& a, const ReadSide& s, uint8_t* room, const char* levels, int number) {
  constexpr int SLABS = ROW_BYTES / (SLAB_CHANNELS * int(sizeof(T)));
  const int lane = threadIdx.x & 31, rest = number / unsigned(s.tiles), first = (number - rest * s.tiles) * SLABS;
  const int row = rest / unsigned(a.heads), h = rest - row * a.heads, b = row / unsigned(a.pages), page = a.first_page + row - b * a.pages;
  if (b >= a.batch) return;
  const int4 n = __ldg(a.counts + b);
  const int start = n.x + page * PAGE_TOKENS - a.from;  // of slot 0 in the output
  if (page >= n.y || start >= a.tokens || start + PAGE_TOKENS <= 0) return;
  const unsigned long long entry = __ldg(a.table + b * a.capacity + page);
  const int low = max(0, -start), high = min(int(entry >> 56), a.tokens - start), have = min(SLABS, s.slabs - first);
  const uint8_t* half = (const uint8_t*)(entry & ADDRESS) + (long long)h * a.page_bytes + s.half_offset;
  uint4 codes[SLABS];
#pragma unroll
  for (int i = 0; i < SLABS; i++)
    if (i < have) codes[i] = __ldg((const uint4*)(half + 512 * (first + i)) + lane);
  auto word = [&](int i, int p) { return p == 0 ? codes[i].x : p == 1 ? codes[i].y : p == 2 ? codes[i].z : codes[i].w; };
  float x[8];
  if (!VALUE && !s.per_token) {
    constexpr auto which = [](int j) { return j % 2 + j / 4 * 2; };
#pragma unroll
    for (int i = 0; i < SLABS; i++) {
      if (i >= have) break;
      float scale[4], zero[4];
#pragma unroll 1
      for (int p = 0; p < 4; p++) {
        if (16 * p % s.group == 0) {
          const int place = s.fields * (16 * (first + i + 16 * p / s.group * s.slabs) + 4 * (lane % 4));
#pragma unroll
          for (int k = 0; k < 4; k++) scale[k] = zero[k] = 0.f;
          four_fields(scale, s, half, place);
          if (s.fields == 2) four_fields(zero, s, half, place + 4);
        }
        decode(x, word(i, p), levels, scale, zero, which);
        put<T, false>(room, x, p, i);
      }
    }
  } else {
    constexpr int COUNT = VALUE ? 4 : 2;
    constexpr auto which = [](int j) { return VALUE ? j % 2 + j / 4 * 2 : j / 2 % 2; };
    const int before = s.spans_heads ? h * s.slabs : 0;
#pragma unroll 1
    for (int p = 0; p < 4; p++) {
      float scale[COUNT], zero[COUNT];
      int block = -1;
#pragma unroll
      for (int i = 0; i < SLABS; i++) {
        if (i >= have) break;
        const int mine = (before + first + i) / unsigned(s.block) - before / unsigned(s.block);
        if (mine != block) {
          block = mine;
#pragma unroll
          for (int k = 0; k < COUNT; k++) {
            const int slot = 16 * p + (VALUE ? lane % 4 * 2 + k % 2 + k / 2 * 8 : lane / 4 + 8 * k);
            const int place = s.fields * s.blocks * (8 * (slot % 8) + 2 * (slot / 16) + slot / 8 % 2) + block;
            scale[k] = field(s, half, place);
            zero[k] = s.fields == 2 ? field(s, half, place + s.blocks) : 0.f;
          }
        }
        decode(x, word(i, p), levels, scale, zero, which);
        put<T, VALUE>(room, x, p, i);
      }
    }
  }
  __syncwarp();
  const int piece = lane % 8, token = s.slabs * SLAB_CHANNELS * int(sizeof(T));
  uint8_t* out = s.out + (((long long)b * a.heads + h) * a.tokens + start) * token + first * SLAB_CHANNELS * int(sizeof(T)) + piece * 16;
  if (piece >= have * int(sizeof(T))) return;
#pragma unroll
  for (int q = 0; q < PAGE_TOKENS / 4; q++) {
    const int slot = lane / 8 + 4 * q;
    if (slot >= low && slot < high) __stcs((uint4*)(out + (long long)slot * token), *(const uint4*)(room + slot * ROW_BYTES + (piece ^ slot % 8) * 16));
  }
}

DEVICE double exact_number(const uint8_t* data, long long at, int dtype) {
  switch (dtype) {
    case F64: return ((const double*)data)[at];
    case F32: return ((const float*)data)[at];
    case F16: return __half2float(((const __half*)data)[at]);
    default: return __bfloat162float(((const __nv_bfloat16*)data)[at]);
  }
}

DEVICE void store_number(float* to, double x) { *to = __double2float_rn(x); }
DEVICE void store_number(__half* to, double x) { *to = __double2half(x); }
DEVICE void store_number(__nv_bfloat16* to, double x) { *to = __double2bfloat16(x); }

// What of 64 tokens of a head is in no page.
template <class T> DEVICE void read_exact(const ReadArguments& a, const ReadSide& s, int number) {
  const int rest = number / unsigned(a.chunks), chunk = number - rest * a.chunks, b = rest / unsigned(a.heads), h = rest - b * a.heads;
  const int first = (chunk < a.front ? chunk : chunk + a.gap) * PAGE_TOKENS;
  const int4 n = __ldg(a.counts + b);
  const int end = n.x + packed_of(a, b, n), last = min(first + PAGE_TOKENS, a.tokens), dim = s.slabs * SLAB_CHANNELS;
  if (a.from + first >= n.x && a.from + last <= end) return;
#pragma unroll 1
  for (int e = threadIdx.x; e < (last - first) * dim; e += blockDim.x) {
    const int i = first + e / dim, c = e % dim, t = a.from + i;
    if (t >= n.x && t < end) continue;
    double x = 0;
    if (t < n.x) x = exact_number(s.sinks, (((long long)b * a.sink_slots + t) * a.heads + h) * dim + c, a.exact);
    else if (t < end + n.z) x = exact_number(s.tail, (((long long)b * a.tail_slots + t - end) * a.heads + h) * dim + c, a.exact);
    store_number((T*)s.out + (((long long)b * a.heads + h) * a.tokens + i) * dim + c, x);
  }
}

template <class T> DEVICE void read(const ReadArguments& a) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float level[16 * 32];
  const int side = blockIdx.y, warp = threadIdx.x / 32;
  const ReadSide& s = a.side[side];
  if (int(blockIdx.x) >= a.page_blocks) {
    read_exact<T>(a, s, blockIdx.x - a.page_blocks);
    return;
  }
  for (int e = threadIdx.x; e < 16 * 32; e += blockDim.x) level[e] = s.level[min(e / 32, s.levels - 1)];
  __syncthreads();
  const char* levels = (const char*)(level + (threadIdx.x & 31));
  uint8_t* room = shared + warp * PAGE_TOKENS * ROW_BYTES;
  if (side) read_page<T, true>(a, s, room, levels, blockIdx.x * WARPS + warp);
  else read_page<T, false>(a, s, room, levels, blockIdx.x * WARPS + warp);
}

}  // namespace nqkv
using namespace nqkv;

extern "C" __global__ void __launch_bounds__(256, 3) read_f32(const __grid_constant__ ReadArguments a) { read<float>(a); }
extern "C" __global__ void __launch_bounds__(256, 3) read_f16(const __grid_constant__ ReadArguments a) { read<__half>(a); }
extern "C" __global__ void __launch_bounds__(256, 3) read_bf16(const __grid_constant__ ReadArguments a) { read<__nv_bfloat16>(a); }
