// What a step of decoding is told, and what its kernels share.
//
// A step is as long as its chain of trips to memory: every thread reads the counts and, at the same time, the tokens. One block
// for a sequence, if possible: several have to tell each other that they have read the counts, before one writes the new ones.
#pragma once
#include "strip.cuh"

struct AppendSide {
  const uint8_t* x;        // [batch, heads, tokens, dim], unit stride along dim
  uint8_t* sinks;          // [batch, slots, heads, dim]
  uint8_t* tail;           // likewise
  const float* threshold;  // of the codebook
  long long stride[3];     // of batch, heads and tokens, in bytes
  int slabs;               // of a head
  int domain;              // slabs that one block does not reach beyond: of a head, or of all
  int block;               // slabs of a per-token block; 0 for fields per channel
  int blocks;              // fields of a token in a head
  int groups;              // per-channel blocks of a page
  int lanes;               // of a per-token block, a power of two
  int code_bytes, half_offset, fields, field_size, kind, scale_dtype;
  // Of single slots: warps' pieces of work, per-token blocks of a domain, and what divides by the latter, by slabs and by block.
  int works, per;
  uint32_t by_per, by_slabs, by_block, unused;
};

struct AppendArguments {
  int4* counts;  // sinks, pages, tail, open
  unsigned long long* table;
  int* arrived;
  long long capacity;
  int tokens, heads, page_bytes, sink_slots, tail_slots, window;
  int one_book;           // keys and values have the same codebook
  int share;              // units of a group, cuda/append_tail.cuh
  AppendSide side[2];
};
static_assert(sizeof(AppendSide) == 128 && sizeof(AppendArguments) == 64 + 2 * 128, "as in src/cuda/append.rs");

namespace nqkv {

constexpr unsigned long long ADDRESS = (1ull << 56) - 1;

// The number of thresholds below u, of 15 in shared memory that ascend; those that are missing are infinite.
struct Thresholds {
  const float* all;
  float low, middle, high;
  DEVICE explicit Thresholds(const float* t) : all(t), low(t[3]), middle(t[7]), high(t[11]) {}
  DEVICE uint32_t below(float u) const {
    uint32_t at = u > middle ? 8 : 0;
    at += u > (at ? high : low) ? 4 : 0;
    at += u > all[at + 1] ? 2 : 0;
    return at + (u > all[at] ? 1 : 0);
  }
};

// This block has read what the last of its sequence's blocks may now write: true for the one thread that does.
DEVICE bool settles(int* arrived) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  if (gridDim.x == 1) return true;
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
  if (before != int(gridDim.x) - 1) return false;
  *arrived = 0;
  return true;
}

// A token's 16 bytes in sinks or tail.
DEVICE uint8_t* exact_at(uint8_t* data, const AppendArguments& a, int slots, int b, int slot, int h, int chunks, int column) {
  return data + 16 * ((((long long)b * slots + slot) * a.heads + h) * chunks + column);
}

}  // namespace nqkv
