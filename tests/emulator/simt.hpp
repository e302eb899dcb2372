// A block of threads on one CPU thread: lanes are coroutines that stop at what their warp, or their block, does together. Warps
// take turns in random order. Lanes of a warp that meet different operations, or a warp that meets one with some lanes only, end
// the program, as does a block that cannot go on. One block runs after the other.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

using std::isnan;
using std::max;
using std::min;

struct Place {
  unsigned x, y, z;
};

enum class At { RUNNING, WARP, BLOCK, DONE };

// An asynchronous copy.
struct Piece {
  uint8_t* to;
  const uint8_t* from;
  size_t bytes;
  uint32_t barrier;
};

constexpr int LANES = 32, MESSAGE = 32;
using Messages = uint8_t[LANES][MESSAGE];

struct WarpOf;
struct Lane {
  ucontext_t context;
  Place place;
  int lane, turn, operation;
  WarpOf* warp;
  At at;
  uint8_t message[MESSAGE];
  std::vector<Piece> copies;  // those that have not been waited for
  std::vector<char> stack;
};
struct WarpOf {
  Lane* lanes[LANES];
  Messages seen[2];
  int turns;
  std::vector<Piece> bulk;
};

inline Lane* me;
inline ucontext_t scheduler;
inline Place block_place, grid_size, block_size;
#define threadIdx (me->place)
#define blockIdx block_place
#define gridDim grid_size
#define blockDim block_size

[[noreturn]] inline void wrong(const char* what) {
  printf("emulator: block %u thread %u: %s\n", block_place.x, me ? me->place.x : 0, what);
  fflush(stdout);
  abort();
}

inline void stop(At at) {
  Lane* lane = me;
  lane->at = at;
  swapcontext(&lane->context, &scheduler);
}

// What all lanes of the warp have to say: each its own message.
template <class T> const Messages& together(int operation, const T& said) {
  static_assert(sizeof(T) <= MESSAGE, "room for a message");
  Lane* lane = me;
  lane->operation = operation;
  memcpy(lane->message, &said, sizeof(T));
  stop(At::WARP);
  return lane->warp->seen[lane->turn % 2];
}
template <class T> T said_by(const Messages& messages, int lane) {
  T x;
  memcpy(&x, messages[lane], sizeof(T));
  return x;
}

template <class T> T __shfl_sync(unsigned, T x, int from) { return said_by<T>(together(1, x), from & 31); }
template <class T> T __shfl_xor_sync(unsigned, T x, int bits) { return said_by<T>(together(2, x), me->lane ^ bits); }
template <class T> T __shfl_up_sync(unsigned, T x, int by) {
  const Messages& m = together(3, x);
  return me->lane >= by ? said_by<T>(m, me->lane - by) : x;
}
inline unsigned ballot(int operation, int x) {
  const Messages& m = together(operation, int(x != 0));
  unsigned result = 0;
  for (int i = 0; i < LANES; i++) result |= unsigned(said_by<int>(m, i)) << i;
  return result;
}
inline unsigned __ballot_sync(unsigned, int x) { return ballot(4, x); }
inline int __any_sync(unsigned, int x) { return ballot(5, x) != 0; }
inline int __reduce_add_sync(unsigned, int x) {
  const Messages& m = together(6, x);
  int sum = 0;
  for (int i = 0; i < LANES; i++) sum += said_by<int>(m, i);
  return sum;
}
inline void __syncwarp() { together(7, 0); }
inline void __syncthreads() { stop(At::BLOCK); }
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline float __uint_as_float(uint32_t x) {
  float number;
  memcpy(&number, &x, 4);
  return number;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }
inline size_t __cvta_generic_to_shared(const void*) { return 0; }  // of kernels that are not emulated

// Runs a grid. Shared memory begins as NaNs.
inline void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& kernel, uint8_t* shared, size_t shared_bytes, unsigned seed) {
  static const std::function<void()>* body;
  body = &kernel;
  std::mt19937 random(seed);
  grid_size = {blocks, 1, 1}, block_size = {threads, 1, 1};
  std::vector<Lane> lanes(threads);
  std::vector<WarpOf> warps(threads / LANES);
  for (unsigned b = 0; b < blocks; b++) {
    block_place = {b, 0, 0};
    memset(shared, 0xff, shared_bytes);
    for (unsigned i = 0; i < threads; i++) {
      Lane& x = lanes[i];
      x.place = {i, 0, 0}, x.lane = i % LANES, x.turn = 0, x.warp = &warps[i / LANES], x.at = At::RUNNING;
      x.warp->lanes[x.lane] = &x, x.warp->turns = 0, x.warp->bulk.clear();
      x.copies.clear(), x.stack.resize(128 << 10);
      getcontext(&x.context);
      x.context.uc_stack.ss_sp = x.stack.data(), x.context.uc_stack.ss_size = x.stack.size(), x.context.uc_link = &scheduler;
      makecontext(&x.context, +[] { (*body)(), me->at = At::DONE; }, 0);
    }
    std::vector<int> order(warps.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = int(i);
    for (unsigned done = 0; done < threads;) {
      bool moved = false;
      unsigned waiting = done = 0;
      std::shuffle(order.begin(), order.end(), random);
      for (int w : order) {
        WarpOf& warp = warps[w];
        int at[4] = {0, 0, 0, 0};
        for (Lane* x : warp.lanes) {
          me = x;
          if (x->at == At::RUNNING) swapcontext(&scheduler, &x->context), moved = true;
          at[int(x->at)]++;
        }
        if (at[int(At::WARP)] == LANES) {
          for (Lane* x : warp.lanes) {
            me = x;
            if (x->operation != warp.lanes[0]->operation) wrong("lanes of a warp meet different operations");
            memcpy(warp.seen[warp.turns % 2][x->lane], x->message, MESSAGE);
            x->turn = warp.turns, x->at = At::RUNNING;
          }
          warp.turns++, moved = true;
        } else if (at[int(At::WARP)] > 0) {
          wrong("some lanes of a warp meet an operation of all");
        }
        done += at[int(At::DONE)], waiting += at[int(At::BLOCK)];
      }
      if (waiting == threads) {
        for (Lane& x : lanes) x.at = At::RUNNING;
      } else if (!moved) {
        wrong("the block cannot go on");
      }
    }
  }
}
