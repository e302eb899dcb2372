// Tiles of pages, four slabs of 64 tokens, to dense tokens: what cuda/read.cu is built from.
//
// Codes come to shared memory as they are. From there ldmatrix, transposing, hands each lane the codes of eight channels of one
// token, so that what a lane decodes it stores, 16 bytes at once (fp32: 32): nothing decoded goes through shared memory. Fields come
// there as fp32. Levels stand in the lanes' registers.
#pragma once
#include "strip.cuh"

struct ReadSide {
  uint8_t* out;  // [batch, heads, tokens, dim]
  const uint8_t *sinks, *tail;
  const float* level;
  int slabs, tiles;      // of a head; a tile is four slabs
  int per_token, block;  // slabs of a per-token block
  int group;             // tokens of a per-channel block
  int spans_heads, blocks, code_bytes, half_offset, fields, field_size, scale_dtype, levels, padding;
};

namespace nqkv {

constexpr int TILE = 4, SLAB_BYTES = 512, SLAB_STRIDE = SLAB_BYTES + 32;

// What a warp holds of a tile. A slab's stride keeps the rows of one matrix in banks of their own.
struct Room {
  uint8_t codes[TILE * SLAB_STRIDE];
  float2 fields[4 * PAGE_TOKENS];  // scale and zero: of four groups' 64 channels, or of four blocks' 64 tokens
};

struct Tile {
  const uint8_t* half;
  uint8_t* out;           // of slot 0, channel 0 of the tile
  int head, first, have;  // slabs: the first, and how many
  int low, high;          // slots that are written
};

// One field. e4m3, which takes a hundred times the code, goes the other way.
DEVICE float field(const ReadSide& s, const uint8_t* half, int place) {
  const uint8_t* from = half + s.code_bytes + s.field_size * place;
  if (s.scale_dtype == FP32) return __ldg((const float*)from);
  const uint32_t word = __ldg((const uint16_t*)from);
  return s.scale_dtype == FP16 ? number_in<__half>(word, 0) : number_in<__nv_bfloat16>(word, 0);
}

// Block of slab i of the tile, counted from that of slab 0.
DEVICE int block_in(const ReadSide& s, const Tile& t, int i) {
  const unsigned start = (s.spans_heads ? t.head * s.slabs : 0) + t.first;
  return (start + i) / unsigned(s.block) - start / unsigned(s.block);
}

// Fields of a tile to shared memory.
DEVICE void copy_fields(const ReadSide& s, const Tile& t, bool per_token, float2* to) {
  const int lane = lane_of(), apart = per_token ? s.blocks : 4;
  const unsigned before = s.spans_heads ? t.head * s.slabs : 0;
  const int runs = per_token ? block_in(s, t, t.have - 1) + 1 : PAGE_TOKENS / s.group;
  const int step = per_token ? s.fields * s.blocks : s.fields;  // of four channels, or of a token
  int base = per_token ? (before + t.first) / unsigned(s.block) - before / unsigned(s.block) : s.fields * SLAB_CHANNELS * t.first;
#pragma unroll 1
  for (int run = 0; run < runs; run++) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int e = lane + 32 * k;
      if (!per_token && e >= t.have * SLAB_CHANNELS) break;
      const int place = base + (per_token ? step * e : step * (e & ~3) + e % 4);
      to[run * PAGE_TOKENS + e] = make_float2(field(s, t.half, place), s.fields == 2 ? field(s, t.half, place + apart) : 0.f);
    }
    base += per_token ? 1 : s.fields * SLAB_CHANNELS * s.slabs;
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

// Eight channels of a token.
template <class T> DEVICE void store_eight(uint8_t* to, const float (&x)[8]) {
  if constexpr (sizeof(T) == 2) {
    __stcs((uint4*)to, make_uint4(bits_of<T>(x[0], x[1]), bits_of<T>(x[2], x[3]), bits_of<T>(x[4], x[5]), bits_of<T>(x[6], x[7])));
  } else {
    __stcs((float4*)to, make_float4(x[0], x[1], x[2], x[3]));
    __stcs((float4*)to + 1, make_float4(x[4], x[5], x[6], x[7]));
  }
}

// The level of a nibble: shfl takes the low five bits of a lane's number, and lanes 16 to 31 hold what lanes 0 to 15 do.
DEVICE float level_of(float level, uint32_t w, int shift) { return __shfl_sync(ALL, level, w >> shift); }

// Keys. A lane has slab lane % 4, channels 8 (lane / 4 % 2) to + 7 of it, and of strip lane / 8 every token.
template <class T, bool PER_TOKEN, bool WHOLE> DEVICE void read_keys(const ReadSide& s, const Tile& t, const Room& room, float level) {
  const int lane = lane_of(), strip = lane / 8, eight = lane / 4 % 2, slab = lane % 4, pitch = s.slabs * SLAB_CHANNELS * int(sizeof(T));
  // Rows of a matrix are the 16 bytes of two neighbouring channel pairs in each slab, of tokens q = 0 to 7 of all strips.
  uint32_t at = uint32_t(__cvta_generic_to_shared(room.codes)) + lane % 8 / 2 * SLAB_STRIDE + (lane / 8 % 2 * 2 + lane % 2) * 16 + lane / 16 * 64;
  const float2* fields = room.fields;
  float scale[8], zero[8];
  if constexpr (PER_TOKEN) {
    fields += block_in(s, t, slab) * PAGE_TOKENS + 2 * strip;
  } else {
    fields += 16 * strip / unsigned(s.group) * PAGE_TOKENS + 16 * slab + 2 * eight;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float4 f = *(const float4*)(fields + 4 * k);
      scale[2 * k] = f.x, zero[2 * k] = f.y, scale[2 * k + 1] = f.z, zero[2 * k + 1] = f.w;
    }
  }
  uint8_t* out = t.out + (2 * slab + eight) * 8 * int(sizeof(T)) + (long long)(16 * strip) * pitch;
  const bool mine = WHOLE || slab < t.have;
#pragma unroll(WHOLE && sizeof(T) == 2 ? 4 : 1)
  for (int i = 0; i < 4; i++) {
    uint32_t pairs[4];
    load_matrices<true>(pairs, at + 128 * i);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int q = 2 * i + u;
      float4 f;
      if constexpr (PER_TOKEN) f = *(const float4*)(fields + 8 * q);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint32_t w = __byte_perm(pairs[2 * u], pairs[2 * u + 1], r ? 0x7531 : 0x6420);
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
          x[j] = __fmaf_rn(level_of(level, w, 4 * j), PER_TOKEN ? r ? f.z : f.x : scale[j], PER_TOKEN ? r ? f.w : f.y : zero[j]);
        const int slot = 16 * strip + 8 * r + q;
        if (WHOLE || (mine && slot >= t.low && slot < t.high)) store_eight<T>(out + (8 * r + q) * pitch, x);
      }
    }
  }
}

// Values. A lane has slabs lane / 2 % 2 and that + 2, channels 8 (lane % 2) to + 7 of them, and every token with n / 8 = lane / 4.
template <class T, bool WHOLE> DEVICE void read_values(const ReadSide& s, const Tile& t, const Room& room, float level) {
  const int lane = lane_of(), eighth = lane / 4, second = lane / 2 % 2, eight = lane % 2, pitch = s.slabs * SLAB_CHANNELS * int(sizeof(T));
  // Rows of a matrix are the 16 bytes of two neighbouring channels in two slabs, of tokens 2 t and 2 t + 1 of all eighths; each row
  // counts twice, for lanes that take channels 0 to 7 and for those that take 8 to 15.
  uint32_t at = uint32_t(__cvta_generic_to_shared(room.codes)) + lane % 8 / 4 * SLAB_STRIDE + (lane / 8 * 2 + lane % 2) * 64;
  const uint32_t bytes = eight ? 0x7531 : 0x6420;
  uint8_t* out = t.out + (2 * second + eight) * 8 * int(sizeof(T)) + (long long)(8 * eighth) * pitch;
  const float2* fields[2];
#pragma unroll
  for (int half = 0; half < 2; half++) fields[half] = room.fields + block_in(s, t, 2 * half + second) * PAGE_TOKENS + eighth;
#pragma unroll(WHOLE && sizeof(T) == 2 ? 4 : 1)
  for (int i = 0; i < 4; i++) {
    uint32_t low[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t w[4];
      load_matrices<true>(w, at + half * 2 * SLAB_STRIDE + 16 * i);
      low[half] = __byte_perm(w[0], w[1], bytes), high[half] = __byte_perm(w[2], w[3], bytes);
    }
#pragma unroll
    for (int o = 0; o < 2; o++) {
      const int slot = 8 * eighth + 2 * i + o;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 f = fields[half][8 * (2 * i + o)];
        float x[8];
#pragma unroll
        for (int j = 0; j < 8; j++) x[j] = __fmaf_rn(level_of(level, j < 4 ? low[half] : high[half], j % 4 * 8 + o * 4), f.x, f.y);
        if (WHOLE || (2 * half + second < t.have && slot >= t.low && slot < t.high))
          store_eight<T>(out + (2 * i + o) * pitch + half * 2 * SLAB_CHANNELS * int(sizeof(T)), x);
      }
    }
  }
}

}  // namespace nqkv
