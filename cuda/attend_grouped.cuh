// Decode attention on pages with zero points: keys with a scale and a zero point for each channel and GROUP of tokens, values with both
// for each token and block of 32 channels.
//
// Keys' zero points of both groups are rows of one more mma a slab. Values' zero points are the same for a block of channels: weights
// times them are one number of a block and column, summed up by one more mma for 16 tokens, whose rows are fields of a token.
#pragma once
#include "attend_widths.cuh"

namespace nqkv {

constexpr int GROUP = 32;  // tokens

// As Shape or Wide, with more bytes of fields.
template <class Base, int KEY_FIELDS_, int VALUE_FIELDS_> struct WithFields : Base {
  static constexpr int KEY_FIELDS = KEY_FIELDS_, VALUE_FIELDS = VALUE_FIELDS_;
  static constexpr int KEY_BYTES = (Base::KEY_CODES + KEY_FIELDS + 127) / 128 * 128, VALUE_BYTES = (Base::VALUE_CODES + VALUE_FIELDS + 127) / 128 * 128;
  static constexpr int KEY_ROOM = Base::BULK ? KEY_BYTES : KEY_FIELDS, QUERIES_AT = KEY_ROOM + (Base::BULK ? VALUE_BYTES : VALUE_FIELDS);
  static constexpr int BARRIERS_AT = QUERIES_AT + (Base::QUERIES_SHARED ? 256 * Base::SLABS : 0), STAGE = BARRIERS_AT + 16;
};

// Blocks of two slabs.
template <class Base> struct Grouped : WithFields<Base, PAGE_TOKENS / GROUP * Base::KEY_FIELDS, 2 * Base::VALUE_FIELDS> {
  static_assert(!Base::PER_TOKEN && Base::BLOCK == 2 && (Base::BLOCKS == 2 || Base::BLOCKS == 4), "head size 64 or 128");
  static constexpr bool GROUPED = true;
  static constexpr bool FEW = Base::FEW || (Base::BULK && !Base::PLAIN && Base::D == 128);  // registers, for exact tokens
};

// `page_scores`. Tiles 0 and 1 are the first group's.
template <class S, class C> DEVICE void grouped_scores(float (&score)[4][4], Queries<S>& q, const C& codes, uint32_t fields, uint32_t lane4) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int x = 0; x < 4; x++) score[x][0] = score[x][1] = score[x][2] = score[x][3] = 0.f;
  q.fit(fields);
  float common[4] = {0.f, 0.f, 0.f, 0.f};  // rows 0 to 7 are the first group's zero points, 8 to 15 the second's
  unrolled<S::SLABS>([&](auto index) {
    constexpr int j = decltype(index)::value;
    uint32_t w[C::WORDS];
    codes.template get<j>(w);
    const uint4 f = load_shared(fields + j * 64 + t * 16), h = load_shared(fields + S::KEY_FIELDS / 2 + j * 64 + t * 16);
    const uint2 b = q.slab(j);
    mma(common, f.z, h.z, f.w, h.w, b.x, b.y);
    const uint32_t b0[2] = {product(b.x, f.x), product(b.x, h.x)}, b1[2] = {product(b.y, f.y), product(b.y, h.y)};
#pragma unroll
    for (int x = 0; x < 4; x++) C::template multiply<0>(score[x], w, x, lane4, b0[x / 2], b1[x / 2]);
    codes.template used<j>();
  });
#pragma unroll
  for (int i = 0; i < 4; i++) common[i] *= q.factor[i % 2];
#pragma unroll
  for (int x = 0; x < 4; x++) {
#pragma unroll
    for (int i = 0; i < 4; i++) score[x][i] = fmaf(score[x][i], q.factor[i % 2], common[x / 2 * 2 + i % 2]);
  }
}

// Scales and zero points of a page's values as A operands: rows are the fields of a token, columns tokens. Lane 4 g + t has field g of
// tokens 2 t and 2 t + 1 of every 8; with two blocks four fields of these 8, then of the next.
template <class S> struct GroupedFields {
  static constexpr int WORDS = 2 * S::BLOCKS;
  uint32_t word[WORDS];
  DEVICE void load(uint32_t fields, int count) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4, row = lane % 8, matrix = lane / 8;
    if constexpr (S::BLOCKS == 2) {
      const uint4 x = load_transposed(fields + 64 * row + 16 * matrix);
      word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
    } else {
      // Rows of a matrix are 128 bytes apart, in the same banks: each takes its row of another 8 tokens, and lanes put them right.
      const int place = matrix ^ row;
      const uint4 x = load_transposed(fields + 128 * row + 16 * place), y = load_transposed(fields + 128 * row + 16 * (place ^ 4));
      const uint32_t a[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
      uint32_t b[8], c[8];
#pragma unroll
      for (int i = 0; i < 8; i++) b[i] = t & 1 ? a[i ^ 2] : a[i];
#pragma unroll
      for (int i = 0; i < 8; i++) c[i] = t & 2 ? b[i ^ 4] : b[i];
#pragma unroll
      for (int i = 0; i < 8; i++) word[i] = __byte_perm(c[i], c[i ^ 1], 0x7610);
    }
    if (count < PAGE_TOKENS) {
      // What stands at slots beyond the count may be a NaN.
#pragma unroll
      for (int i = 0; i < WORDS; i++) {
        const int token = (S::BLOCKS == 2 ? 16 * i + g / 4 * 8 : 8 * i) + 2 * t;
        word[i] &= token + 1 < count ? ~0u : token < count ? 0xffff : 0;
      }
    }
  }
  // Scales of a block for tokens 2 t and 2 t + 1 of the i-th 8.
  template <int I, int BLOCK> DEVICE uint32_t scale() const {
    if constexpr (S::BLOCKS == 2) return of_row<I % 2 * 4 + BLOCK>(word[I / 2]);
    else return of_row<BLOCK>(word[I]);
  }
};

// Adds a page's values.
template <class S, class C> DEVICE void add_page(State<S>& state, const uint32_t (&weight)[8], const C& codes, GroupedFields<S>& fields, uint32_t lane4) {
  into_unit(state, fields.word);
  uint32_t p[8], b[8];
#pragma unroll
  for (int i = 0; i < 8; i++) p[i] = transposed(weight[i]);
  float zero[4] = {state.zero[0], state.zero[1], 0.f, 0.f};
  const bool first = (threadIdx.x & 31) < 16;
#pragma unroll
  for (int x = 0; x < 4; x++) {
    // With two blocks, rows 0 to 3 are of the first 8 tokens, 4 to 7 of the other 8.
    if constexpr (S::BLOCKS == 2) mma(zero, first ? fields.word[x] : 0, 0, first ? 0 : fields.word[x], 0, p[2 * x], p[2 * x + 1]);
    else mma(zero, fields.word[2 * x], 0, fields.word[2 * x + 1], 0, p[2 * x], p[2 * x + 1]);
  }
  state.zero[0] = zero[0], state.zero[1] = zero[1];
  unrolled<S::SLABS>([&](auto index) {
    constexpr int j = decltype(index)::value;
    if constexpr (j % S::BLOCK == 0) {
      unrolled<8>([&](auto of) {
        constexpr int i = decltype(of)::value;
        b[i] = product(p[i], fields.template scale<i, j / S::BLOCK>());
      });
    }
    multiply_values<j>(state.out[j], codes, lane4, b);
  });
}

// At the end of a unit: zero points to the channels of their block.
template <class S> DEVICE void add_zeros(State<S>& state) {
  unrolled<S::BLOCKS>([&](auto index) {
    constexpr int block = decltype(index)::value;
    float zero[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      zero[i] = __uint_as_float(of_row<S::BLOCKS + block>(__float_as_uint(state.zero[i])));
      if constexpr (S::BLOCKS == 2) zero[i] += __uint_as_float(of_row<6 + block>(__float_as_uint(state.zero[i])));
    }
#pragma unroll
    for (int j = block * S::BLOCK; j < (block + 1) * S::BLOCK; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) state.out[j][i] += zero[i % 2];
    }
  });
}

}  // namespace nqkv
