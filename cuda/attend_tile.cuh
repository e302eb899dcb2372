// The numbers of a tile: scores of 64 packed or 16 exact tokens for 8 columns, and what the values add, on tensor cores.
//
// A column is a query of a query head. A operands are keys (tokens x channels) and transposed values (channels x tokens); B
// operands are columns. Lane 4 g + t holds column g of B, and tokens (or channels) g and g + 8 of columns 2 t and 2 t + 1 of a
// result. A page's 16 bytes of a lane are the A operands of four tiles of 16 tokens, once a table has made half2 of each byte.
#pragma once
#include "attend.cuh"

namespace nqkv {

// Byte of codes -> half2: row `byte` has 256 bytes, keys' copy for each lane in the first 128, values' in the others. One prmt
// makes the address, byte BYTE of a word above the lane's offset; the table's own address is part of the instruction.
template <int BYTE, int SIDE> DEVICE uint32_t decoded(uint32_t word, uint32_t lane4) {
  return load_word<TABLE_AT + 128 * SIDE>(__byte_perm(word, lane4, 0x5504 | BYTE << 4));
}

template <int SIDE> DEVICE void multiply_codes(float (&c)[4], uint32_t word, uint32_t lane4, uint32_t b0, uint32_t b1) {
  mma(c, decoded<0, SIDE>(word, lane4), decoded<1, SIDE>(word, lane4), decoded<2, SIDE>(word, lane4), decoded<3, SIDE>(word, lane4), b0, b1);
}

// What weights times zero points of values sum up to, in this lane's columns.
template <bool> struct Zeros {};
template <> struct Zeros<true> {
  float zero[2];
};

// Running state of a warp's columns 2 t and 2 t + 1. `sum` is this lane's part. Results are in units of 2^unit, so that fp16
// weights times scales neither overflow nor vanish.
template <class S> struct State : Zeros<S::GROUPED> {
  float out[S::SLABS][4];
  float most[2], sum[2];
  int unit;
  DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < S::SLABS; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.f;
    if constexpr (S::GROUPED) this->zero[0] = this->zero[1] = 0.f;
    most[0] = most[1] = NOTHING, sum[0] = sum[1] = 0.f, unit = -15;
  }
  DEVICE void rescale(float f0, float f1) {
#pragma unroll
    for (int j = 0; j < S::SLABS; j++) out[j][0] *= f0, out[j][1] *= f1, out[j][2] *= f0, out[j][3] *= f1;
    if constexpr (S::GROUPED) this->zero[0] *= f0, this->zero[1] *= f1;
  }
  // Room for values of size `top` in some lane.
  DEVICE void fit(float top) {
    if (!__any_sync(~0u, top > power_of_two(unit))) return;
#pragma unroll
    for (int x = 1; x < 32; x <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
    // 2^16 is above every fp16 number.
    const int next = min(int(__float_as_uint(top) >> 23) - 126, 16);
    const float f = power_of_two(max(unit - next, -126));
    rescale(f, f);
    unit = next;
  }
};

// Channels of head h in stored order, as 16-bit numbers; null if that is the model's.
DEVICE const uint16_t* order_of(const AttendArguments& a, int h, int dim) {
  return a.ordered ? (const uint16_t*)((const Codec*)a.codec + 1) + h * dim : nullptr;
}
// The channels at stored places c and c + 1; and numbers of a row there.
DEVICE uint32_t channels_at(const uint16_t* order, int c) { return order ? __ldg((const uint32_t*)(order + c)) : uint32_t(c) | uint32_t(c + 1) << 16; }
DEVICE uint32_t gathered(const uint8_t* row, uint32_t channels) {
  const uint16_t* const x = (const uint16_t*)row;
  return uint32_t(__ldg(x + (channels & 0xffff))) | uint32_t(__ldg(x + (channels >> 16))) << 16;
}

// The largest magnitude of N pairs, in a lane.
template <int N> DEVICE float largest(const uint32_t (&pair)[N], int dtype) {
  // Pairs stay pairs: as many floats would fill the registers.
  uint32_t top = 0;
  if (dtype == F16) {
#pragma unroll
    for (int i = 0; i < N; i++) top = bits(__hmax2(halves(top), __habs2(halves(pair[i]))));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t word = pair[i] & 0x7fff7fff;
      const __nv_bfloat162 most = __hmax2(*(const __nv_bfloat162*)&top, *(const __nv_bfloat162*)&word);
      top = *(const uint32_t*)&most;
    }
  }
  const float2 x = numbers(top, dtype);
  return fmaxf(x.x, x.y);
}

// Queries of 8 columns as B operands. Each column is multiplied by a power of two, so that its largest number is in
// [0.5, 1) * 2^14: then products with a page's scales neither vanish in fp16 for scales down to 1e-6, nor overflow for scales below
// 2. Where a page has larger ones, the column comes down to [0.5, 1) and stays there.
constexpr int LIFT = 14;

// The slabs where the first block of a token ends, in this head's keys and values; at or beyond the last one's end if none does.
template <bool> struct Ends {
  DEVICE void find(const AttendArguments&, int) {}
};
template <> struct Ends<true> {
  int end[2];
  DEVICE void find(const AttendArguments& a, int h) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int block = opaque(a.key_slabs[side]);
      end[side] = block - int(unsigned(h * a.key_slabs[2 + side]) % unsigned(block));
    }
  }
};

template <class S> struct Queries : Ends<S::SPLIT> {
  uint32_t b[S::SLABS][2];  // on their way to shared memory, if they are kept there
  uint32_t shared;          // this lane's place there
  float factor[2];  // of the scores of this lane's two columns, log2(e) included
  bool lifted;
  DEVICE uint2 slab(int j) const {
    if constexpr (S::QUERIES_SHARED) return load_pair(shared + 256 * j);
    else return make_uint2(b[j][0], b[j][1]);
  }
  // Begins to load column `first` and those after it, of head h; `prepare` ends it.
  DEVICE void fetch(const AttendArguments& a, int sequence, int h, int first) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4, c = first + g, group = opaque(a.group);
    const bool have = c < S::queries(a) * group;
    const int query = S::queries(a) == 1 ? 0 : c / group, head = h * group + c - query * group;
    this->find(a, h);
    const uint8_t* from = a.q + opaque(sequence) * a.q_stride[0] + head * a.q_stride[1] + query * a.q_stride[2] + 4 * t;
    if constexpr (S::ORDERED) gather(have, order_of(a, h, S::D), from - 4 * t);
    else follow(have, from);
  }
  DEVICE void follow(bool have, const uint8_t* from) {
#pragma unroll
    for (int j = 0; j < S::SLABS; j++) {
      b[j][0] = have ? __ldg((const uint32_t*)(from + 32 * j)) : 0;
      b[j][1] = have ? __ldg((const uint32_t*)(from + 32 * j + 16)) : 0;
    }
  }
  // The same, with channels in an order of their own.
  DEVICE void gather(bool have, const uint16_t* order, const uint8_t* row) {
#pragma unroll
    for (int i = 0; i < 2 * S::SLABS; i++) b[i / 2][i % 2] = have ? gathered(row, channels_at(order, 8 * i + 2 * (threadIdx.x & 3))) : 0;
  }
  DEVICE void prepare(const AttendArguments& a) {
    const int t = opaque(threadIdx.x) & 3;
    float top = largest((const uint32_t(&)[2 * S::SLABS])b, S::q_dtype(a));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const int e = min(max(int(__float_as_uint(top) >> 23) - 126, -112), 126), lift = S::PER_TOKEN ? 0 : LIFT;
    const float down = power_of_two(lift - e);
#pragma unroll
    for (int j = 0; j < 2 * S::SLABS; j++) {
      const float2 x = numbers(b[j / 2][j % 2], S::q_dtype(a));
      b[j / 2][j % 2] = pair_of(x.x * down, x.y * down);
    }
    if constexpr (S::QUERIES_SHARED) {
#pragma unroll
      for (int j = 0; j < S::SLABS; j++) store_pair(shared + 256 * j, make_uint2(b[j][0], b[j][1]));
    }
    lifted = !S::PER_TOKEN;
    const float whole = power_of_two(e) * a.scale * (LOG2E * power_of_two(-lift));
    factor[0] = __shfl_sync(~0u, whole, 8 * t), factor[1] = __shfl_sync(~0u, whole, 8 * t + 4);
  }
  DEVICE void lower() {
    const uint32_t down = bits(__float2half2_rn(power_of_two(-LIFT)));
#pragma unroll
    for (int j = 0; j < S::SLABS; j++) {
      const uint2 x = slab(j);
      const uint2 y = make_uint2(product(x.x, down), product(x.y, down));
      if constexpr (S::QUERIES_SHARED) store_pair(shared + 256 * j, y);
      else b[j][0] = y.x, b[j][1] = y.y;
    }
    factor[0] *= power_of_two(LIFT), factor[1] *= power_of_two(LIFT), lifted = false;
  }
  // Comes down if a page's scales ask for it. 16 bytes of fields hold the scales and means of four channels: together the lanes look
  // at all. From 2 on, bit 14 of a half is set.
  DEVICE void fit(uint32_t fields) {
    if (!lifted) return;
    const int lane = threadIdx.x & 31;
    uint32_t large = 0;
#pragma unroll
    for (int i = 0; i < S::KEY_FIELDS / 16; i += 32) {
      const uint4 f = load_shared(fields + min(i + lane, S::KEY_FIELDS / 16 - 1) * 16);
      large |= f.x | f.y;
    }
    if (__any_sync(~0u, large & 0x40004000)) lower();
  }
};

// Codes, or exact numbers, of one side of a tile, on their way from memory: as many as a lane's registers hold. A slab is read
// again as soon as it is used, for the side that comes next.
template <class S> struct Raw {
  uint32_t slab[S::SLABS][S::RAW];
  // The largest magnitude of exact numbers.
  DEVICE float largest(int dtype) const {
    uint32_t pair[4 * S::SLABS];
#pragma unroll
    for (int i = 0; i < 4 * S::SLABS; i++) pair[i] = slab[i / 4][i % 4];
    return nqkv::largest(pair, dtype);
  }
  // Of a page: each lane 16 bytes.
  template <int J> DEVICE void page(const uint8_t* from) { load_once<512 * J>(slab[J], from); }
  // Of 16 exact tokens: pairs of channels of tokens g and g + 8. Zeros beyond the count.
  template <int J> DEVICE void exact(const uint8_t* from, long long eight, bool low, bool high) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t* at = (const uint32_t*)(from + (i % 2 ? eight : 0) + 32 * J + i / 2 * 16);
      slab[J][i] = (i % 2 ? high : low) ? __ldg(at) : 0;
    }
  }
};

// Where a lane's exact numbers stand, and which rows there are.
struct Rows {
  const uint8_t* from;
  long long eight;
  bool low, high;
  DEVICE Rows(const uint8_t* base, int row_bytes, int count) {
    const int lane = threadIdx.x & 31, g = lane / 4;
    from = base + (long long)g * row_bytes + lane % 4 * 4, eight = 8ll * row_bytes;
    low = g < count, high = g + 8 < count;
  }
};

template <class S> DEVICE void load_exact(Raw<S>& raw, const Rows& rows) {
  unrolled<S::SLABS>([&](auto j) { raw.template exact<decltype(j)::value>(rows.from, rows.eight, rows.low, rows.high); });
}
template <class S> DEVICE void load_page(Raw<S>& raw, const uint8_t* codes) {
  unrolled<S::SLABS>([&](auto j) { raw.template page<decltype(j)::value>(codes); });
}

// Codes of a page's half in shared memory.
struct Staged {
  static constexpr int WORDS = 4;
  uint32_t at;  // this lane's 16 bytes of slab 0
  template <int J> DEVICE void get(uint32_t (&w)[4]) const {
    const uint4 x = load_shared(at + 512 * J);
    w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
  }
  template <int J> DEVICE void used() const {}
  template <int SIDE> static DEVICE void multiply(float (&c)[4], const uint32_t (&w)[4], int x, uint32_t lane4, uint32_t b0, uint32_t b1) {
    multiply_codes<SIDE>(c, w[x], lane4, b0, b1);
  }
};
// Codes in registers; as a slab is used, one of what comes next takes its place.
template <class S> struct Streamed {
  static constexpr int WORDS = 4;
  Raw<S>& raw;
  const uint8_t* next;  // this lane's 16 bytes of slab 0, or null
  template <int J> DEVICE void get(uint32_t (&w)[4]) const {
#pragma unroll
    for (int x = 0; x < 4; x++) w[x] = raw.slab[J][x];
  }
  template <int J> DEVICE void used() const {
    if (next) raw.template page<J>(next);
  }
  template <int SIDE> static DEVICE void multiply(float (&c)[4], const uint32_t (&w)[4], int x, uint32_t lane4, uint32_t b0, uint32_t b1) {
    multiply_codes<SIDE>(c, w[x], lane4, b0, b1);
  }
};

// Adds slab J of a page, times columns: of its keys to the scores of each tile, of its values to results.
template <int J, class C> DEVICE void multiply_keys(float (&score)[4][4], const C& codes, uint32_t lane4, uint32_t b0, uint32_t b1) {
  uint32_t w[C::WORDS];
  codes.template get<J>(w);
#pragma unroll
  for (int x = 0; x < 4; x++) C::template multiply<0>(score[x], w, x, lane4, b0, b1);
  codes.template used<J>();
}
template <int J, class C> DEVICE void multiply_values(float (&out)[4], const C& codes, uint32_t lane4, const uint32_t (&b)[8]) {
  uint32_t w[C::WORDS];
  codes.template get<J>(w);
#pragma unroll
  for (int x = 0; x < 4; x++) C::template multiply<1>(out, w, x, lane4, b[2 * x], b[2 * x + 1]);
  codes.template used<J>();
}

// Dot products with a page's 64 tokens: [tile of 16][token g, columns; token g + 8, columns]. `fields` are in shared memory.
template <class S, class C> DEVICE void page_scores(float (&score)[4][4], Queries<S>& q, const C& codes, uint32_t fields, uint32_t lane4) {
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int x = 0; x < 4; x++) score[x][0] = score[x][1] = score[x][2] = score[x][3] = 0.f;
  if constexpr (S::PER_TOKEN) {
    unrolled<S::SLABS>([&](auto index) {
      constexpr int j = decltype(index)::value;
      const uint2 b = q.slab(j);
      multiply_keys<j>(score, codes, lane4, b.x, b.y);
    });
    const uint4 s = load_shared(fields + g * 16);  // tokens g and g + 8 of each tile
#pragma unroll
    for (int x = 0; x < 4; x++) {
      const float2 f = __half22float2(halves(x == 0 ? s.x : x == 1 ? s.y : x == 2 ? s.z : s.w));
      score[x][0] *= q.factor[0] * f.x, score[x][1] *= q.factor[1] * f.x, score[x][2] *= q.factor[0] * f.y, score[x][3] *= q.factor[1] * f.y;
    }
  } else {
    q.fit(fields);
    float common[4] = {0.f, 0.f, 0.f, 0.f};  // every row is the means' dot product
    unrolled<S::SLABS>([&](auto index) {
      constexpr int j = decltype(index)::value;
      uint32_t w[C::WORDS];
      codes.template get<j>(w);
      const uint4 f = load_shared(fields + j * 64 + t * 16);
      const uint2 b = q.slab(j);
      mma(common, f.z, f.z, f.w, f.w, b.x, b.y);
      const uint32_t b0 = product(b.x, f.x), b1 = product(b.y, f.y);
#pragma unroll
      for (int x = 0; x < 4; x++) C::template multiply<0>(score[x], w, x, lane4, b0, b1);
      codes.template used<j>();
    });
    const float c0 = common[0] * q.factor[0], c1 = common[1] * q.factor[1];
#pragma unroll
    for (int x = 0; x < 4; x++) {
      score[x][0] = fmaf(score[x][0], q.factor[0], c0), score[x][1] = fmaf(score[x][1], q.factor[1], c1);
      score[x][2] = fmaf(score[x][2], q.factor[0], c0), score[x][3] = fmaf(score[x][3], q.factor[1], c1);
    }
  }
}

// The same with 16 exact tokens, divided by a power of two that makes them fit fp16.
template <class S> DEVICE void exact_scores(float (&score)[4], const AttendArguments& a, const Queries<S>& q, const Raw<S>& raw) {
  float top = raw.largest(S::exact(a));
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  const int e = min(max(int(__float_as_uint(top) >> 23) - 126, -126), 126);
  const float down = power_of_two(-e), up = power_of_two(e);
  score[0] = score[1] = score[2] = score[3] = 0.f;
#pragma unroll
  for (int j = 0; j < S::SLABS; j++) {
    uint32_t k[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = numbers(raw.slab[j][i], S::exact(a));
      k[i] = pair_of(x.x * down, x.y * down);
    }
    const uint2 b = q.slab(j);
    mma(score, k[0], k[1], k[2], k[3], b.x, b.y);
  }
  score[0] *= q.factor[0] * up, score[1] *= q.factor[1] * up, score[2] *= q.factor[0] * up, score[3] *= q.factor[1] * up;
}

// Soft cap: cap * tanh(score / cap), to a few 1e-7 of the cap. Scores hold a factor log2(e).
template <int N> DEVICE void cap_scores(float (&score)[N][4], float cap) {
  const float inverse = __fdiv_rn(2.f, cap), whole = cap * LOG2E;
#pragma unroll
  for (int i = 0; i < 4 * N; i++) {
    float& x = score[i / 4][i % 4];
    x = whole * (1.f - __fdividef(2.f, 1.f + exp2_of(x * inverse)));
  }
}

// Scores to weights: the running maximum follows lazily, only when it grows by more than 2^8. N tiles of 16 tokens.
template <class S, int N> DEVICE void weigh(uint32_t (&weight)[2 * N], float (&score)[N][4], State<S>& state) {
  float n0 = state.most[0], n1 = state.most[1];
#pragma unroll
  for (int x = 0; x < N; x++) n0 = fmaxf(n0, fmaxf(score[x][0], score[x][2])), n1 = fmaxf(n1, fmaxf(score[x][1], score[x][3]));
  if (__any_sync(~0u, n0 > state.most[0] + 8.f || n1 > state.most[1] + 8.f)) {
#pragma unroll
    for (int x = 4; x < 32; x <<= 1) n0 = fmaxf(n0, __shfl_xor_sync(~0u, n0, x)), n1 = fmaxf(n1, __shfl_xor_sync(~0u, n1, x));
    const float f0 = exp2_of(state.most[0] - n0), f1 = exp2_of(state.most[1] - n1);
    state.most[0] = n0, state.most[1] = n1, state.sum[0] *= f0, state.sum[1] *= f1;
    state.rescale(f0, f1);
  }
#pragma unroll
  for (int x = 0; x < N; x++) {
    const float p0 = exp2_of(score[x][0] - state.most[0]), p1 = exp2_of(score[x][1] - state.most[1]);
    const float p2 = exp2_of(score[x][2] - state.most[0]), p3 = exp2_of(score[x][3] - state.most[1]);
    state.sum[0] += p0 + p2, state.sum[1] += p1 + p3;
    weight[2 * x] = pair_of(p0, p1), weight[2 * x + 1] = pair_of(p2, p3);
  }
}

// Scales of a page's values for tokens g, g + 8, g + 16, ... : BLOCKS halves each.
template <class S> struct Scales {
  uint32_t word[4 * S::BLOCKS];
  DEVICE void load(uint32_t fields, int count) {
    const int g = (threadIdx.x & 31) / 4;
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++) {
      const uint4 s = load_shared(fields + g * 16 * S::BLOCKS + 16 * i);
      word[4 * i] = s.x, word[4 * i + 1] = s.y, word[4 * i + 2] = s.z, word[4 * i + 3] = s.w;
    }
    if (count < PAGE_TOKENS) {
      // What stands at slots beyond the count may be a NaN.
#pragma unroll
      for (int i = 0; i < 8 * S::BLOCKS; i++)
        if (i / S::BLOCKS * 8 + g >= count) word[i / 2] &= i % 2 ? 0xffff : 0xffff0000;
    }
  }
};

// Fields of a page's values in units of the results', which make room for them.
template <class S, int N> DEVICE void into_unit(State<S>& state, uint32_t (&fields)[N]) {
  __half2 top = __habs2(halves(fields[0]));
#pragma unroll
  for (int i = 1; i < N; i++) top = __hmax2(top, __habs2(halves(fields[i])));
  state.fit(fmaxf(__low2float(top), __high2float(top)));
  const uint32_t down = bits(__float2half2_rn(power_of_two(-state.unit)));
#pragma unroll
  for (int i = 0; i < N; i++) fields[i] = product(fields[i], down);
}

// Adds a page's values.
template <class S, class C> DEVICE void add_page(State<S>& state, const uint32_t (&weight)[8], const C& codes, Scales<S>& scale, uint32_t lane4) {
  constexpr int BLOCKS = S::BLOCKS;
  into_unit(state, scale.word);
  uint32_t b[8];
  unrolled<S::SLABS>([&](auto index) {
    constexpr int j = decltype(index)::value, block = j / S::BLOCK;
    if constexpr (j % S::BLOCK == 0) {
#pragma unroll
      for (int x = 0; x < 8; x++) {
        const int i = x * BLOCKS + block;
        b[x] = transposed(product(weight[x], __byte_perm(scale.word[i / 2], 0, i % 2 ? 0x3232 : 0x1010)));
      }
    }
    multiply_values<j>(state.out[j], codes, lane4, b);
  });
}

// Adds 16 exact values: those beyond the count are zeros.
template <class S> DEVICE void add_exact(State<S>& state, const AttendArguments& a, const uint32_t (&weight)[2], const Raw<S>& raw) {
  const uint32_t b0 = transposed(weight[0]), b1 = transposed(weight[1]);
  state.fit(raw.largest(S::exact(a)));
  const float down = power_of_two(-state.unit);
#pragma unroll
  for (int j = 0; j < S::SLABS; j++) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 x = numbers(raw.slab[j][i], S::exact(a));
      v[i] = transposed(pair_of(x.x * down, x.y * down));
    }
    // Tokens are rows as they come, columns once transposed.
    mma(state.out[j], v[0], v[2], v[1], v[3], b0, b1);
  }
}

}  // namespace nqkv
