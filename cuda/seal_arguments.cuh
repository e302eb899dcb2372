// Arguments of the ways into pages: the structs of src/cuda/seal.rs.
#pragma once
#include "page.cuh"

struct SealSide {
  const uint8_t* x;        // [batch, heads, tokens, dim], unit stride along dim
  const uint8_t* tail;     // [batch, slots, heads, dim]
  const float* threshold;  // of the codebook
  long long stride[3];     // of batch, heads and tokens, in bytes
  int slabs;               // of a head
  int domain;              // slabs that one tile, and with it one block, does not reach beyond
  int domain_tiles, tiles; // tiles of a domain, and of all heads
  int tile;                // slabs of a tile
  int units;               // pages, or (per channel) groups of four pages, of a sequence
  int warps;               // of a team
  int per_token, block;    // slabs of a per-token block
  int groups;              // per-channel blocks of a page
  int blocks, code_bytes, half_offset, fields, field_size, kind, scale_dtype, levels;
  float cell_scale, cell_offset;
  int parts, wide;         // for cuda/prompt.cu: parts of the list of pages; warps take eight slabs, not four
  uint32_t by_slabs, by_domain_tiles;  // for `quotient`
};

struct SealArguments {
  const Codec* codec;
  const int4* counts;  // sinks, pages, tail, open
  const unsigned long long* table;
  long long capacity;
  int batch, tokens, heads, page_bytes, sink_slots, tail_slots, window, single_slots;
  SealSide side[2];
};
static_assert(sizeof(SealSide) == 144 && sizeof(SealArguments) == 64 + 2 * 144, "as in src/cuda/seal.rs");

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;  // of a table's entry

// One half of the pages, keys (per channel or per token) or values.
enum Half { KEYS_PER_CHANNEL, KEYS, VALUES };

}  // namespace nqkv
