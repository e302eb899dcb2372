// Decode attention on pages: what the kernels of attend_*.cu share. The numbers of a tile are in attend_tile.cuh,
// who does what in attend_loop.cuh, the kernel in attend_kernel.cuh.
#pragma once
#include "page.cuh"
#ifdef NQKV_EMULATED
#include "emulated.cuh"
#else
#include "attend_ptx.cuh"
#endif

struct AttendArguments {
  const int4* counts;               // sinks, pages, tail, open, of each sequence
  const unsigned long long* table;  // row address, valid count in the top byte
  const uint8_t* sinks[2];          // [batch][slot][heads][dim], exact
  const uint8_t* tail[2];
  const uint8_t* q;    // [batch][q_heads][queries][dim] by strides
  uint8_t* out;        // [batch][queries][q_heads][dim]
  float* lse;          // [batch][queries][q_heads], or null
  const int* starts;   // first attended position of each sequence, or null
  float* partial;      // workspace: two slots for each block, then those of warps
  int* arrived;        // workspace: blocks that have written their part of a unit; zero between launches
  long long capacity;  // entries of a sequence's table
  long long q_stride[3];  // batch, heads, queries, in bytes
  int batch, heads, group, queries, passes;
  int page_bytes, value_offset, sink_slots, tail_slots;
  int exact, q_dtype, out_dtype;
  int window;     // 0: none
  int masked;     // positions matter: a window, starts, or several queries
  int irregular;  // and pages before the last may be partial
  int single;     // the last page may be partial
  int parts_shared;  // where, after the first stage, shared memory has room for warps' parts; 0: they go to `partial`
  float scale, soft_cap;
  uint16_t level[2][16];  // keys, values: fp16
  const uint8_t* codec;   // the codec of page.cuh, for attend_widths.cuh
  int key_codes;          // bytes of a page's keys without fields
  int ordered;            // channels of keys have an order of each head
  uint8_t key_slabs[8];   // of 8, 6, 5, 4, 3, 2, 1 and 0 bits. For attend_split.cuh: slabs of a block of keys, of values, from head to head (or 0)
};
static_assert(sizeof(AttendArguments) == 296, "as in src/cuda/attend.rs");

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;
constexpr int COLUMNS = 8, TILE_TOKENS = 16, EXACT = 128, TAIL = 256;
constexpr int TABLE_AT = 1024;  // where the table begins in shared memory, an address that is a constant
constexpr float LOG2E = 1.4426950408889634f, NOTHING = -1e30f;

// What a kernel is compiled for: D channels of a head; keys with fields per channel (scale, mean) or one scale per token; values
// with a scale for each token and BLOCK slabs. Pages come by the bulk copies of Hopper, a page ahead, or slab by slab into
// registers.
//
// TYPE: the element type of queries, exact tokens and output of a plain call, which has one query a sequence and no mask, cap or
// log-sum-exp; 0: any call. What a kernel need not look up it does not hold: each instruction that runs for the first time comes
// late, through a memory that others keep busy.
template <int D_, bool PER_TOKEN_, int BLOCK_, bool BULK_, int TYPE_ = 0> struct Shape {
  static constexpr int D = D_, SLABS = D / SLAB_CHANNELS, BLOCK = BLOCK_, BLOCKS = (SLABS + BLOCK - 1) / BLOCK;
  static constexpr bool PER_TOKEN = PER_TOKEN_, BULK = BULK_, PLAIN = TYPE_ != 0;
  DEVICE static int q_dtype(const AttendArguments& a) { return PLAIN ? TYPE_ : a.q_dtype; }
  DEVICE static int exact(const AttendArguments& a) { return PLAIN ? TYPE_ : a.exact; }
  DEVICE static int out_dtype(const AttendArguments& a) { return PLAIN ? TYPE_ : a.out_dtype; }
  DEVICE static bool masked(const AttendArguments& a) { return !PLAIN && a.masked; }
  DEVICE static bool capped(const AttendArguments& a) { return !PLAIN && a.soft_cap > 0.f; }
  DEVICE static bool says_lse(const AttendArguments& a) { return !PLAIN && a.lse; }
  DEVICE static int queries(const AttendArguments& a) { return PLAIN ? 1 : a.queries; }
  static constexpr int CODES = 512 * SLABS;
  static constexpr int KEY_FIELDS = PER_TOKEN ? 2 * PAGE_TOKENS : 4 * D, VALUE_FIELDS = 2 * PAGE_TOKENS * BLOCKS;
  static constexpr int KEY_BYTES = (CODES + KEY_FIELDS + 127) / 128 * 128, VALUE_BYTES = (CODES + VALUE_FIELDS + 127) / 128 * 128;
  // A warp's room: a page, or its fields; queries, if there are not registers enough; barriers of keys and values.
  static constexpr bool QUERIES_SHARED = D > 128;
  static constexpr int KEY_ROOM = BULK ? KEY_BYTES : KEY_FIELDS, QUERIES_AT = KEY_ROOM + (BULK ? VALUE_BYTES : VALUE_FIELDS);
  static constexpr int BARRIERS_AT = QUERIES_AT + (QUERIES_SHARED ? 256 * SLABS : 0), STAGE = BARRIERS_AT + 16;
  static constexpr int KEY_FIELDS_AT = BULK ? CODES : 0, VALUE_FIELDS_AT = KEY_FIELDS_AT;  // in each half of it
  static constexpr bool WIDE = false, ORDERED = false, FEW = false;  // other widths, channels in an order of each head: attend_widths.cuh
  static constexpr bool GROUPED = false;              // groups of tokens and zero points: attend_grouped.cuh
  static constexpr bool SPLIT = false;                // two scales of a token: attend_split.cuh
  static constexpr int KEY_CODES = CODES, VALUE_CODES = CODES, TABLES = 65536;
  static constexpr int RAW = 4;                       // words of a lane for a slab
  static constexpr int PART_ROW = D + 4;              // numbers of a column of a warp's part: its stores meet different banks
  static constexpr int PARTS = BULK ? 1 : 2;          // of a warp that have room of their own; with a page's room, the last one goes there
  static constexpr int MOST_WARPS = (BULK ? D > 128 || D == 96 : D >= 96 && !PER_TOKEN) ? 8 : 12;  // as in src/cuda/attend.rs: as many as registers allow
};

DEVICE float power_of_two(int e) { return __uint_as_float(uint32_t(e + 127) << 23); }  // -126 to 127
DEVICE uint32_t bits(__half2 x) { return *(uint32_t*)&x; }
DEVICE __half2 halves(uint32_t x) { return *(__half2*)&x; }
DEVICE uint32_t product(uint32_t a, uint32_t b) { return bits(__hmul2(halves(a), halves(b))); }
DEVICE uint32_t pair_of(float low, float high) { return bits(__floats2half2_rn(low, high)); }

// Two 16-bit numbers of a word.
DEVICE float2 numbers(uint32_t word, int dtype) {
  if (dtype == F16) return __half22float2(halves(word));
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}

// BYTES of fields into shared memory, by a warp.
template <int BYTES> DEVICE void copy_fields(uint32_t to, const uint8_t* from) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < BYTES; i += 512)
    if (i + 512 <= BYTES || lane * 16 < BYTES - i) copy_piece(to + i + lane * 16, from + i + lane * 16);
}
DEVICE void await_fields() {
  await_copies();
  __syncwarp();
}

// f(0), f(1), ... f(N - 1), each with a constant.
template <int N> struct Index {
  static constexpr int value = N;
};
template <int N, class F> DEVICE void unrolled(F&& f) {
  if constexpr (N > 0) unrolled<N - 1>(f), f(Index<N - 1>());
}

}  // namespace nqkv
