// The transforms, over whichever Vec the including file chose.
#pragma once

#include "kernels/winograd/winograd.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

template <int STRIDE>
struct Axis;

template <>
struct Axis<1> {
  static constexpr const WinogradForm& kForm = kWinogradForms[0];
  static MNV4_INLINE void terms(const Vec (&x)[4], Vec (&term)[4]) {
    term[0] = x[0] - x[2];
    term[1] = x[1] + x[2];
    term[2] = x[2] - x[1];
    term[3] = x[1] - x[3];
  }
  static MNV4_INLINE void outputs(const Vec (&sum)[4], Vec (&y)[2]) {
    y[0] = sum[0] + sum[1] + sum[2];
    y[1] = sum[1] - sum[2] - sum[3];
  }
};

template <>
struct Axis<2> {
  static constexpr const WinogradForm& kForm = kWinogradForms[1];
  static MNV4_INLINE void terms(const Vec (&x)[5], Vec (&term)[5]) {
    term[0] = x[0] - x[2];
    term[1] = x[1];
    term[2] = x[2];
    term[3] = x[4] - x[2];
    term[4] = x[3];
  }
  static MNV4_INLINE void outputs(const Vec (&sum)[3], Vec (&y)[2]) {
    y[0] = sum[0] + sum[1];
    y[1] = sum[1] + sum[2];
  }
};

// Of one vector of channels, all of them or the first `valid`.
template <int STRIDE, bool WHOLE>
MNV4_INLINE void winograd_terms_of(const float* const* rows, int64_t tiles, int64_t channels, int64_t c, int valid,
                                   float* terms, ptrdiff_t term) {
  constexpr int kTerms = Axis<STRIDE>::kForm.terms;
  constexpr int kStep = Axis<STRIDE>::kForm.step;
  // a tile's last columns are the next one's first
  constexpr int kShared = kTerms - kStep;
  const auto column = [&](int64_t pixel, Vec(&to)[kTerms]) {
    const ptrdiff_t at = pixel * channels + c;
    Vec x[kTerms];
#pragma GCC unroll 5
    for (int i = 0; i < kTerms; ++i) x[i] = WHOLE ? Vec::load(rows[i] + at) : Vec::load(rows[i] + at, valid);
    Axis<STRIDE>::terms(x, to);
  };
  Vec shared[kShared][kTerms];
#pragma GCC unroll 2
  for (int i = 0; i < kShared; ++i) column(i, shared[i]);
  for (int64_t t = 0; t < tiles; ++t) {
    Vec columns[kTerms][kTerms];
#pragma GCC unroll 2
    for (int i = 0; i < kShared; ++i) {
#pragma GCC unroll 5
      for (int a = 0; a < kTerms; ++a) columns[i][a] = shared[i][a];
    }
#pragma GCC unroll 4
    for (int i = kShared; i < kTerms; ++i) column(kStep * t + i, columns[i]);
    float* to = terms + t * channels + c;
#pragma GCC unroll 5
    for (int a = 0; a < kTerms; ++a) {
      Vec x[kTerms];
#pragma GCC unroll 5
      for (int i = 0; i < kTerms; ++i) x[i] = columns[i][a];
      Vec values[kTerms];
      Axis<STRIDE>::terms(x, values);
#pragma GCC unroll 5
      for (int b = 0; b < kTerms; ++b) {
        float* p = to + (kTerms * a + b) * term;
        WHOLE ? values[b].store(p) : values[b].store(p, valid);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kShared; ++i) {
#pragma GCC unroll 5
      for (int a = 0; a < kTerms; ++a) shared[i][a] = columns[kStep + i][a];
    }
  }
}

template <int STRIDE>
void winograd_terms(const float* const* rows, int64_t tiles, int64_t channels, float* terms, ptrdiff_t term) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= channels; c += Vec::kWidth) {
    winograd_terms_of<STRIDE, true>(rows, tiles, channels, c, Vec::kWidth, terms, term);
  }
  if (c < channels) {
    winograd_terms_of<STRIDE, false>(rows, tiles, channels, c, static_cast<int>(channels - c), terms, term);
  }
}

template <int STRIDE, bool kIsRelu>
MNV4_INLINE void winograd_rows_as(const float* sums, ptrdiff_t sum, int64_t tiles, int64_t width, float* const* y,
                                  ptrdiff_t y_pixel) {
  constexpr int kSums = Axis<STRIDE>::kForm.sums;
  const auto activate = [](Vec x) { return kIsRelu ? max(Vec::zero(), x) : x; };
  for (int64_t t = 0; t < tiles; ++t) {
    for (int c = 0; c < kPanel; c += Vec::kWidth) {
      const float* from = sums + t * kPanel + c;
      Vec pixel[2][kSums];
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        Vec row[kSums];
#pragma GCC unroll 4
        for (int j = 0; j < kSums; ++j) row[j] = Vec::load(from + (i * kSums + j) * sum);
        Vec both[2];
        Axis<STRIDE>::outputs(row, both);
        pixel[0][i] = both[0];
        pixel[1][i] = both[1];
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (2 * t + j >= width) break;
        Vec both[2];
        Axis<STRIDE>::outputs(pixel[j], both);
        float* to = y[0] + (2 * t + j) * y_pixel + c;
        activate(both[0]).store(to);
        if (y[1]) activate(both[1]).store(to + (y[1] - y[0]));
      }
    }
  }
}

template <int STRIDE>
void winograd_rows(const float* sums, ptrdiff_t sum, int64_t tiles, int64_t width, Activation act, float* const* y,
                   ptrdiff_t y_pixel) {
  if (act == Activation::kRelu) return winograd_rows_as<STRIDE, true>(sums, sum, tiles, width, y, y_pixel);
  winograd_rows_as<STRIDE, false>(sums, sum, tiles, width, y, y_pixel);
  if (act == Activation::kNone) return;
  for (int r = 0; r < 2 && y[r]; ++r) {
    for (int c = 0; c < kPanel; c += Vec::kWidth) simd::activate_pixels(act, y[r] + c, y_pixel, width, Vec::kWidth);
  }
}

// [stride - 1]
#define MNV4_WINOGRAD_TRANSFORMS                                                   \
  {                                                                                \
    {winograd_terms<1>, winograd_rows<1>}, { winograd_terms<2>, winograd_rows<2> } \
  }

}  // namespace
}  // namespace mnv4
