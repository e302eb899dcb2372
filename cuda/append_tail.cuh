// A step of decoding for schemes with a tail: few tokens go to sinks and tail, and a page that is full is sealed. What seals it is
// the kernels' own, cuda/append.cu and cuda/append_any.cu: a struct with `prepare`, by all threads, and `seal`, by a group.
#pragma once
#include "append_transformed.cuh"

namespace nqkv {

// A stage in shared memory: the 64 tokens of a page, and the first of those that stay.
constexpr int STAGE_TOKENS = 96, STRIP_BYTES = 16 * 128, SLABS_BYTES = STAGE_TOKENS / 16 * STRIP_BYTES;

// Tokens of one head in shared memory: strips of 16 tokens x 4 slabs, rows of 128 bytes, swizzled.
DEVICE uint32_t in_half(int row, int column) {
  return column / 8 * SLABS_BYTES + row / 16 * STRIP_BYTES + row % 16 * 128 + (column ^ row) % 8 * 16;
}

// Eight warps that work on one half of a page at a time.
struct Group {
  static constexpr int THREADS = 256, WARPS = 8;
  int number, thread;
  DEVICE Group() : number(threadIdx.x / THREADS), thread(threadIdx.x % THREADS) {}
  // The same for all lanes, and known to be.
  DEVICE int warp() const { return __shfl_sync(ALL, thread / 32, 0); }
  DEVICE void sync() const { asm volatile("bar.sync %0, %1;" ::"r"(1 + number), "n"(THREADS) : "memory"); }
};

// Which 16 bytes of tokens a thread of several copies: of the row-th, the (row + rows)-th, ...
struct Place {
  int row, column, rows;
  DEVICE Place(int thread, int threads, int chunks) {
    // A quotient of numbers up to 1024 and up to 32.
    const uint32_t inverse = (65535 + chunks) / unsigned(chunks);
    row = thread * inverse >> 16, rows = threads * inverse >> 16;
    column = thread - row * chunks;
    if (row >= rows) row = 1 << 16;
  }
};

// Lanes for a token of at most `chunks` times 16 bytes, so that its numbers stay in one warp: a power of two.
DEVICE int lanes_for(int chunks) { return chunks <= 2 ? 2 : 1 << (32 - __clz(chunks - 1)); }
DEVICE uint32_t lanes_beside(int lanes) { return lanes == 32 ? ALL : ((1u << lanes) - 1) << (lane_of() & ~(lanes - 1)); }

DEVICE uint4 load_shared(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
  return x;
}

DEVICE void store_shared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Of a sequence whose page is sealed: in shared memory, since registers are for numbers.
struct Sealed {
  unsigned long long entry;
  int held, skip, sinks;  // tokens of the tail; of the input that go to the sinks; of these
};

// Copies the oldest tokens of tail and input of a head to shared memory.
template <class How> DEVICE void copy_half(const AppendArguments& a, const How& how, const Group& group, const volatile Sealed& sealed, int value, int h, uint32_t to) {
  const AppendSide& s = a.side[value];
  const int b = blockIdx.y, held = sealed.held, skip = sealed.skip;
  if constexpr (How::TRANSFORMED) {
    const int lanes = lanes_for(2 * s.slabs);
    const Place place(group.thread, Group::THREADS, lanes);
    const bool active = place.column < 2 * s.slabs;
#pragma unroll 1
    for (int row = held + place.row; row < PAGE_TOKENS; row += place.rows) {
      const uint4 x = how.number(s, value, b, h, row - held + skip, 8 * place.column, active, lanes_beside(lanes));
      if (active) store_shared(to + in_half(row, place.column), x);
    }
  }
  const Place place(group.thread, Group::THREADS, 2 * s.slabs);
  const uint8_t* x = s.x + b * s.stride[0] + h * s.stride[1] + 16 * place.column;
#pragma unroll 2
  for (int row = place.row; row < (How::TRANSFORMED ? min(held, STAGE_TOKENS) : max(PAGE_TOKENS, min(held, STAGE_TOKENS))); row += place.rows) {
    const uint8_t* from = row < held ? exact_at(s.tail, a, a.tail_slots, b, row, h, 2 * s.slabs, place.column) : x + (row - held + skip) * s.stride[2];
    copy_16(to + in_half(row, place.column), from, true);
  }
}

// Moves a head's tokens that stay in the tail to where the sealed ones stood; before, all of the group have them at `from`.
DEVICE void move_tail(const AppendArguments& a, const Group& group, const volatile Sealed& sealed, const AppendSide& s, int h, uint32_t from) {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  group.sync();
  const int kept = sealed.held - PAGE_TOKENS;
  const Place place(group.thread, Group::THREADS, 2 * s.slabs);
  uint8_t* base = exact_at(s.tail, a, a.tail_slots, blockIdx.y, 0, h, 2 * s.slabs, place.column);
  const long long token = 32ll * s.slabs * a.heads;
#pragma unroll 1
  for (int row = place.row; row < min(kept, STAGE_TOKENS - PAGE_TOKENS); row += place.rows)
    *(uint4*)(base + row * token) = load_shared(from + in_half(row + PAGE_TOKENS, place.column));
  // What the stage does not hold: a pass writes where passes before it have read.
#pragma unroll 1
  for (int i = STAGE_TOKENS - PAGE_TOKENS; i < kept; i += place.rows) {
    const int row = place.row + i;
    uint4 moved;
    if (row < kept) moved = __ldcg((const uint4*)(base + (row + PAGE_TOKENS) * token));
    group.sync();
    if (row < kept) *(uint4*)(base + row * token) = moved;
  }
}

// The units of a sequence, 2 h for keys of head h and 2 h + 1 for values, in equal shares for blocks and groups.
struct Units {
  int first, end;
  DEVICE explicit Units(const AppendArguments& a) {
    const int share = blockDim.x / Group::THREADS * a.share;
    first = blockIdx.x * share, end = min(first + share, 2 * a.heads);
  }
};

// A word of codes of a slab's strip, on its way into a page.
DEVICE void keep_codes(uint32_t codes, int slab, int strip, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(codes + 512 * slab + 16 * lane_of() + 4 * strip), "r"(word) : "memory");
}

// Seals a head's keys, or values, that are on their way into shared memory at `from`.
template <class Seal, int SIDE> DEVICE void seal_unit(const AppendArguments& a, const Group& group, const volatile Sealed& sealed, int h, uint32_t from, uint32_t codes, uint8_t* shared) {
  const AppendSide& s = a.side[SIDE];
  move_tail(a, group, sealed, s, h, from);
  uint8_t* half = (uint8_t*)sealed.entry + (long long)h * a.page_bytes + s.half_offset;
  Seal::template seal<SIDE == 1>(a, s, group, half, from, codes, shared);
  if (s.block != 0) {
    group.sync();
#pragma unroll 1
    for (int i = group.thread; i < 32 * s.slabs; i += Group::THREADS) ((uint4*)half)[i] = load_shared(codes + 16 * i);
  }
  group.sync();  // before the next copy overwrites the stage, and codes
}

// Seals a page.
template <class Seal, class How> DEVICE void seal_units(const AppendArguments& a, const How& how, const volatile Sealed& sealed) {
  extern __shared__ __align__(256) uint8_t shared[];
  const Group group;
  const int slabs = max(a.side[0].slabs, a.side[1].slabs), stage = (slabs + 3) / 4 * SLABS_BYTES;
  // After what all share, two stages and the codes of a half for each group.
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared)), stages = base + Seal::SHARED + group.number * (2 * stage + 512 * slabs);
  const Units units(a);
  const int first = units.first + group.number * a.share, end = min(first + a.share, units.end);
  auto copy = [&](int unit) {
    if (unit < end) copy_half(a, how, group, sealed, unit % 2, unit / 2, stages + unit % 2 * stage);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if constexpr (!How::TRANSFORMED) copy(first);
  Seal::prepare(a, shared);
  __syncthreads();
  // A transform is much code: once, a step ahead.
#pragma unroll 1
  for (int unit = How::TRANSFORMED ? first - 1 : first; unit < end; unit++) {
    copy(unit + 1);
    if (How::TRANSFORMED && unit < first) continue;
    if (unit % 2 == 0) seal_unit<Seal, 0>(a, group, sealed, unit / 2, stages, stages + 2 * stage, shared);
    else seal_unit<Seal, 1>(a, group, sealed, unit / 2, stages + stage, stages + 2 * stage, shared);
  }
}

// Copies new tokens to sinks and tail.
template <class How> struct Copy {
  const How& how;
  Units units;
  Place place;
  DEVICE static int chunks(const AppendArguments& a) {
    const int most = 2 * max(a.side[0].slabs, a.side[1].slabs);
    return How::TRANSFORMED ? lanes_for(most) : most;
  }
  DEVICE explicit Copy(const AppendArguments& a, const How& how) : how(how), units(a), place(threadIdx.x, blockDim.x, chunks(a)) {}
  DEVICE bool mine(const AppendArguments& a, int unit) const { return unit < units.end && place.column < 2 * a.side[unit % 2].slabs; }
  DEVICE uint4 input(const AppendArguments& a, int unit, int t) const {
    const AppendSide& s = a.side[unit % 2];
    if constexpr (How::TRANSFORMED) {
      if (unit >= units.end) return make_uint4(0, 0, 0, 0);
      return how.number(s, unit % 2, blockIdx.y, unit / 2, t, 8 * place.column, mine(a, unit), lanes_beside(chunks(a)));
    }
    if (!mine(a, unit)) return make_uint4(0, 0, 0, 0);
    return __ldcg((const uint4*)(s.x + blockIdx.y * s.stride[0] + unit / 2 * s.stride[1] + t * s.stride[2] + 16 * place.column));
  }
  // `first`: slots of sinks and tail that token 0 would take.
  DEVICE void put(const AppendArguments& a, int2 first, int skip, int unit, int t, uint4 x) const {
    const AppendSide& s = a.side[unit % 2];
    if (!mine(a, unit)) return;
    if (t < skip) *(uint4*)exact_at(s.sinks, a, a.sink_slots, blockIdx.y, first.x + t, unit / 2, 2 * s.slabs, place.column) = x;
    else if (first.y + t >= 0) *(uint4*)exact_at(s.tail, a, a.tail_slots, blockIdx.y, first.y + t, unit / 2, 2 * s.slabs, place.column) = x;
  }
  // All but the first `done`.
  DEVICE void rest(const AppendArguments& a, int2 first, int skip, int done) const {
#pragma unroll 1
    for (int t = 0; t < a.tokens; t++) {
#pragma unroll 1
      for (int unit = units.first + place.row; unit < units.end; unit += place.rows)
        if (done-- <= 0) put(a, first, skip, unit, t, input(a, unit, t));
    }
  }
};

template <class Seal, class How> DEVICE void append_tail(const AppendArguments& a, const How& how) {
  const int b = blockIdx.y;
  const int4 n = __ldcg(a.counts + b);
  const Copy<How> copy(a, how);
  // While the counts come.
  const uint4 ahead = copy.input(a, copy.units.first + copy.place.row, 0);

  unsigned long long* table = a.table + b * a.capacity;
  const int skip = min(a.tokens, a.sink_slots - n.x), length = n.z + a.tokens - skip;
  const bool seals = length - a.window >= PAGE_TOKENS;
  unsigned long long entry = 0;
  if (seals) {
    // No page in reserve: the sequence stays as it is.
    entry = n.y < a.capacity ? __ldcg(table + n.y) & ADDRESS : 0;
    if (entry == 0) return;
  }
  __shared__ Sealed sealed;
  if (How::TRANSFORMED && threadIdx.x == 0) sealed = {entry, n.z, skip, n.x};
  if (settles(a.arrived + b)) {
    a.counts[b] = make_int4(n.x + skip, n.y + seals, seals ? length - PAGE_TOKENS : length, n.w);
    if (seals) table[n.y] = entry | (unsigned long long)PAGE_TOKENS << 56;
  }
  if constexpr (How::TRANSFORMED) {
    if (seals) {
      seal_units<Seal>(a, how, sealed);
      __syncthreads();
    } else {
      copy.put(a, make_int2(n.x, n.z - skip), skip, copy.units.first + copy.place.row, 0, ahead);
    }
    const int first = sealed.held - sealed.skip - (seals ? PAGE_TOKENS : 0);
    Copy<How>(a, how).rest(a, make_int2(sealed.sinks, first), sealed.skip, seals ? 0 : 1);
  } else if (!seals) {
    copy.put(a, make_int2(n.x, n.z - skip), skip, copy.units.first + copy.place.row, 0, ahead);
    copy.rest(a, make_int2(n.x, n.z - skip), skip, 1);
  } else {
    if (threadIdx.x == 0) sealed = {entry, n.z, skip, n.x};
    __syncthreads();
    seal_units<Seal>(a, how, sealed);
    __syncthreads();
    Copy<How>(a, how).rest(a, make_int2(sealed.sinks, sealed.held - sealed.skip - PAGE_TOKENS), sealed.skip, 0);
  }
}

}  // namespace nqkv
