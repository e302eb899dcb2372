// cuda/attend_ptx.cuh on a CPU. Asynchronous copies arrive at once, or only when they are waited for.
#pragma once
#include "codec.cuh"

namespace nqkv {

alignas(1024) inline uint8_t dynamic[240 << 10];
inline uint32_t first_address = 1024;  // of dynamic shared memory
inline bool copies_come_late = true;

DEVICE uint32_t shared_address(const void* p) { return uint32_t((const uint8_t*)p - dynamic) + first_address; }
DEVICE uint8_t* shared_memory() { return dynamic; }
DEVICE uint8_t* shared_at(uint32_t address, uint32_t bytes) {
  if (address < first_address || address + bytes > first_address + sizeof dynamic) wrong("an address outside of shared memory");
  if (address % bytes) wrong("an address in shared memory that is not aligned");
  return dynamic + (address - first_address);
}
DEVICE float half_of(uint32_t word, int high) { return __half2float(__ushort_as_half(uint16_t(high ? word >> 16 : word))); }

DEVICE int arrive(int* counter) { return atomicAdd(counter, 1); }

struct Operands {
  uint32_t a[4], b[2];
};
DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const Messages& m = together(10, Operands{{a0, a1, a2, a3}, {b0, b1}});
  const int g = me->lane / 4, t = me->lane % 4;
  Operands rows[4], columns[2][4];
  for (int i = 0; i < 4; i++) {
    rows[i] = said_by<Operands>(m, g * 4 + i);
    columns[0][i] = said_by<Operands>(m, 2 * t * 4 + i), columns[1][i] = said_by<Operands>(m, (2 * t + 1) * 4 + i);
  }
  for (int i = 0; i < 4; i++) {
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const uint32_t a = rows[k % 8 / 2].a[i / 2 + k / 8 * 2], b = columns[i % 2][k % 8 / 2].b[k / 8];
      sum += double(half_of(a, k % 2)) * half_of(b, k % 2);
    }
    c[i] = float(sum);
  }
}
DEVICE uint32_t transposed(uint32_t x) {
  const Messages& m = together(11, x);
  const int g = me->lane / 4, t = me->lane % 4;
  auto element = [&](int row) { return said_by<uint32_t>(m, 4 * row + g / 2) >> 16 * (g % 2) & 0xffff; };
  return element(2 * t) | element(2 * t + 1) << 16;
}
template <int ROW> DEVICE uint32_t of_row(uint32_t x) { return said_by<uint32_t>(together(13, x), 4 * ROW + me->lane % 4); }
DEVICE uint4 load_shared(uint32_t address) { return *(const uint4*)shared_at(address, 16); }
DEVICE uint2 load_pair(uint32_t address) { return *(const uint2*)shared_at(address, 8); }
DEVICE uint32_t load_one(uint32_t address) { return *(const uint32_t*)shared_at(address, 4); }
DEVICE uint4 load_transposed(uint32_t address) {
  const Messages& m = together(12, address);
  const int g = me->lane / 4, t = me->lane % 4;
  uint32_t word[4];
  for (int i = 0; i < 4; i++) {
    auto element = [&](int row) { return uint32_t(((const uint16_t*)shared_at(said_by<uint32_t>(m, 8 * i + row), 16))[g]); };
    word[i] = element(2 * t) | element(2 * t + 1) << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}
DEVICE void store_pair(uint32_t address, uint2 v) { *(uint2*)shared_at(address, 8) = v; }
template <int OFFSET> DEVICE uint32_t load_word(uint32_t address) { return *(const uint32_t*)shared_at(address + OFFSET, 4); }
template <int OFFSET> DEVICE uint2 load_words(uint32_t address) { return *(const uint2*)shared_at(address + OFFSET, 8); }
DEVICE float exp2_of(float x) { return exp2f(x); }
DEVICE int opaque(int x) { return x; }
DEVICE int blocks_of_grid() { return gridDim.x; }
DEVICE float largest_of_warp(float x) {
  for (int d = 1; d < 32; d <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
template <int OFFSET> DEVICE void load_once(uint32_t (&r)[4], const uint8_t* from) {
  if (uintptr_t(from) % 16) wrong("an address that is not aligned");
  memcpy(r, from + OFFSET, 16);
}
template <int BYTES, int OFFSET> DEVICE void load_aligned(uint32_t* r, const uint8_t* from) {
  if (uintptr_t(from + OFFSET) % (BYTES > 16 ? 16 : BYTES)) wrong("an address that is not aligned");
  memcpy(r, from + OFFSET, BYTES);
}
template <int OFFSET> DEVICE void load_once_2(uint32_t* r, const uint8_t* from) { load_aligned<8, OFFSET>(r, from); }
template <int OFFSET> DEVICE void load_once_1(uint32_t* r, const uint8_t* from) { load_aligned<4, OFFSET>(r, from); }
template <int OFFSET> DEVICE void load_32(uint32_t* r, const uint8_t* from) { load_aligned<32, OFFSET>(r, from); }
DEVICE void ask_for(const void*) {}
DEVICE void copy_piece(uint32_t to, const uint8_t* from) {
  if (uintptr_t(from) % 16) wrong("an address that is not aligned");
  if (copies_come_late) me->copies.push_back({shared_at(to, 16), from, 16, 0});
  else memcpy(shared_at(to, 16), from, 16);
}
DEVICE void await_copies() {
  for (const Piece& piece : me->copies) memcpy(piece.to, piece.from, piece.bytes);
  me->copies.clear();
}
// A barrier: how many copies have begun, how many have been waited for by each lane.
DEVICE uint64_t* barrier_at(uint32_t barrier) { return (uint64_t*)shared_at(barrier, 8); }
DEVICE void begin_barrier(uint32_t barrier) { *barrier_at(barrier) = 0; }
DEVICE void publish_barriers() {}
DEVICE void bulk_copy(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier) {
  if (uintptr_t(from) % 16 || bytes % 16) wrong("a bulk copy that is not aligned");
  shared_at(to, 16), shared_at(to + bytes - 16, 16);
  const Piece piece = {shared_at(to, 16), from, size_t(bytes), barrier};
  for (const Piece& other : me->warp->bulk)
    if (other.barrier == barrier) wrong("a second copy for a barrier");
  if (++*barrier_at(barrier), copies_come_late) me->warp->bulk.push_back(piece);
  else memcpy(piece.to, from, bytes);
}
DEVICE void await_barrier(uint32_t barrier, uint32_t phase) {
  std::vector<Piece>& bulk = me->warp->bulk;
  for (size_t i = 0; i < bulk.size(); i++)
    if (bulk[i].barrier == barrier) {
      memcpy(bulk[i].to, bulk[i].from, bulk[i].bytes);
      bulk.erase(bulk.begin() + i);
      break;
    }
  // The first copy ends phase 0, the second phase 1.
  if (*barrier_at(barrier) == 0 || (*barrier_at(barrier) - 1) % 2 != phase) wrong("a phase that does not end");
}

}  // namespace nqkv
