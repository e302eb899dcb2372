// Decode attention on pages with two scales of a token: a block of channels ends inside the head, at a slab that depends on the head
// where blocks span heads. There scores go over from units of the first scale to units of the second, and to weights times the second.
#pragma once
#include "attend_grouped.cuh"

namespace nqkv {

// As Shape, with one scale for each token and block of both sides.
template <int D_, bool BULK_, int TYPE_ = 0>
struct Split : WithFields<Shape<D_, true, (D_ / SLAB_CHANNELS + 1) / 2, BULK_, TYPE_>, 4 * PAGE_TOKENS, 4 * PAGE_TOKENS> {
  static constexpr bool SPLIT = true;
  static constexpr int MOST_WARPS = BULK_ || D_ == 64 ? 12 : 8;  // as in src/cuda/attend.rs
};

constexpr float NO_SCALE = 0x1p-48f;  // stands for a scale of 0: below all others

// `page_scores`. Scores are in units of the scale of the block at hand.
template <class S, class C> DEVICE void split_scores(float (&score)[4][4], const Queries<S>& q, const C& codes, uint32_t fields, uint32_t lane4) {
  // Multiplied by f of both scales of tokens g, g + 8, ...: read where they are needed, not held in registers.
  const auto scaled = [&](auto&& f) {
    const int g = (threadIdx.x & 31) / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 s = load_shared(fields + g * 32 + half * 16);
      const uint32_t scale[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float by = f(__half22float2(halves(scale[i])));
        score[2 * half + i / 2][i % 2 * 2] *= by, score[2 * half + i / 2][i % 2 * 2 + 1] *= by;
      }
    }
  };
#pragma unroll
  for (int x = 0; x < 4; x++) score[x][0] = score[x][1] = score[x][2] = score[x][3] = 0.f;
  unrolled<S::SLABS>([&](auto index) {
    constexpr int j = decltype(index)::value;
    if (j > 0 && j == q.end[0]) scaled([](float2 s) { return __fdividef(s.x, s.y == 0.f ? NO_SCALE : s.y); });
    const uint2 b = q.slab(j);
    multiply_keys<j>(score, codes, lane4, b.x, b.y);
  });
  const bool two = q.end[0] < S::SLABS;
  scaled([&](float2 s) { return !two ? s.x : s.y == 0.f ? NO_SCALE : s.y; });
#pragma unroll
  for (int i = 0; i < 16; i++) score[i / 4][i % 4] *= q.factor[i % 2];
}

// Both scales of a page's values, and the slab where the first block ends.
template <class S> struct SplitScales : Scales<S> {
  int end;
};

// Adds a page's values.
template <class S, class C> DEVICE void add_page(State<S>& state, const uint32_t (&weight)[8], const C& codes, SplitScales<S>& scale, uint32_t lane4) {
  static_assert(S::BLOCKS == 2, "two scales");
  // In a head that no block ends in, the second scale is another head's.
  const uint32_t mask = scale.end < S::SLABS ? ~0u : 0xffff;
  __half2 top = __habs2(halves(scale.word[0] & mask));
#pragma unroll
  for (int i = 1; i < 8; i++) top = __hmax2(top, __habs2(halves(scale.word[i] & mask)));
  state.fit(fmaxf(__low2float(top), __high2float(top)));
  const uint32_t down = bits(__float2half2_rn(power_of_two(-state.unit)));
  uint32_t b[8], second[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t both = product(scale.word[i] & mask, down);
    b[i] = transposed(product(weight[i], __byte_perm(both, 0, 0x1010))), second[i] = transposed(product(weight[i], __byte_perm(both, 0, 0x3232)));
  }
  unrolled<S::SLABS>([&](auto index) {
    constexpr int j = decltype(index)::value;
    if (j > 0 && j == scale.end) {
#pragma unroll
      for (int i = 0; i < 8; i++) b[i] = second[i];
    }
    multiply_values<j>(state.out[j], codes, lane4, b);
  });
}

// ---- what a kernel calls

template <class S> DEVICE auto fields_of_values(const Queries<S>& q) {
  if constexpr (S::GROUPED) return GroupedFields<S>();
  else if constexpr (S::SPLIT) {
    SplitScales<S> scale;
    scale.end = q.end[1];
    return scale;
  } else return Scales<S>();
}

template <class S, class C> DEVICE void scores_of(float (&score)[4][4], Queries<S>& q, const C& codes, uint32_t fields, uint32_t lane4) {
  if constexpr (S::GROUPED) grouped_scores(score, q, codes, fields, lane4);
  else if constexpr (S::SPLIT) split_scores(score, q, codes, fields, lane4);
  else page_scores(score, q, codes, fields, lane4);
}

}  // namespace nqkv
