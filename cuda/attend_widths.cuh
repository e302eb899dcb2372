// Decode attention on pages of other widths than 4 bits: how codes of a width become A operands, what a page of such widths looks
// like, and scores of keys whose slabs have different widths. src/page.rs draws the planes.
#pragma once
#include "attend_loop.cuh"

namespace nqkv {

// Widths of keys that are known only when the kernel runs: up to 6 bits and a mean of 4 at most, or any.
constexpr int MIXED = 0, MIXED8 = 9;

// Where the tables of mixed keys stand: rows have 256 bytes, of which each table takes a half. Values have theirs beside that of 4 bits.
constexpr int KEYS4 = TABLE_AT, KEYS3 = TABLE_AT + 65536, KEYS6 = KEYS3 + 128, KEYS5 = KEYS3 + 64 * 256, KEYS2 = KEYS5 + 128;
constexpr int KEYS1 = KEYS2 + 16 * 256, KEYS8 = KEYS5 + 32 * 256, MIXED_TABLES = 65536 + 96 * 256;

// As Shape. Keys of KEY bits, or mixed; values of VALUE bits.
template <int D_, bool PER_TOKEN_, int BLOCK_, bool BULK_, int KEY_, int VALUE_> struct Wide : Shape<D_, PER_TOKEN_, BLOCK_, BULK_> {
  using Narrow = Shape<D_, PER_TOKEN_, BLOCK_, BULK_>;
  static constexpr int D = D_, SLABS = Narrow::SLABS, KEY = KEY_, VALUE = VALUE_;
  static constexpr bool WIDE = true, ORDERED = KEY == MIXED || KEY == MIXED8, BULK = BULK_;
  static constexpr int KEY_CODES = 128 * SLABS * (KEY == MIXED ? 4 : KEY == MIXED8 ? 8 : KEY), VALUE_CODES = 128 * SLABS * VALUE;
  static constexpr int KEY_FIELDS = Narrow::KEY_FIELDS, VALUE_FIELDS = Narrow::VALUE_FIELDS;
  static constexpr int KEY_BYTES = (KEY_CODES + KEY_FIELDS + 127) / 128 * 128, VALUE_BYTES = (VALUE_CODES + VALUE_FIELDS + 127) / 128 * 128;
  static constexpr bool FEW = BULK && !ORDERED && KEY < 4;  // registers: more warps, since decoding, not memory, takes the time
  static constexpr bool QUERIES_SHARED = Narrow::QUERIES_SHARED || ORDERED || (FEW && D > 64);
  static constexpr int KEY_ROOM = BULK ? KEY_BYTES : KEY_FIELDS, QUERIES_AT = KEY_ROOM + (BULK ? VALUE_BYTES : VALUE_FIELDS);
  static constexpr int BARRIERS_AT = QUERIES_AT + (QUERIES_SHARED ? 256 * SLABS : 0), STAGE = BARRIERS_AT + 16;
  static constexpr int KEY_FIELDS_AT = BULK ? KEY_CODES : 0, VALUE_FIELDS_AT = BULK ? VALUE_CODES : 0;
  static constexpr int RAW = BULK || (KEY < 4 && VALUE < 4) ? 4 : 8;
  static constexpr int TABLES = KEY == MIXED8 ? MIXED_TABLES + 65536 : KEY == MIXED ? MIXED_TABLES : 65536;
  static constexpr int MOST_WARPS = FEW ? 16 : KEY != MIXED8 && (BULK || D < 96) ? 12 : 8;  // as in src/cuda/attend.rs
};

// ---- a lane's codes of a slab: its planes one after the other, WIDTH words

// The width of the first plane: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2.
template <int WIDTH> struct Plane {
  static constexpr int first = WIDTH == 3 ? 2 : WIDTH == 5 || WIDTH == 6 ? 4 : WIDTH;
};

template <int PLANE> DEVICE void take_plane(uint32_t* w, uint32_t at) {
  const int lane = threadIdx.x & 31;
  if constexpr (PLANE == 1) {
    w[0] = load_one(at + 4 * lane);
  } else if constexpr (PLANE == 2) {
    const uint2 x = load_pair(at + 8 * lane);
    w[0] = x.x, w[1] = x.y;
  } else if constexpr (PLANE == 4) {
    const uint4 x = load_shared(at + 16 * lane);
    w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
  } else {
    // Eight lanes' 32 bytes would meet in half of the banks: every other four lanes begin with their last 16.
    const bool swap = lane & 4;
    const uint4 x = load_shared(at + 32 * lane + 16 * swap), y = load_shared(at + 32 * lane + 16 - 16 * swap);
    w[0] = swap ? y.x : x.x, w[1] = swap ? y.y : x.y, w[2] = swap ? y.z : x.z, w[3] = swap ? y.w : x.w;
    w[4] = swap ? x.x : y.x, w[5] = swap ? x.y : y.y, w[6] = swap ? x.z : y.z, w[7] = swap ? x.w : y.w;
  }
}
// From shared memory.
template <int WIDTH> DEVICE void take_slab(uint32_t (&w)[WIDTH], uint32_t at) {
  constexpr int first = Plane<WIDTH>::first;
  take_plane<first>(w, at);
  if constexpr (WIDTH > first) take_plane<WIDTH - first>(w + first, at + 128 * first);
}
// Slab J of a page in memory.
template <int WIDTH, int J> DEVICE void stream_slab(uint32_t* w, const uint8_t* half) {
  const int lane = threadIdx.x & 31;
  constexpr int first = Plane<WIDTH>::first, at = 128 * WIDTH * J;
  if constexpr (first == 2) load_once_2<at>(w, half + 8 * lane);
  if constexpr (first == 4) load_once<at>(*(uint32_t(*)[4])w, half + 16 * lane);
  if constexpr (first == 8) load_32<at>(w, half + 32 * lane);
  if constexpr (WIDTH - first == 1) load_once_1<at + 128 * first>(w + first, half + 4 * lane);
  if constexpr (WIDTH - first == 2) load_once_2<at + 128 * first>(w + first, half + 8 * lane);
}

// ---- codes to half2

// Bits of `x` where `mask` has ones, of `y` elsewhere.
DEVICE uint32_t blend(uint32_t mask, uint32_t x, uint32_t y) { return (x & mask) | (y & ~mask); }

// A byte of `word` as a row of the table at AT; 4 or 8 bytes for each lane.
template <int AT> DEVICE uint32_t row_of_byte(uint32_t word, int byte, uint32_t lane4) { return load_word<AT>(__byte_perm(word, lane4, 0x5504 | byte << 4)); }
template <int AT> DEVICE uint2 long_row_of_byte(uint32_t word, int byte, uint32_t lane4) {
  return load_words<AT>(__byte_perm(word, (lane4 & 60) * 2, 0x5504 | byte << 4));
}
// Both codes of a half2 by a row each, whose halves are equal.
template <int AT> DEVICE uint32_t joined(uint32_t low, uint32_t high, int low_byte, int high_byte, uint32_t lane4) {
  return __byte_perm(row_of_byte<AT>(low, low_byte, lane4), row_of_byte<AT>(high, high_byte, lane4), 0x7610);
}

// Two bits of each nibble of the 16 in `upper` and a nibble of the low plane: even codes (or pairs) of a word, then odd ones, a byte
// each. The upper two bits of a byte are some of `upper`'s.
DEVICE void spread(uint32_t& even, uint32_t& odd, uint32_t low, uint32_t upper, int half) {
  const uint32_t t = __byte_perm(upper, 0, half ? 0x3322 : 0x1100);
  even = blend(0x0f0f0f0f, low, blend(0x00ff00ff, t << 4, t));
  odd = blend(0x0f0f0f0f, low >> 4, blend(0x00ff00ff, t << 2, t >> 2));
}

// A operands of tile x of a lane's slab. AT: its table. SMALL: a table of mixed keys, with as few rows as there are codes or pairs.
template <int WIDTH, int AT, bool SMALL> DEVICE void decode(uint32_t (&r)[4], const uint32_t (&w)[WIDTH], int x, uint32_t lane4) {
  const int b = x % 2 * 2;
  if constexpr (WIDTH == 1) {
    const uint2 low = long_row_of_byte<AT>(w[0] & 0x0f0f0f0f, x, lane4), high = long_row_of_byte<AT>(w[0] >> 4 & 0x0f0f0f0f, x, lane4);
    r[0] = low.x, r[1] = low.y, r[2] = high.x, r[3] = high.y;
  } else if constexpr (WIDTH == 2 && !SMALL) {
    const uint2 low = long_row_of_byte<AT>(w[x / 2], b, lane4), high = long_row_of_byte<AT>(w[x / 2], b + 1, lane4);
    r[0] = low.x, r[1] = low.y, r[2] = high.x, r[3] = high.y;
  } else if constexpr (WIDTH == 2 || WIDTH == 3) {
    uint32_t even, odd;  // pairs
    if constexpr (WIDTH == 2) even = w[x / 2] & 0x0f0f0f0f, odd = w[x / 2] >> 4 & 0x0f0f0f0f;
    else spread(even, odd, w[x / 2], w[2], x / 2);
    if constexpr (WIDTH == 3 && SMALL) even &= 0x3f3f3f3f, odd &= 0x3f3f3f3f;
    r[0] = row_of_byte<AT>(even, b, lane4), r[1] = row_of_byte<AT>(odd, b, lane4);
    r[2] = row_of_byte<AT>(even, b + 1, lane4), r[3] = row_of_byte<AT>(odd, b + 1, lane4);
  } else if constexpr (WIDTH == 4) {
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = row_of_byte<AT>(w[x], i, lane4);
  } else if constexpr (WIDTH == 8) {
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = joined<AT>(w[2 * x + i / 2], w[2 * x + i / 2], i % 2 * 2, i % 2 * 2 + 1, lane4);
  } else {
    uint32_t even, odd;  // codes
    if constexpr (WIDTH == 6) {
      spread(even, odd, w[x], w[4 + x / 2], x % 2);
      even &= 0x3f3f3f3f, odd &= 0x3f3f3f3f;
    } else {
      const uint32_t t = __byte_perm(w[4], 0, 0x1111 * x);
      even = (w[x] & 0x0f0f0f0f) | (t << 4 & 0x10) | (t << 2 & 0x1000) | (t & 0x100000) | (t >> 2 & 0x10000000);
      odd = (w[x] >> 4 & 0x0f0f0f0f) | (t << 3 & 0x10) | (t << 1 & 0x1000) | (t >> 1 & 0x100000) | (t >> 3 & 0x10000000);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = joined<AT>(even, odd, i, i, lane4);
  }
}

template <int WIDTH, int AT, bool SMALL> DEVICE void multiply_tile(float (&c)[4], const uint32_t (&w)[WIDTH], int x, uint32_t lane4, uint32_t b0, uint32_t b1) {
  uint32_t r[4];
  decode<WIDTH, AT, SMALL>(r, w, x, lane4);
  mma(c, r[0], r[1], r[2], r[3], b0, b1);
}

// Codes of a page's half in shared memory, for `page_scores` and `add_page`.
template <int WIDTH, int SIDE> struct WideStaged {
  static constexpr int WORDS = WIDTH;
  uint32_t at;  // of the half
  template <int J> DEVICE void get(uint32_t (&w)[WIDTH]) const { take_slab<WIDTH>(w, at + 128 * WIDTH * J); }
  template <int J> DEVICE void used() const {}
  template <int> static DEVICE void multiply(float (&c)[4], const uint32_t (&w)[WIDTH], int x, uint32_t lane4, uint32_t b0, uint32_t b1) {
    multiply_tile<WIDTH, TABLE_AT + 128 * SIDE, false>(c, w, x, lane4, b0, b1);
  }
};
// Codes in registers; as a slab is used, one of what comes next takes its place, of NEXT bits.
template <class S, int WIDTH, int NEXT, int SIDE> struct WideStreamed {
  static constexpr int WORDS = WIDTH;
  Raw<S>& raw;
  const uint8_t* next;  // the half, or null
  template <int J> DEVICE void get(uint32_t (&w)[WIDTH]) const {
#pragma unroll
    for (int x = 0; x < WIDTH; x++) w[x] = raw.slab[J][x];
  }
  template <int J> DEVICE void used() const {
    if (next) stream_slab<NEXT, J>(raw.slab[J], next);
  }
  template <int> static DEVICE void multiply(float (&c)[4], const uint32_t (&w)[WIDTH], int x, uint32_t lane4, uint32_t b0, uint32_t b1) {
    multiply_tile<WIDTH, TABLE_AT + 128 * SIDE, false>(c, w, x, lane4, b0, b1);
  }
};

// Codes of a half, as they are there: staged at an address, or streamed, with the half that comes next or null.
template <class S, int SIDE> DEVICE auto staged(uint32_t half) {
  if constexpr (S::WIDE) return WideStaged<SIDE ? S::VALUE : S::KEY, SIDE>{half};
  else return Staged{half + (threadIdx.x & 31) * 16};
}
template <class S, int SIDE> DEVICE auto streamed(Raw<S>& raw, const uint8_t* next) {
  if constexpr (S::WIDE) return WideStreamed<S, SIDE ? S::VALUE : S::KEY, SIDE ? S::KEY : S::VALUE, SIDE>{raw, next};
  else return Streamed<S>{raw, next ? next + (threadIdx.x & 31) * 16 : nullptr};
}
template <class S> DEVICE void stream_keys(Raw<S>& raw, const uint8_t* half) {
  unrolled<S::SLABS>([&](auto j) { stream_slab<S::KEY, decltype(j)::value>(raw.slab[decltype(j)::value], half); });
}

// ---- mixed keys

// COUNT slabs of one width.
template <int WIDTH, int AT, class S>
DEVICE void mixed_slabs(float (&score)[4][4], float (&common)[4], const Queries<S>& q, int slabs, uint32_t& codes, uint32_t& fields, int& j, uint32_t lane4) {
#pragma unroll 1
  for (; slabs > 0; slabs--) {
    const uint4 f = load_shared(fields);
    const uint2 b = q.slab(j);
    mma(common, f.z, f.z, f.w, f.w, b.x, b.y);
    if constexpr (WIDTH > 0) {
      uint32_t w[WIDTH];
      take_slab<WIDTH>(w, codes);
      const uint32_t b0 = product(b.x, f.x), b1 = product(b.y, f.y);
#pragma unroll
      for (int x = 0; x < 4; x++) multiply_tile<WIDTH, AT, WIDTH != 4 && WIDTH != 8>(score[x], w, x, lane4, b0, b1);
    }
    codes += 128 * WIDTH, fields += 64, j++;
  }
}

// `page_scores` of keys with fields per channel, whose slabs have the widths that the arguments count.
template <class S> DEVICE void mixed_scores(float (&score)[4][4], const AttendArguments& a, Queries<S>& q, uint32_t keys, uint32_t lane4) {
  const int lane = threadIdx.x & 31;
  uint32_t fields = keys + a.key_codes, codes = keys;
#pragma unroll
  for (int x = 0; x < 4; x++) score[x][0] = score[x][1] = score[x][2] = score[x][3] = 0.f;
  q.fit(fields);
  fields += lane % 4 * 16;
  float common[4] = {0.f, 0.f, 0.f, 0.f};
  int j = 0;
  if constexpr (S::KEY == MIXED8) mixed_slabs<8, KEYS8>(score, common, q, a.key_slabs[0], codes, fields, j, lane4);
  mixed_slabs<6, KEYS6>(score, common, q, a.key_slabs[1], codes, fields, j, lane4);
  mixed_slabs<5, KEYS5>(score, common, q, a.key_slabs[2], codes, fields, j, lane4);
  mixed_slabs<4, KEYS4>(score, common, q, a.key_slabs[3], codes, fields, j, lane4);
  mixed_slabs<3, KEYS3>(score, common, q, a.key_slabs[4], codes, fields, j, lane4);
  mixed_slabs<2, KEYS2>(score, common, q, a.key_slabs[5], codes, fields, j, lane4);
  mixed_slabs<1, KEYS1>(score, common, q, a.key_slabs[6], codes, fields, j, lane4);
  mixed_slabs<0, 0>(score, common, q, a.key_slabs[7], codes, fields, j, lane4);
  const float c0 = common[0] * q.factor[0], c1 = common[1] * q.factor[1];
#pragma unroll
  for (int x = 0; x < 4; x++) {
    score[x][0] = fmaf(score[x][0], q.factor[0], c0), score[x][1] = fmaf(score[x][1], q.factor[1], c1);
    score[x][2] = fmaf(score[x][2], q.factor[0], c0), score[x][3] = fmaf(score[x][3], q.factor[1], c1);
  }
}

// 16 exact keys in stored order.
template <class S> DEVICE void load_ordered(const AttendArguments& a, Raw<S>& raw, const Item& x, int h) {
  const int t = threadIdx.x & 3;
  const Rows rows(x.keys, opaque(a.heads) * 2 * S::D, x.tokens());
  const uint8_t* const row = rows.from - 4 * t;
  const uint16_t* const order = order_of(a, h, S::D);
#pragma unroll
  for (int i = 0; i < 2 * S::SLABS; i++) {
    const uint32_t channels = channels_at(order, 8 * i + 2 * t);
    raw.slab[i / 2][i % 2 * 2] = rows.low ? gathered(row, channels) : 0;
    raw.slab[i / 2][i % 2 * 2 + 1] = rows.high ? gathered(row + rows.eight, channels) : 0;
  }
}

// ---- exact tokens by few registers: read twice, for their size and for their numbers, a slab at a time

DEVICE void exact_slab(uint32_t (&w)[4], const Rows& rows, int j) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t* const at = (const uint32_t*)(rows.from + (i % 2 ? rows.eight : 0) + 32 * j + i / 2 * 16);
    w[i] = (i % 2 ? rows.high : rows.low) ? __ldg(at) : 0;
  }
}
template <class S> DEVICE float largest_exact(const AttendArguments& a, const Rows& rows) {
  float top = 0.f;
#pragma unroll 2
  for (int j = 0; j < S::SLABS; j++) {
    uint32_t w[4];
    exact_slab(w, rows, j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = numbers(w[i], a.exact);
      top = fmaxf(top, fmaxf(fabsf(x.x), fabsf(x.y)));
    }
  }
  return top;
}
template <class S> DEVICE void exact_scores_again(float (&score)[4], const AttendArguments& a, const Queries<S>& q, const Rows& rows) {
  float top = largest_exact<S>(a, rows);
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  const int e = min(max(int(__float_as_uint(top) >> 23) - 126, -126), 126);
  const float down = power_of_two(-e), up = power_of_two(e);
  score[0] = score[1] = score[2] = score[3] = 0.f;
#pragma unroll
  for (int j = 0; j < S::SLABS; j++) {
    uint32_t k[4];
    exact_slab(k, rows, j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = numbers(k[i], a.exact);
      k[i] = pair_of(x.x * down, x.y * down);
    }
    const uint2 b = q.slab(j);
    mma(score, k[0], k[1], k[2], k[3], b.x, b.y);
  }
  score[0] *= q.factor[0] * up, score[1] *= q.factor[1] * up, score[2] *= q.factor[0] * up, score[3] *= q.factor[1] * up;
}
template <class S> DEVICE void add_exact_again(State<S>& state, const AttendArguments& a, const uint32_t (&weight)[2], const Rows& rows) {
  const uint32_t b0 = transposed(weight[0]), b1 = transposed(weight[1]);
  state.fit(largest_exact<S>(a, rows));
  const float down = power_of_two(-state.unit);
#pragma unroll
  for (int j = 0; j < S::SLABS; j++) {
    uint32_t v[4];
    exact_slab(v, rows, j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = numbers(v[i], a.exact);
      v[i] = transposed(pair_of(x.x * down, x.y * down));
    }
    mma(state.out[j], v[0], v[2], v[1], v[3], b0, b1);
  }
}

// ---- tables

// Codes of a row, and whether they are two (a word for a lane) or four (two words for each of 16).
template <int WIDTH, bool SMALL> DEVICE int code_in(int row, int i) {
  if (WIDTH == 1) return row >> i & 1;
  if (WIDTH == 2) return row >> 2 * i & 3;
  if (WIDTH == 3) return (row >> 2 * i & 3) | (row >> (4 + i) & 1) << 2;
  if (WIDTH == 4) return row >> 4 * i & 15;
  return row;
}

template <int WIDTH, bool SMALL, int ROWS> DEVICE void fill_rows(uint8_t* to, const Book& book) {
  const int most = __ldg(&book.levels) - 1;
  auto pair = [&](int row, int i) {
    uint32_t half[2];
#pragma unroll
    for (int k = 0; k < 2; k++) half[k] = __half_as_ushort(__float2half_rn(__ldg(book.level + min(code_in<WIDTH, SMALL>(row, i + k), most))));
    return half[0] | half[1] << 16;
  };
#pragma unroll 2
  for (int i = threadIdx.x; i < 8 * ROWS; i += blockDim.x) {
    const int row = i / 8;
    const uint32_t x = pair(row, 0);
    uint32_t y = x;
    if constexpr (WIDTH == 1 || (WIDTH == 2 && !SMALL)) y = pair(row, 2);
    *(uint4*)(to + 256 * row + i % 8 * 16) = make_uint4(x, y, x, y);
  }
}

template <class S> DEVICE void fill_wide(const AttendArguments& a, uint8_t* table) {
  const Codec* const codec = (const Codec*)a.codec;
  const Book *const keys = codec->side[0].book, *const values = codec->side[1].book;
  fill_rows<S::VALUE, false, 256>(table + 128, values[S::VALUE]);
  if constexpr (!S::ORDERED) {
    fill_rows<S::KEY, false, 256>(table, keys[S::KEY]);
  } else {
    uint8_t* const base = table - TABLE_AT;
    if (S::KEY == MIXED8 && a.key_slabs[0]) fill_rows<8, true, 256>(base + KEYS8, keys[8]);
    if (a.key_slabs[1]) fill_rows<6, true, 64>(base + KEYS6, keys[6]);
    if (a.key_slabs[2]) fill_rows<5, true, 32>(base + KEYS5, keys[5]);
    if (a.key_slabs[3]) fill_rows<4, true, 256>(base + KEYS4, keys[4]);
    if (a.key_slabs[4]) fill_rows<3, true, 64>(base + KEYS3, keys[3]);
    if (a.key_slabs[5]) fill_rows<2, true, 16>(base + KEYS2, keys[2]);
    if (a.key_slabs[6]) fill_rows<1, true, 16>(base + KEYS1, keys[1]);
  }
}

}  // namespace nqkv
