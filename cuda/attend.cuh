// Decode attention on pages: what the kernels of attend_*.cu share. The loop is in attend_loop.cuh, the numbers of a tile in
// attend_tile.cuh.
#pragma once
#include "page.cuh"

struct AttendArguments {
  const int4* counts;               // sinks, pages, tail, open, of each sequence
  const unsigned long long* table;  // row address, valid count in the top byte
  const uint8_t* sinks[2];          // [batch][slot][heads][dim], exact
  const uint8_t* tail[2];
  const uint8_t* q;    // [batch][q_heads][queries][dim] by strides
  uint8_t* out;        // [batch][queries][q_heads][dim]
  float* lse;          // [batch][queries][q_heads], or null
  const int* starts;   // first attended position of each sequence, or null
  float* partial;      // workspace: two slots for each block, then two for each warp
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
};
static_assert(sizeof(AttendArguments) == 272, "as in src/cuda/attend.rs");

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;
constexpr int COLUMNS = 8, TILE_TOKENS = 16, EXACT = 128, TAIL = 256;
constexpr int TABLE_BYTES = 65536, TABLE_AT = 1024;  // where the table begins in shared memory, an address that is a constant
constexpr float LOG2E = 1.4426950408889634f, NOTHING = -1e30f;

// What a kernel is compiled for: D channels of a head; keys with fields per channel (scale, mean) or one scale per token; values
// with a scale for each token and BLOCK slabs.
template <int D_, bool PER_TOKEN_, int BLOCK_> struct Shape {
  static constexpr int D = D_, SLABS = D / SLAB_CHANNELS, BLOCK = BLOCK_, BLOCKS = (SLABS + BLOCK - 1) / BLOCK;
  static constexpr bool PER_TOKEN = PER_TOKEN_;
  static constexpr int CODES = 512 * SLABS;
  static constexpr int KEY_FIELDS = PER_TOKEN ? 2 * PAGE_TOKENS : 4 * D, VALUE_FIELDS = 2 * PAGE_TOKENS * BLOCKS;
  static constexpr int STAGE = KEY_FIELDS + VALUE_FIELDS;  // a warp's room for a page's fields
  static constexpr int MOST_WARPS = D > 128 || D == 96 ? 8 : 12;  // as in src/cuda/attend.rs: as many as registers allow
};

// ---- PTX

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
DEVICE uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// A number that the compiler does not know: what is rarely computed from it stays where it is, and takes no register elsewhere.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
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

// Memory that is read once, OFFSET bytes from an address that a lane keeps.
template <int OFFSET> DEVICE void load_once(uint32_t (&r)[4], const uint8_t* from) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4 + %5];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(from), "n"(OFFSET));
}
// BYTES of fields into shared memory, by a warp.
template <int BYTES> DEVICE void copy_fields(uint32_t to, const uint8_t* from) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < BYTES; i += 512)
    if (i + 512 <= BYTES || lane * 16 < BYTES - i)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i + lane * 16), "l"(from + i + lane * 16) : "memory");
}
DEVICE void await_fields() {
  asm volatile("cp.async.wait_all;" ::: "memory");
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
