// The small kernels, over whichever Vec the including file chose.
#pragma once

#include <cstring>

#include "kernels/pointwise/pointwise.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

template <class Load>
MNV4_INLINE void widen_as(const uint16_t* x, float* y, int64_t n, Load load) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) load(x + i).store(y + i);
  if (i < n) {
    uint16_t tail[Vec::kWidth] = {};
    std::memcpy(tail, x + i, static_cast<size_t>(n - i) * sizeof *x);
    load(tail).store(y + i, static_cast<int>(n - i));
  }
}

void widen(const void* x, Storage type, float* y, int64_t n) {
  const auto* half = static_cast<const uint16_t*>(x);
  switch (type) {
    case Storage::kFloat32:
      std::memcpy(y, x, static_cast<size_t>(n) * sizeof *y);
      return;
    case Storage::kBfloat16:
      return widen_as(half, y, n, [](const uint16_t* p) { return Vec::load_bf16(p); });
    case Storage::kFloat16:
      return widen_as(half, y, n, [](const uint16_t* p) { return Vec::load_f16(p); });
  }
}

template <class Store>
MNV4_INLINE void narrow_as(const float* x, uint16_t* y, int64_t n, Store store) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) store(Vec::load(x + i), y + i);
  if (i < n) {
    uint16_t tail[Vec::kWidth];
    store(Vec::load(x + i, static_cast<int>(n - i)), tail);
    std::memcpy(y + i, tail, static_cast<size_t>(n - i) * sizeof *y);
  }
}

void narrow(const float* x, Storage type, void* y, int64_t n) {
  auto* half = static_cast<uint16_t*>(y);
  switch (type) {
    case Storage::kFloat32:
      std::memcpy(y, x, static_cast<size_t>(n) * sizeof *x);
      return;
    case Storage::kBfloat16:
      return narrow_as(x, half, n, [](Vec v, uint16_t* p) { v.store_bf16(p); });
    case Storage::kFloat16:
      return narrow_as(x, half, n, [](Vec v, uint16_t* p) { v.store_f16(p); });
  }
}

void narrow_triples(const float* x, ptrdiff_t x_plane, uint16_t* y, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) {
    Vec::store_bf16_triples(y + 3 * i, Vec::load(x + i), Vec::load(x + x_plane + i), Vec::load(x + 2 * x_plane + i));
  }
  if (i < n) {
    const int count = static_cast<int>(n - i);
    uint16_t tail[3 * Vec::kWidth];
    Vec::store_bf16_triples(tail, Vec::load(x + i, count), Vec::load(x + x_plane + i, count),
                            Vec::load(x + 2 * x_plane + i, count));
    std::memcpy(y + 3 * i, tail, static_cast<size_t>(3 * count) * sizeof *y);
  }
}

// Sums of a few pixels, and sums of those: one sum over all would be the head's largest error.
void mean_pixels(const float* x, int64_t pixels, ptrdiff_t x_pixel, int64_t channels, float* y) {
  const Vec count = Vec::broadcast(static_cast<float>(pixels));
  for (int64_t c = 0; c < channels; c += Vec::kWidth) {
    const int valid = static_cast<int>(channels - c < Vec::kWidth ? channels - c : Vec::kWidth);
    constexpr int64_t kRun = 8;
    Vec sum = Vec::zero();
    for (int64_t first = 0; first < pixels; first += kRun) {
      const int64_t end = first + kRun < pixels ? first + kRun : pixels;
      Vec part = Vec::zero();
      for (int64_t p = first; p < end; ++p) part = part + Vec::load(x + p * x_pixel + c, valid);
      sum = sum + part;
    }
    (sum / count).store(y + c, valid);
  }
}

void softmax_rows(float* x, int64_t rows, int64_t columns, ptrdiff_t x_row, float scale) {
  const Vec factor = Vec::broadcast(scale);
  const int64_t whole = columns / Vec::kWidth * Vec::kWidth;
  const int tail = static_cast<int>(columns - whole);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x + r * x_row;
    Vec top = Vec::broadcast(row[0] * scale);
    for (int64_t i = 0; i < whole; i += Vec::kWidth) top = max(top, Vec::load(row + i) * factor);
    float peak = simd::reduce_max(top);
    for (int64_t i = whole; i < columns; ++i) peak = row[i] * scale > peak ? row[i] * scale : peak;
    const Vec shift = Vec::broadcast(peak);
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < whole; i += Vec::kWidth) {
      const Vec e = simd::exp(Vec::load(row + i) * factor - shift);
      sum = sum + e;
      e.store(row + i);
    }
    float total = simd::reduce_add(sum);
    if (tail) {
      alignas(64) float last[Vec::kWidth];
      simd::exp(Vec::load(row + whole, tail) * factor - shift).store(last);
      for (int i = 0; i < tail; ++i) {
        row[whole + i] = last[i];
        total += last[i];
      }
    }
    const Vec inverse = Vec::broadcast(1.0f / total);
    for (int64_t i = 0; i < whole; i += Vec::kWidth) (Vec::load(row + i) * inverse).store(row + i);
    if (tail) (Vec::load(row + whole, tail) * inverse).store(row + whole, tail);
  }
}

void softmax_gradient_rows(const float* weights, float* grad, int64_t rows, int64_t columns, ptrdiff_t row_pitch,
                           float scale) {
  const Vec factor = Vec::broadcast(scale);
  for (int64_t r = 0; r < rows; ++r) {
    const float* w = weights + r * row_pitch;
    float* g = grad + r * row_pitch;
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < columns; i += Vec::kWidth) {
      const int valid = static_cast<int>(columns - i < Vec::kWidth ? columns - i : Vec::kWidth);
      sum = fma(Vec::load(w + i, valid), Vec::load(g + i, valid), sum);
    }
    const Vec shared = Vec::broadcast(simd::reduce_add(sum));
    for (int64_t i = 0; i < columns; i += Vec::kWidth) {
      const int valid = static_cast<int>(columns - i < Vec::kWidth ? columns - i : Vec::kWidth);
      (Vec::load(w + i, valid) * (Vec::load(g + i, valid) - shared) * factor).store(g + i, valid);
    }
  }
}

}  // namespace
}  // namespace mnv4
