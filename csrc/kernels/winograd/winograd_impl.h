// The transforms, over whichever Vec the including file chose.
#pragma once

#include "kernels/winograd/winograd.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

// The terms of five values, in order.
MNV4_INLINE void axis_terms(const Vec (&x)[5], Vec (&term)[kWinogradTerms]) {
  term[0] = x[0] - x[2];
  term[1] = x[1];
  term[2] = x[2];
  term[3] = x[4] - x[2];
  term[4] = x[3];
}

void winograd_terms(const float* const* rows, int64_t tiles, int64_t channels, float* terms, ptrdiff_t term) {
  for (int64_t c = 0; c < channels; c += Vec::kWidth) {
    const int valid = static_cast<int>(channels - c < Vec::kWidth ? channels - c : Vec::kWidth);
    const auto column = [&](int64_t pixel, Vec(&to)[kWinogradTerms]) {
      const ptrdiff_t at = pixel * channels + c;
      Vec x[5];
#pragma GCC unroll 5
      for (int i = 0; i < 5; ++i) x[i] = Vec::load(rows[i] + at, valid);
      axis_terms(x, to);
    };
    // a tile's last column is the next one's first
    Vec first[kWinogradTerms];
    column(0, first);
    for (int64_t t = 0; t < tiles; ++t) {
      Vec columns[5][kWinogradTerms];
#pragma GCC unroll 5
      for (int a = 0; a < kWinogradTerms; ++a) columns[0][a] = first[a];
#pragma GCC unroll 4
      for (int i = 1; i < 5; ++i) column(4 * t + i, columns[i]);
      float* to = terms + t * channels + c;
#pragma GCC unroll 5
      for (int a = 0; a < kWinogradTerms; ++a) {
        const Vec x[5] = {columns[0][a], columns[1][a], columns[2][a], columns[3][a], columns[4][a]};
        Vec term_values[kWinogradTerms];
        axis_terms(x, term_values);
#pragma GCC unroll 5
        for (int b = 0; b < kWinogradTerms; ++b) term_values[b].store(to + (kWinogradTerms * a + b) * term, valid);
      }
#pragma GCC unroll 5
      for (int a = 0; a < kWinogradTerms; ++a) first[a] = columns[4][a];
    }
  }
}

template <bool kIsRelu>
MNV4_INLINE void winograd_rows_as(const float* sums, int64_t tiles, int64_t width, Activation act, float* const* y,
                                  ptrdiff_t y_pixel) {
  const auto activate = [act](Vec x) { return kIsRelu ? max(Vec::zero(), x) : simd::activate(act, x); };
  for (int64_t t = 0; t < tiles; ++t) {
    for (int c = 0; c < kPanel; c += Vec::kWidth) {
      const float* from = sums + t * kPanel + c;
      Vec pixel[kWinogradSums][2];
#pragma GCC unroll 3
      for (int i = 0; i < kWinogradSums; ++i) {
        const float* row = from + i * kWinogradSums * tiles * kPanel;
        const Vec both = Vec::load(row + tiles * kPanel);
        pixel[i][0] = Vec::load(row) + both;
        pixel[i][1] = both + Vec::load(row + 2 * tiles * kPanel);
      }
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (2 * t + j >= width) break;
        float* to = y[0] + (2 * t + j) * y_pixel + c;
        activate(pixel[0][j] + pixel[1][j]).store(to);
        if (y[1]) activate(pixel[1][j] + pixel[2][j]).store(to + (y[1] - y[0]));
      }
    }
  }
}

void winograd_rows(const float* sums, int64_t tiles, int64_t width, Activation act, float* const* y,
                   ptrdiff_t y_pixel) {
  if (act == Activation::kRelu) {
    winograd_rows_as<true>(sums, tiles, width, act, y, y_pixel);
  } else {
    winograd_rows_as<false>(sums, tiles, width, act, y, y_pixel);
  }
}

}  // namespace
}  // namespace mnv4
