// Keys and values into pages and back, and the state of a cache on the device, src/cuda/cache.rs.
// target: compute_80
// isa: 8.0
//
// A sequence on the device is four counts, a table, and exact tokens. The table's entries are row addresses with the valid
// count in the top byte; entries beyond the pages in use are rows that the host has reserved (count 0), so that nothing is
// allocated here. A stream of tokens is what the tail holds, then what comes in; pages are cut from its front.
#include "page.cuh"

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

DEVICE double load(const uint8_t* data, long long at, int dtype) {
  switch (dtype) {
    case F64: return ((const double*)data)[at];
    case F32: return ((const float*)data)[at];
    case F16: return __half2float(((const __half*)data)[at]);
    default: return __bfloat162float(((const __nv_bfloat16*)data)[at]);
  }
}

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
  const double v = load(x.data, b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + c * x.stride[3], int(x.dtype));
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
    return float(load(a.tail[side], exact_at(codec, codec.side[side], codec.tail_slots, b, i, h, c), codec.exact));
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
      const double v = load(x.data, b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + c * x.stride[3], int(x.dtype));
      store(a.sinks[side], exact_at(codec, s, codec.sink_slots, b, n.sinks + t, h, c), exact, v);
    }
    if (codec.single_slots) continue;
    // What stays of the old tail moves down, a batch of elements at a time: read by all before any is written.
    const int kept = max(n.tail - sealed, 0);
#pragma unroll 1
    for (int first = 0; sealed > 0 && first < kept * s.dim; first += blockDim.x) {
      const int e = first + threadIdx.x, t = e / s.dim, c = e % s.dim;
      double v = 0;
      if (e < kept * s.dim) v = load(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t + sealed, h, c), exact);
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
      store(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t - sealed, h, c), exact, load(x.data, at, int(x.dtype)));
    }
  }
}

// The same, 16 bytes at a time.
DEVICE void settle_vectors(const CacheArguments& a, const Counts& n, const Stream& stream, int sealed, int b, int h) {
  const Codec& codec = *a.codec;
  const int length = stream.length(a), kept = max(n.tail - sealed, 0), from = max(n.tail, sealed);
#pragma unroll 1
  for (int side = 0; side < 2; side++) {
    const Side& s = codec.side[side];
    const Tensor& x = a.x[side];
    const int chunks = s.dim / 8, rows = unsigned(blockDim.x) / unsigned(chunks), row = threadIdx.x / unsigned(chunks), c = (threadIdx.x - row * chunks) * 8;
    const bool mine = row < rows;
    auto input = [&](int t) { return __ldcg((const uint4*)(x.data + 2 * (b * x.stride[0] + h * x.stride[1] + t * x.stride[2] + c))); };
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

// Sinks, tail, table and counts, and before them, if `with_pages`, the pages that are due: so a few tokens take one launch.
// Block (head, sequence). Not with pages for schemes with a tail whose blocks span heads: those need tails that other blocks
// move.
extern "C" __global__ void __launch_bounds__(256, 3) pages_append(const __grid_constant__ CacheArguments a) {
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
  if (a.vectors) settle_vectors(a, n, stream, due * PAGE_TOKENS, b, h);
  else settle_exact(a, n, stream, due * PAGE_TOKENS, b, h);
  settle_counts(a, n, stream, due, b);
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
      x = load(a.sinks[side], exact_at(codec, s, codec.sink_slots, b, t, h, channel), codec.exact);
    } else if (page_of[i] >= 0) {
      x = number_at(s, half_of(codec, table[page_of[i]], h, side), h, slot_of_token[i], c);
    } else if (t < packed + n.tail) {
      x = load(a.tail[side], exact_at(codec, s, codec.tail_slots, b, t - packed, h, channel), codec.exact);
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
