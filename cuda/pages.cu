// Keys and values into pages and back, and the state of a cache on the device, src/cuda/cache.rs.
// target: compute_80
// isa: 8.0
//
// A sequence on the device is four counts, a table, and exact tokens. The table's entries are row addresses with the valid
// count in the top byte; entries beyond the pages in use are rows that the host has reserved (count 0), so that nothing is
// allocated here. A stream of tokens is what the tail holds, then what comes in; pages are cut from its front.
#include "pages.cuh"

namespace nqkv {

DEVICE uint8_t* half_of(const Codec& codec, unsigned long long entry, int h, int side) {
  return (uint8_t*)(entry & ADDRESS) + (long long)h * codec.page_bytes + (side ? codec.value_offset : 0);
}

// Pages that an append fills from the stream, for schemes with a tail.
DEVICE int pages_due(const Codec& codec, int length) {
  const int beyond = length - codec.window;
  return beyond >= PAGE_TOKENS ? beyond / PAGE_TOKENS : 0;
}

// Where token i of the input (past the sinks) of a single-slot scheme goes: page, counted from the first of the table, and slot.
DEVICE void single_slot(const unsigned long long* table, const Counts& n, int i, int& page, int& slot) {
  const int last = n.pages > 0 ? int(table[n.pages - 1] >> 56) : PAGE_TOKENS, room = n.open ? PAGE_TOKENS - last : 0;
  if (i < room) page = n.pages - 1, slot = last + i;
  else page = n.pages + (i - room) / PAGE_TOKENS, slot = (i - room) % PAGE_TOKENS;
}

// One page that an append writes: its place in the table, and which tokens of the stream go to which slots.
struct Piece {
  int page, slot, start, count;
};

// Piece i of an append; false if there are fewer. A single-slot scheme first fills the open page, if there is one.
DEVICE bool piece_of(const CacheArguments& a, const unsigned long long* table, const Counts& n, const Stream& stream, int i, Piece& piece) {
  piece = {n.pages + i, 0, i * PAGE_TOKENS, PAGE_TOKENS};
  if (!a.codec->single_slots) return i < pages_due(*a.codec, stream.length(a));
  const int incoming = a.tokens - stream.skip;
  int page, slot;
  single_slot(table, n, 0, page, slot);
  const int room = page < n.pages ? PAGE_TOKENS - slot : 0;
  if (room > 0) piece.start = i == 0 ? 0 : room + (i - 1) * PAGE_TOKENS;
  if (piece.start >= incoming) return false;
  piece.count = min(incoming - piece.start, room > 0 && i == 0 ? room : PAGE_TOKENS);
  single_slot(table, n, piece.start, piece.page, piece.slot);
  return true;
}

DEVICE void write_piece(const CacheArguments& a, const unsigned long long* table, const Stream& stream, const Piece& piece, int b, int h, int side) {
  const Codec& codec = *a.codec;
  write_half(codec, codec.side[side], half_of(codec, table[piece.page], h, side), h, piece.slot, piece.count,
             [&](int i, int head, int c) { return stream.number(a, side, b, head, piece.start + i, c); });
}

// Sinks and tail of a head after an append.
DEVICE void settle_exact(const CacheArguments& a, const Counts& n, const Stream& stream, int sealed, int b, int h) {
  const Codec& codec = *a.codec;
  const int length = stream.length(a), exact = codec.exact;
#pragma unroll 1
  for (int side = 0; side < 2; side++) {
    const Side& s = codec.side[side];
#pragma unroll 1
    for (int e = threadIdx.x; e < stream.skip * s.dim; e += blockDim.x) {
      const int t = e / s.dim, c = e % s.dim;
      const Tensor& x = a.x[side];
      const double v = load_number(x.data, b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + c * x.stride[3], int(x.dtype));
      store(a.sinks[side], exact_at(codec, s, codec.sink_slots, b, n.sinks + t, h, c), exact, v);
    }
    if (codec.single_slots) continue;
    // What stays of the old tail moves down, a batch of elements at a time: read by all before any is written.
    const int kept = max(n.tail - sealed, 0);
#pragma unroll 1
    for (int first = 0; sealed > 0 && first < kept * s.dim; first += blockDim.x) {
      const int e = first + threadIdx.x, t = e / s.dim, c = e % s.dim;
      double v = 0;
      if (e < kept * s.dim) v = load_number(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t + sealed, h, c), exact);
      __syncthreads();
      if (e < kept * s.dim) store(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t, h, c), exact, v);
      __syncthreads();
    }
    const int from = max(n.tail, sealed);
#pragma unroll 1
    for (int e = threadIdx.x; e < (length - from) * s.dim; e += blockDim.x) {
      const int t = from + e / s.dim, c = e % s.dim;
      const Tensor& x = a.x[side];
      const long long at = b * x.stride[0] + h * x.stride[1] + (t - n.tail + stream.skip) * x.stride[2] + c * x.stride[3];
      store(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t - sealed, h, c), exact, load_number(x.data, at, int(x.dtype)));
    }
  }
}

// Eight numbers in shared memory as exact tokens hold them.
DEVICE uint4 exact_eight(const float* x, int exact) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float low = x[2 * i], high = x[2 * i + 1];
    if (exact == F16) w[i] = __half_as_ushort(__float2half_rn(low)) | uint32_t(__half_as_ushort(__float2half_rn(high))) << 16;
    else w[i] = __bfloat16_as_ushort(__float2bfloat16_rn(low)) | uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// The same, 16 bytes at a time; `SHARED`: the input is fp32 in shared memory.
template <bool SHARED> DEVICE void settle_vectors(const CacheArguments& a, const Counts& n, const Stream& stream, int sealed, int b, int h) {
  const Codec& codec = *a.codec;
  const int length = stream.length(a), kept = max(n.tail - sealed, 0), from = max(n.tail, sealed);
#pragma unroll 1
  for (int side = 0; side < 2; side++) {
    const Side& s = codec.side[side];
    const Tensor& x = a.x[side];
    const int chunks = s.dim / 8, rows = unsigned(blockDim.x) / unsigned(chunks), row = threadIdx.x / unsigned(chunks), c = (threadIdx.x - row * chunks) * 8;
    const bool mine = row < rows;
    auto input = [&](int t) {
      const long long at = b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + c;
      if constexpr (SHARED) return exact_eight((const float*)x.data + at, codec.exact);
      else return __ldcg((const uint4*)(x.data + 2 * at));
    };
    auto exact = [&](uint8_t* data, int slots, int slot) { return (uint4*)(data + 2 * exact_at(codec, s, slots, b, slot, h, c)); };
    for (int t = row; mine && t < stream.skip; t += rows) *exact(a.sinks[side], codec.sink_slots, n.sinks + t) = input(t);
    if (codec.single_slots) continue;
#pragma unroll 1
    for (int first = 0; sealed > 0 && first < kept; first += rows) {
      const int t = first + row;
      const bool moves = mine && t < kept;
      const uint4 v = moves ? __ldcg(exact(a.tail[side], codec.tail_slots, t + sealed)) : make_uint4(0, 0, 0, 0);
      __syncthreads();
      if (moves) *exact(a.tail[side], codec.tail_slots, t) = v;
      __syncthreads();
    }
    for (int t = from + row; mine && t < length; t += rows) *exact(a.tail[side], codec.tail_slots, t - sealed) = input(t - n.tail + stream.skip);
  }
}

// Whether the pages that an append begins are there: the host ends a table with an empty entry.
DEVICE bool is_reserved(const CacheArguments& a, const unsigned long long* table, const Counts& n, const Stream& stream) {
  int page = n.pages, slot = 0;
  const int incoming = a.tokens - stream.skip;
  if (a.codec->single_slots) single_slot(table, n, max(incoming - 1, 0), page, slot);
  else if (pages_due(*a.codec, stream.length(a)) == 0) return true;
  return incoming == 0 || page < n.pages || (n.pages < a.capacity && (table[n.pages] & ADDRESS) != 0);
}

// Table and counts of a sequence, by the last of its heads to arrive: every other one has read them.
DEVICE void settle_counts(const CacheArguments& a, const Counts& n, const Stream& stream, int due, int b) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(a.arrived + b, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  unsigned long long* table = a.table + b * a.capacity;
  // A thread for each page: a prompt has hundreds, and each is a trip to memory.
#pragma unroll 1
  for (int i = threadIdx.x; i < due; i += blockDim.x) table[n.pages + i] = (table[n.pages + i] & ADDRESS) | (unsigned long long)PAGE_TOKENS << 56;
  Counts next = {n.sinks + stream.skip, n.pages + due, stream.length(a) - due * PAGE_TOKENS, n.open};
  if (a.codec->single_slots) {
    const int incoming = a.tokens - stream.skip;
    int page, slot;
    single_slot(table, n, 0, page, slot);
    __syncthreads();  // before the count of the open page changes
    const int end = slot + incoming, touched = incoming > 0 ? (end + PAGE_TOKENS - 1) / PAGE_TOKENS : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < touched; i += blockDim.x)
      table[page + i] = (table[page + i] & ADDRESS) | (unsigned long long)min(PAGE_TOKENS, end - i * PAGE_TOKENS) << 56;
    next.tail = 0;
    if (touched > 0) next.pages = page + touched, next.open = 1;
  }
  if (threadIdx.x != 0) return;
  a.arrived[b] = 0;
  a.counts[b] = next;
}

}  // namespace nqkv
using namespace nqkv;

// Writes pages: block (page, head, 2 * sequence + side). Counts and table stay as they are.
extern "C" __global__ void __launch_bounds__(256, 3) pages_seal(const __grid_constant__ CacheArguments a) {
  const int h = blockIdx.y, b = blockIdx.z / 2, side = blockIdx.z % 2;
  const Counts n = a.counts[b];
  const unsigned long long* table = a.table + b * a.capacity;
  const Stream stream(a, n);
  Piece piece;
  if (piece_of(a, table, n, stream, blockIdx.x, piece)) write_piece(a, table, stream, piece, b, h, side);
}

struct TransformedArguments {
  CacheArguments append;
  Transform side[2];
  int dim[2], heads, padding;  // heads whose tokens a block reads: its own, or all
};

namespace nqkv {

template <bool SHARED> DEVICE void append_pages(const CacheArguments& a) {
  const int h = blockIdx.x, b = blockIdx.y;
  const Counts n = a.counts[b];
  const unsigned long long* table = a.table + b * a.capacity;
  const Stream stream(a, n);
  if (!is_reserved(a, table, n, stream)) return;  // the sequence stays as it is
  Piece piece;
#pragma unroll 1
  for (int i = 0; a.with_pages && piece_of(a, table, n, stream, i / 2, piece); i++) {
    write_piece(a, table, stream, piece, b, h, i % 2);
    __syncthreads();
  }
  const int due = a.codec->single_slots ? 0 : pages_due(*a.codec, stream.length(a));
  if (a.vectors) settle_vectors<SHARED>(a, n, stream, due * PAGE_TOKENS, b, h);
  else settle_exact(a, n, stream, due * PAGE_TOKENS, b, h);
  settle_counts(a, n, stream, due, b);
}

// Transforms the tokens that this block reads, into shared memory, with the roundings of a tensor like the input: fp32 numbers,
// [heads or 1][tokens][dim] of keys, then of values. `a` becomes the same append from there.
DEVICE void transform_input(const TransformedArguments& all, CacheArguments& a, float* numbers) {
  const int b = blockIdx.y, tokens = all.append.tokens, rows = all.heads * tokens, lane = threadIdx.x & 31;
  static_assert(sizeof(CacheArguments) % 8 == 0, "copied in pieces of 8 bytes");
#pragma unroll 1
  for (int i = threadIdx.x; i < int(sizeof(CacheArguments) / 8); i += blockDim.x)
    ((unsigned long long*)&a)[i] = ((const unsigned long long*)&all.append)[i];
  __syncthreads();
  if (threadIdx.x < 2) {
    const int side = threadIdx.x, dim = all.dim[side];
    a.x[side] = {(const uint8_t*)(numbers + side * rows * all.dim[0]), {0, all.heads > 1 ? (long long)tokens * dim : 0, dim, 1}, F32};
  }
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < 2 * rows; i += blockDim.x / 32) {
    const int side = i >= rows, row = side ? i - rows : i, t = row % tokens, h = all.heads > 1 ? row / tokens : blockIdx.x, dim = all.dim[side];
    const Tensor& x = all.append.x[side];
    float* to = numbers + side * rows * all.dim[0] + row * dim;
    float v[SHARE];
    read_row(v, x.data, b * x.stride[0] + h * x.stride[1] + t * x.stride[2], x.stride[3], dim, int(x.dtype));
    transform_row(all.side[side], v, to, dim, b, h, t);
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
      if (x.dtype == F16) v[j] = __half2float(__float2half_rn(v[j]));
      if (x.dtype == BF) v[j] = __bfloat162float(__float2bfloat16_rn(v[j]));
      if (lane + 32 * j < dim) to[lane + 32 * j] = v[j];
    }
  }
  __syncthreads();
}

}  // namespace nqkv

// Sinks, tail, table and counts, and before them, if `with_pages`, the pages that are due: so a few tokens take one launch.
// Block (head, sequence). Not with pages for schemes with a tail whose blocks span heads: those need tails that other blocks
// move.
extern "C" __global__ void __launch_bounds__(256, 3) pages_append(const __grid_constant__ CacheArguments a) { append_pages<false>(a); }

// The same of few tokens, with pages, after a transform.
extern "C" __global__ void __launch_bounds__(256, 2) pages_append_transformed(const __grid_constant__ TransformedArguments all) {
  extern __shared__ float numbers[];
  __shared__ CacheArguments a;
  transform_input(all, a, numbers);
  append_pages<true>(a);
}

struct ReadArguments {
  const Codec* codec;
  const Counts* counts;
  const unsigned long long* table;
  const uint8_t* sinks[2];
  const uint8_t* tail[2];
  uint8_t* out[2];           // [batch, heads, tokens, dim]
  long long capacity;
  int from, tokens, dtype, padding;
};

// Tokens from..from + tokens of every sequence as dense numbers; zeros past a sequence's end. Block (64 tokens, head,
// 2 * sequence + side); the table is walked by counts, since a page may hold fewer than 64.
extern "C" __global__ void __launch_bounds__(256, 4) pages_read(const __grid_constant__ ReadArguments a) {
  const Codec& codec = *a.codec;
  const int h = blockIdx.y, b = blockIdx.z / 2, side = blockIdx.z % 2;
  const Side& s = codec.side[side];
  const Counts n = a.counts[b];
  const unsigned long long* table = a.table + b * a.capacity;
  __shared__ int page_of[PAGE_TOKENS], slot_of_token[PAGE_TOKENS], packed;
  const int first = a.from + blockIdx.x * PAGE_TOKENS;
  if (threadIdx.x < PAGE_TOKENS) page_of[threadIdx.x] = -1;
  __syncthreads();
  if (threadIdx.x == 0) {
    int at = n.sinks;
    for (int p = 0; p < n.pages; p++) {
      const int count = int(table[p] >> 56);
      for (int t = max(at, first); t < min(at + count, first + PAGE_TOKENS); t++) page_of[t - first] = p, slot_of_token[t - first] = t - at;
      at += count;
    }
    packed = at;
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < PAGE_TOKENS * s.stored; e += blockDim.x) {
    const int i = e / s.stored, c = e % s.stored, t = first + i, channel = channel_at(codec, s, h, c);
    if (t >= a.from + a.tokens || channel >= s.dim) continue;
    double x = 0;
    if (t < n.sinks) {
      x = load_number(a.sinks[side], exact_at(codec, s, codec.sink_slots, b, t, h, channel), codec.exact);
    } else if (page_of[i] >= 0) {
      x = number_at(s, half_of(codec, table[page_of[i]], h, side), h, slot_of_token[i], c);
    } else if (t < packed + n.tail) {
      x = load_number(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t - packed, h, channel), codec.exact);
    }
    store(a.out[side], (((long long)b * codec.heads + h) * a.tokens + (t - a.from)) * s.dim + channel, a.dtype, x);
  }
}

constexpr int ENTRIES = 120;
struct TableArguments {
  unsigned long long* table;
  Counts* counts;
  int entries, sequences;
  unsigned long long value[ENTRIES];
  int place[ENTRIES];
  Counts count[ENTRIES];
  int sequence[ENTRIES];
};

// Entries and counts that the host has decided, passed by value: no copy, no wait, and a CUDA graph may hold it.
extern "C" __global__ void __launch_bounds__(128) pages_set(const __grid_constant__ TableArguments a) {
  const int i = threadIdx.x;
  if (i < a.entries) a.table[a.place[i]] = a.value[i];
  if (i < a.sequences) a.counts[a.sequence[i]] = a.count[i];
}
