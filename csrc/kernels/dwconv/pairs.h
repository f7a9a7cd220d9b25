// The depthwise register tile in pairs of bfloat16 (vdpbf16ps), for planes of 16 channels: two neighbouring columns are
// one register, in which each channel's two values lie side by side, and a row of K taps takes (K + 1) / 2 products for
// each output where float32 takes K. Included after simd/vec_avx512.h, by files compiled with AVX512_BF16.
#pragma once

#include "kernels/dwconv/tile.h"

namespace mnv4 {
namespace {

using simd::Bf16;

// Two neighbouring columns of a plane. What is outside of the image (`low` tells of the first, `high` of the second) is
// zeros and not read.
MNV4_INLINE __m512i load_columns(const Bf16* column, bool low, bool high) {
  const __mmask32 inside = (low ? 0x0000ffffu : 0u) | (high ? 0xffff0000u : 0u);
  const __m512i columns = low && high ? _mm512_loadu_si512(column) : _mm512_maskz_loadu_epi16(inside, column);
  const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(side_by_side, columns);
}

// The K weights of a row of taps as pairs, for windows that begin with an even column (SHIFT = 0: w0 w1, w2 0) or with
// an odd one (SHIFT = 1: 0 w0, w1 w2). Weights are bfloat16 values kept as float32, [tap][16].
template <int K, int SHIFT>
MNV4_INLINE void pair_weights(const float* weight, __m512i* pairs) {
#pragma GCC unroll 8
  for (int i = 0; i < (K + 1) / 2; ++i) {
    const int low = 2 * i - SHIFT;
    const int high = low + 1;
    const __m512i zero = _mm512_setzero_si512();
    const __m512i first = low >= 0 ? _mm512_srli_epi32(_mm512_loadu_si512(weight + low * kPanel), 16) : zero;
    const __m512i second = high < K ? _mm512_loadu_si512(weight + high * kPanel) : zero;
    pairs[i] = _mm512_or_si512(first, second);
  }
}

// TW outputs of a row. t.x points to the column of the input that is output 0's times the stride.
template <int K, int S, int TW, Edge EDGE, class Out>
MNV4_INLINE void pair_tile(const DwconvRow<Bf16, Out>& t) {
  constexpr int kPairs = (K + 1) / 2;
  constexpr int kReach = K / 2;
  // columns inside the image
  constexpr int kFirst = EDGE == Edge::kLeft || EDGE == Edge::kBoth ? 0 : -2 * kReach;
  constexpr int kLast = EDGE == Edge::kRight || EDGE == Edge::kBoth ? TW * S - 1 : TW * S + 2 * kReach;
  constexpr int kFirstPair = -((kReach + 1) / 2);
  constexpr int kLastPair = ((TW - 1) * S + kReach) / 2;
  Vec acc[TW];
#pragma GCC unroll 16
  for (int o = 0; o < TW; ++o) acc[o] = t.bias;
  const Bf16* row = t.x + t.tap_begin * t.x_row;
  const float* weight = t.weight + t.tap_begin * K * kPanel;
#pragma GCC unroll 1
  for (int ky = t.tap_begin; ky < t.tap_end; ++ky, row += t.x_row, weight += K * kPanel) {
    __m512i w[2][kPairs];
    if (S == 1 || kReach % 2 == 0) pair_weights<K, 0>(weight, w[0]);
    if (S == 1 || kReach % 2 == 1) pair_weights<K, 1>(weight, w[1]);
#pragma GCC unroll 64
    for (int j = kFirstPair; j <= kLastPair; ++j) {
      const bool low = 2 * j >= kFirst && 2 * j <= kLast;
      const bool high = 2 * j + 1 >= kFirst && 2 * j + 1 <= kLast;
      if (!low && !high) continue;
      const __m512i x = load_columns(row + 2 * j * kPanel, low, high);
#pragma GCC unroll 16
      for (int o = 0; o < TW; ++o) {
        // of the window's first column
        const int shift = (o * S - kReach) & 1;
        const int i = j - (o * S - kReach - shift) / 2;
        if (i < 0 || i >= kPairs) continue;
        acc[o].v = _mm512_dpbf16_ps(acc[o].v, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w[shift][i]));
      }
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < TW; ++o) {
    if (t.act == Activation::kRelu) acc[o] = max(Vec::zero(), acc[o]);
    simd::Stored<Out>::store(t.y + o * kPanel, acc[o]);
  }
}

template <int K, int S, int TW, class Out>
void pair_rows(const DwconvArgs& a, DwconvRow<Bf16, Out>& t, int64_t channel, int64_t row_begin, int64_t row_end) {
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    place_row(a, oy, channel, t);
    if (a.out_width == TW) {
      pair_tile<K, S, TW, Edge::kBoth>(t);
      continue;
    }
    pair_tile<K, S, TW, Edge::kLeft>(t);
    for (int64_t ox = TW; ox < a.out_width; ox += TW) {
      t.x += TW * S * kPanel;
      t.y += TW * kPanel;
      if (ox + TW < a.out_width) {
        pair_tile<K, S, TW, Edge::kNone>(t);
      } else {
        pair_tile<K, S, TW, Edge::kRight>(t);
      }
    }
  }
}

template <class Out>
struct PlaneRows<Bf16, Out> {
  template <int K, int S>
  static DwconvRowsFn<Bf16, Out> select(const DwconvArgs& a) {
    if (a.x_pixel != kPanel || a.y_pixel != kPanel) return nullptr;
    if (a.out_width % 16 == 0) return pair_rows<K, S, 16, Out>;
    if (a.out_width % 14 == 0) return pair_rows<K, S, 14, Out>;
    if (a.out_width % 12 == 0) return pair_rows<K, S, 12, Out>;
    if (a.out_width % 8 == 0) return pair_rows<K, S, 8, Out>;
    if (a.out_width % 7 == 0) return pair_rows<K, S, 7, Out>;
    return nullptr;
  }
};

}  // namespace
}  // namespace mnv4
