// The page of src/page.rs and the codec of src/seal.rs: where every code and field lies, and how a block is read. The structs
// are built by src/cuda/codec.rs, which checks sizes and offsets.
#pragma once
#include "codec.cuh"

constexpr int PAGE_TOKENS = 64, SLAB_CHANNELS = 16, MAX_DIM = 256;

struct Book {
  int levels;
  float level[256], threshold[256];
};

struct Side {
  int is_value, dim, stored, bytes, code_bytes;
  int per_token;  // fields for each token, or for each stored channel
  int group;      // tokens of a per-channel block
  int blocks;     // per-token blocks of a token in this head
  int block;      // channels of a per-token block
  int spans_heads, ordered;
  int fields, field_size, kind, scale_dtype;
  int width[16], offset[16];
  Book book[9];  // by width
};

struct Codec {
  int heads, page_bytes, value_offset, exact;
  int sink_slots, tail_slots, window, single_slots;
  Side side[2];  // keys, values
};
// The channel at each stored place of each head, [heads][stored], follows the struct where keys are ordered.

DEVICE int channel_at(const Codec& codec, const Side& s, int h, int c) {
  return s.ordered ? ((const uint16_t*)(&codec + 1))[h * s.stored + c] : c;
}

DEVICE int block_of(const Side& s, int h, int c) {
  return s.spans_heads ? (h * s.dim + min(c, s.dim - 1)) / s.block - h * s.dim / s.block : c / s.block;
}

DEVICE int channel_field(const Side& s, int group, int c, int f) {
  const int place = s.fields * (16 * (c / 16) + 4 * (c % 8 / 2)) + 4 * f + 2 * (c / 8 % 2) + c % 2;
  return s.code_bytes + s.field_size * (s.fields * s.stored * group + place);
}

DEVICE int token_field(const Side& s, int n, int b, int f) {
  const int place = s.fields * s.blocks * (8 * (n % 8) + 2 * (n / 16) + n / 8 % 2) + s.blocks * f + b;
  return s.code_bytes + s.field_size * place;
}

// Token and channel (of a slab's 16) of a slot: the inverse of key_slot and value_slot.
DEVICE void at_slot(bool is_value, int slot, int& n, int& c) {
  const int lane = slot / 32, place = slot % 32, half = place / 2;
  const int low = lane / 4, pair = lane % 4 * 2 + place % 2;
  const int a = half / 4, b = half / 2 % 2, e = half % 2;  // n/16, then c/8 and n/8, or the other way round
  if (is_value) {
    c = low + 8 * e, n = 16 * a + 8 * b + pair;
  } else {
    n = 16 * a + 8 * e + low, c = 8 * b + pair;
  }
}

// Bits of the first plane of a width, and of the second: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2.
DEVICE int first_plane(int width) { return width == 3 ? 2 : width == 5 || width == 6 ? 4 : width; }

DEVICE int slot_of(bool is_value, int n, int c) {
  return is_value ? 32 * (4 * (c % 8) + n % 8 / 2) + 2 * (4 * (n / 16) + 2 * (n / 8 % 2) + c / 8 % 2) + n % 2
                  : 32 * (4 * (n % 8) + c % 8 / 2) + 2 * (4 * (n / 16) + 2 * (c / 8 % 2) + n / 8 % 2) + c % 2;
}

DEVICE uint32_t code_at(const Side& s, const uint8_t* half, int n, int c) {
  const int width = s.width[c / SLAB_CHANNELS], slot = slot_of(s.is_value, n, c % SLAB_CHANNELS);
  const uint8_t* base = half + s.offset[c / SLAB_CHANNELS];
  uint32_t code = 0;
  for (int left = width, shift = 0; left > 0;) {
    const int p = shift == 0 ? first_plane(width) : left, bit = p * slot;
    code |= (base[bit / 8] >> (bit % 8) & ((1u << p) - 1)) << shift;
    base += p * 128, shift += p, left -= p;
  }
  return code;
}

DEVICE Fields fields_of_code(const Side& s, const uint8_t* half, int h, int n, int c) {
  const int at = s.per_token ? token_field(s, n, block_of(s, h, c), 0) : channel_field(s, n / s.group, c, 0);
  const int zero = s.per_token ? token_field(s, n, block_of(s, h, c), 1) : channel_field(s, n / s.group, c, 1);
  return {read_field(half + at, s.scale_dtype), s.fields == 2 ? read_field(half + zero, s.scale_dtype) : 0.f};
}

// The number that stands at token n, stored channel c.
DEVICE float number_at(const Side& s, const uint8_t* half, int h, int n, int c) {
  const Fields f = fields_of_code(s, half, h, n, c);
  const int width = s.width[c / SLAB_CHANNELS];
  const Book& book = s.book[width];
  const float level = width == 0 ? 0.f : book.level[min(code_at(s, half, n, c), uint32_t(book.levels - 1))];
  return __fmaf_rn(level, f.scale, f.zero);
}
