// The instructions of attention that C++ has no words for. Nothing else of attend*.cuh holds PTX, so that tests/emulator runs the
// rest on a CPU.
#pragma once
#include "codec.cuh"

namespace nqkv {

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  return dynamic;
}
DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// 8 x 8 halves, two of a row in each lane.
DEVICE uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// What lane 4 ROW + t of the warp has.
template <int ROW> DEVICE uint32_t of_row(uint32_t x) {
  uint32_t y;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x31f, 0xffffffff;" : "=r"(y) : "r"(x), "n"(4 * ROW));
  return y;
}
DEVICE uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
DEVICE uint2 load_pair(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
DEVICE uint32_t load_one(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
// Four times 8 x 8 halves: lane 8 i + r has the address of row r of the i-th; lane 4 g + t gets column g of rows 2 t and 2 t + 1.
DEVICE uint4 load_transposed(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
DEVICE void store_pair(uint32_t address, uint2 v) { asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory"); }
// Of what does not change any more.
template <int OFFSET> DEVICE uint32_t load_word(uint32_t address) {
  uint32_t d;
  asm("ld.shared.b32 %0, [%1 + %2];" : "=r"(d) : "r"(address), "n"(OFFSET));
  return d;
}
template <int OFFSET> DEVICE uint2 load_words(uint32_t address) {
  uint2 d;
  asm("ld.shared.v2.b32 {%0,%1}, [%2 + %3];" : "=r"(d.x), "=r"(d.y) : "r"(address), "n"(OFFSET));
  return d;
}
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The largest of a warp's numbers, none of which is NaN: as integers that have their order.
DEVICE float largest_of_warp(float x) {
  const int i = __float_as_int(x), top = __reduce_max_sync(~0u, i ^ (i >> 31 & 0x7fffffff));
  return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
}
// A number that the compiler does not know: what is rarely computed from it stays where it is, and takes no register elsewhere.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Read where it is needed, not held in a register.
DEVICE int blocks_of_grid() {
  int x;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(x));
  return x;
}
// Memory that is read once, OFFSET bytes from an address that a lane keeps.
template <int OFFSET> DEVICE void load_once(uint32_t (&r)[4], const uint8_t* from) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4 + %5];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(from), "n"(OFFSET));
}
template <int OFFSET> DEVICE void load_once_2(uint32_t* r, const uint8_t* from) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0,%1}, [%2 + %3];" : "=r"(r[0]), "=r"(r[1]) : "l"(from), "n"(OFFSET));
}
template <int OFFSET> DEVICE void load_once_1(uint32_t* r, const uint8_t* from) {
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1 + %2];" : "=r"(r[0]) : "l"(from), "n"(OFFSET));
}
// 32 bytes: both halves are of one sector, which the first load brings to the L1.
template <int OFFSET> DEVICE void load_32(uint32_t* r, const uint8_t* from) {
  asm volatile("ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4 + %5];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(from), "n"(OFFSET));
  asm volatile("ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4 + %5];" : "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7]) : "l"(from), "n"(OFFSET + 16));
}
// Adds one; what this block's threads wrote before their last barrier is there for whoever sees it, and what others did before.
DEVICE int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
DEVICE void ask_for(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// 16 bytes into shared memory, there after `await_copies`.
DEVICE void copy_piece(uint32_t to, const uint8_t* from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
// The bulk copies of Hopper. A barrier is of a warp; its phase is even and odd in turns.
DEVICE void begin_barrier(uint32_t barrier) { asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory"); }
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void bulk_copy(uint32_t to, const uint8_t* from, int bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
DEVICE void await_barrier(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier), "r"(phase)
      : "memory");
}
DEVICE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace nqkv
