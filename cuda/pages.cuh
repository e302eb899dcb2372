// A cache on the device as cuda/pages.cu sees it: its counts, the stream of its tokens, and how a page is written for any scheme.
#pragma once
#include "page.cuh"
#include "transform.cuh"

struct Counts {
  int sinks, pages, tail, open;  // open: the last page may be written to (single slots)
};

struct Tensor {
  const uint8_t* data;
  long long stride[4];  // batch, heads, tokens, dim, in elements
  long long dtype;
};

struct CacheArguments {
  const Codec* codec;
  Counts* counts;
  unsigned long long* table;
  uint8_t* sinks[2];
  uint8_t* tail[2];
  int* arrived;
  Tensor x[2];
  long long capacity;  // entries of a sequence's table
  int with_pages;
  int vectors;         // tokens are 16-bit numbers that are kept as they are, to be copied 16 bytes at a time
  int tokens, padding;
};

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;

// One rounding, from the number as it came.
DEVICE void store(uint8_t* data, long long at, int dtype, double x) {
  switch (dtype) {
    case F64: ((double*)data)[at] = x; break;
    case F32: ((float*)data)[at] = __double2float_rn(x); break;
    case F16: ((__half*)data)[at] = __double2half(x); break;
    default: ((__nv_bfloat16*)data)[at] = __double2bfloat16(x);
  }
}

// An input element, rounded to the exact dtype, as fp32.
DEVICE float exact_input(const CacheArguments& a, int side, int b, int h, int t, int c) {
  const Tensor& x = a.x[side];
  const double v = load_number(x.data, b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + c * x.stride[3], int(x.dtype));
  switch (a.codec->exact) {
    case F16: return __half2float(__double2half(v));
    case BF: return __bfloat162float(__double2bfloat16(v));
    default: return __double2float_rn(v);
  }
}

// Place of an exact token's element in sinks or tail: [batch][slot][heads][dim].
DEVICE long long exact_at(const Codec& codec, const Side& s, int slots, int b, int slot, int h, int c) {
  return (((long long)b * slots + slot) * codec.heads + h) * s.dim + c;
}

// Tokens of the stream of sequence b: what the tail holds, then the input past what goes to the sinks.
struct Stream {
  int tail, skip;
  DEVICE Stream(const CacheArguments& a, const Counts& n)
      : tail(n.tail), skip(min(a.tokens, a.codec->sink_slots - n.sinks)) {}
  DEVICE int length(const CacheArguments& a) const { return tail + a.tokens - skip; }
  DEVICE float number(const CacheArguments& a, int side, int b, int h, int i, int c) const {
    const Codec& codec = *a.codec;
    if (i >= tail) return exact_input(a, side, b, h, i - tail + skip, c);
    return float(load_number(a.tail[side], exact_at(codec, codec.side[side], codec.tail_slots, b, i, h, c), codec.exact));
  }
};

DEVICE void put_fields(const Side& s, uint8_t* half, int scale_at, int zero_at, Fields f) {
  if ((threadIdx.x & 31) == 0) {
    write_field(half + scale_at, f.scale, s.scale_dtype);
    if (s.fields == 2) write_field(half + zero_at, f.zero, s.scale_dtype);
  }
}

// Writes tokens first..first + count of head h into its half of a page; `number(i, h, c)` is element c of the i-th of them.
// Any scheme: a warp for each block, then a thread for each byte of codes.
template <class F> DEVICE void write_half(const Codec& codec, const Side& s, uint8_t* half, int h, int first, int count, F number) {
  __shared__ float room[8][2][MAX_BLOCK];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (!s.per_token) {
    const int groups = PAGE_TOKENS / s.group;
#pragma unroll 1
    for (int e = warp; e < s.stored * groups; e += warps) {
      const int c = e / groups, g = e % groups, channel = channel_at(codec, s, h, c);
      const Fields f = fields_by_warp(room[warp][0], room[warp][1], s.group, s.kind, s.scale_dtype, [&](int i) {
        return channel < s.dim ? number(g * s.group + i, h, channel) : 0.f;
      });
      put_fields(s, half, channel_field(s, g, c, 0), channel_field(s, g, c, 1), f);
    }
  } else {
#pragma unroll 1
    for (int e = warp; e < count * s.blocks; e += warps) {
      const int i = e / s.blocks, b = e % s.blocks;
      Fields f;
      if (s.spans_heads) {
        const int all = codec.heads * s.dim, start = min((h * s.dim / s.block + b) * s.block, all);
        f = fields_by_warp(room[warp][0], room[warp][1], min(start + s.block, all) - start, s.kind, s.scale_dtype, [&](int j) {
          return number(i, (start + j) / s.dim, (start + j) % s.dim);
        });
      } else {
        // Padding has no part in a block; in an ordered half it may stand anywhere.
        const int start = b * s.block, end = min(start + s.block, s.stored);
        int members = 0;
        for (int c = start; c < end; c++) members += channel_at(codec, s, h, c) < s.dim;
        f = fields_by_warp(room[warp][0], room[warp][1], members, s.kind, s.scale_dtype, [&](int j) {
          int c = start;
          if (s.ordered) {
            for (;; c++)
              if (channel_at(codec, s, h, c) < s.dim && j-- == 0) break;
          } else {
            c += j;
          }
          return number(i, h, channel_at(codec, s, h, c));
        });
      }
      put_fields(s, half, token_field(s, first + i, b, 0), token_field(s, first + i, b, 1), f);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < s.code_bytes; at += blockDim.x) {
    int slab = 0;
    while (slab + 1 < s.stored / SLAB_CHANNELS && at >= s.offset[slab + 1]) slab++;
    const int width = s.width[slab];
    int inside = at - s.offset[slab], p = first_plane(width), shift = 0;
    if (inside >= p * 128) inside -= p * 128, shift = p, p = width - p;
    const Book& book = s.book[width];
    uint32_t byte = half[at];
    bool any = false;
#pragma unroll 1
    for (int k = 0; k < 8 / p; k++) {
      int n, c;
      at_slot(s.is_value, inside * 8 / p + k, n, c);
      if (n < first || n >= first + count) continue;
      c += slab * SLAB_CHANNELS;
      const Fields f = fields_of_code(s, half, h, n, c);
      const int channel = channel_at(codec, s, h, c);
      const float rest = s.per_token ? f.zero : 0.f;
      const float x = channel < s.dim ? number(n - first, h, channel) : rest;
      const uint32_t mask = (1u << p) - 1, code = count_below((x - f.zero) * inverse(f.scale), book.threshold, book.levels);
      byte = (byte & ~(mask << (k * p))) | (code >> shift & mask) << (k * p);
      any = true;
    }
    if (any) half[at] = uint8_t(byte);
  }
}

}  // namespace nqkv
