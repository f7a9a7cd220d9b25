// The training kernels, over whichever Vec the including file chose.
#pragma once

#include <algorithm>

#include "kernels/gemm/gemm.h"
#include "kernels/training/training.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;
using simd::with_activation;

// Rows that are worked on together: their channels are contiguous memory, and vectors over channels are loaded once.
constexpr int64_t kRowBlock = 8;

// f(first row, rows, channel, valid channels of the vector) over all of a map, in blocks of rows
template <class F>
MNV4_INLINE void each_vector(int64_t rows, int64_t channels, const F& f) {
  const int64_t padded = round_up(channels, kPanel);
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rows - r);
    for (int64_t c = 0; c < padded; c += Vec::kWidth) {
      const int64_t left = channels - c;
      f(r, count, c, static_cast<int>(left < 0 ? 0 : std::min<int64_t>(left, Vec::kWidth)));
    }
  }
}

MNV4_INLINE Vec load(const float* p, int valid) { return valid == Vec::kWidth ? Vec::load(p) : Vec::load(p, valid); }
MNV4_INLINE void store(float* p, Vec v, int valid) {
  if (valid == Vec::kWidth) return v.store(p);
  v.store(p, valid);
}
MNV4_INLINE void add_to(float* p, Vec v) { (Vec::load(p) + v).store(p); }

// Bytes ahead that are fetched while rows pass by, where those of a map lie one after the other.
constexpr int64_t kAhead = 8192;

// How far behind a map's rows to fetch from, in floats: rows soon to come, or the next 16 channels of a plane, whose
// lines are a pixel apart and no prefetcher finds.
MNV4_INLINE ptrdiff_t ahead_of(ptrdiff_t row, int64_t channels) {
  if (channels <= kPanel) return kPanel;
  return row * std::max<int64_t>(kRowBlock, kAhead / static_cast<int64_t>(sizeof(float)) / std::max<ptrdiff_t>(1, row));
}
MNV4_INLINE void fetch(const float* p) { __builtin_prefetch(p, 0, 2); }
MNV4_INLINE void fetch_to_write(const float* p) { __builtin_prefetch(p, 1, 2); }

MNV4_INLINE float* place(const Target& y, int64_t row, int64_t c) {
  return y.data + c / kPanel * y.panel + row * y.row + c % kPanel;
}

void activate(const Normalisation& norm, const float* x, ptrdiff_t x_row, int64_t rows, int64_t channels,
              const Target& y) {
  const ptrdiff_t ahead = ahead_of(x_row, channels);
  with_activation(norm.act, [&](auto act) {
    each_vector(rows, channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
      const Vec mean = Vec::load(norm.mean + c), slope = Vec::load(norm.slope + c), shift = Vec::load(norm.shift + c);
      float* out = place(y, r, c);
      const float* in = x + r * x_row + c;
      for (int64_t i = 0; i < count; ++i) {
        fetch(in + i * x_row + ahead);
        const Vec argument = fma(load(in + i * x_row, valid) - mean, slope, shift);
        store(out + i * y.row, simd::activate(act, argument), y.padded ? Vec::kWidth : valid);
      }
    });
  });
}

void result_gradient(const MomentsGradient& gradient, int64_t rows, int64_t channels, const Target& y) {
  const ptrdiff_t grad_ahead = ahead_of(gradient.grad_row, channels);
  const ptrdiff_t z_ahead = ahead_of(gradient.z_row, channels);
  each_vector(rows, channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
    float* out = place(y, r, c);
    const float* grad = gradient.grad + r * gradient.grad_row + c;
    const int stored = y.padded ? Vec::kWidth : valid;
    if (!gradient.z) {
      for (int64_t i = 0; i < count; ++i) store(out + i * y.row, load(grad + i * gradient.grad_row, valid), stored);
      return;
    }
    const float* z = gradient.z + r * gradient.z_row + c;
    const Vec mean = Vec::load(gradient.mean + c), constant = Vec::load(gradient.constant + c);
    const Vec factor = Vec::load(gradient.factor + c);
    for (int64_t i = 0; i < count; ++i) {
      fetch(grad + i * gradient.grad_row + grad_ahead);
      fetch(z + i * gradient.z_row + z_ahead);
      const Vec through = fma(load(z + i * gradient.z_row, valid) - mean, factor, constant);
      store(out + i * y.row, load(grad + i * gradient.grad_row, valid) + through, stored);
    }
  });
}

void moments(const float* z, ptrdiff_t z_row, int64_t rows, int64_t channels, float* mean, float* m2) {
  const int64_t padded = round_up(channels, kPanel);
  std::fill_n(mean, padded, 0.0f);
  std::fill_n(m2, padded, 0.0f);
  each_vector(rows, channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
    const float* in = z + r * z_row + c;
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < count; ++i) sum = sum + load(in + i * z_row, valid);
    add_to(mean + c, sum);
  });
  for (int64_t c = 0; c < padded; ++c) mean[c] /= static_cast<float>(rows);
  each_vector(rows, channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
    const float* in = z + r * z_row + c;
    const Vec centre = Vec::load(mean + c);
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < count; ++i) {
      const Vec distance = load(in + i * z_row, valid) - centre;
      sum = fma(distance, distance, sum);
    }
    add_to(m2 + c, sum);
  });
}

void input_gradient(const Normalisation& norm, const float* da, ptrdiff_t da_row, ptrdiff_t da_panel, const float* x,
                    ptrdiff_t x_row, int64_t rows, int64_t channels, float* dx, ptrdiff_t dx_row, float* sums) {
  const int64_t padded = round_up(channels, kPanel);
  const ptrdiff_t ahead = ahead_of(x_row, channels);
  const ptrdiff_t dx_ahead = ahead_of(dx_row, channels);
  with_activation(norm.act, [&](auto act) {
    each_vector(rows, channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
      const Vec mean = Vec::load(norm.mean + c), slope = Vec::load(norm.slope + c), shift = Vec::load(norm.shift + c);
      const float* grad = da + r * da_row + c / kPanel * da_panel + c % kPanel;
      const float* in = x + r * x_row + c;
      float* out = dx + r * dx_row + c;
      Vec total = Vec::zero(), spread = Vec::zero();
      for (int64_t i = 0; i < count; ++i) {
        fetch(in + i * x_row + ahead);
        fetch_to_write(out + i * dx_row + dx_ahead);
        const Vec centred = load(in + i * x_row, valid) - mean;
        const Vec g = simd::derivative(act, load(grad + i * da_row, valid), fma(centred, slope, shift));
        total = total + g;
        spread = fma(g, centred, spread);
        store(out + i * dx_row, g * slope, valid);
      }
      add_to(sums + c, total);
      add_to(sums + padded + c, spread);
    });
  });
}

// Rows of a tile that keep their sums in registers: 16 with AVX-512, 4 x 2 vectors with AVX2.
constexpr int kOuterRows = Vec::kWidth == kPanel ? kPanel : 4;
constexpr int kOuterVectors = Vec::kWidth == 1 ? 4 : kPanel / Vec::kWidth;

void outer(const OuterArgs& args) {
  for (int o = 0; o < kPanel; o += kOuterRows) {
    for (int c = 0; c < kPanel; c += kOuterVectors * Vec::kWidth) {
      Vec acc[kOuterRows][kOuterVectors];
      float* tile = args.tile + o * kPanel + c;
#pragma GCC unroll 16
      for (int r = 0; r < kOuterRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVectors; ++v) acc[r][v] = Vec::zero();
      }
      for (int64_t i = 0; i < args.rows; ++i) {
        const float* left = args.left + i * args.left_row + o;
        const float* right = args.right + i * args.right_row + c;
#pragma GCC unroll 1
        for (int64_t j = 0; j < args.columns; ++j) {
          Vec x[kOuterVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kOuterVectors; ++v) x[v] = Vec::load(right + v * Vec::kWidth);
#pragma GCC unroll 16
          for (int r = 0; r < kOuterRows; ++r) {
            const Vec g = Vec::broadcast(left[r]);
#pragma GCC unroll 4
            for (int v = 0; v < kOuterVectors; ++v) acc[r][v] = fma(g, x[v], acc[r][v]);
          }
          left += args.left_column;
          right += args.right_column;
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kOuterRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVectors; ++v) {
          float* to = tile + r * kPanel + v * Vec::kWidth;
          (args.first ? acc[r][v] : acc[r][v] + Vec::load(to)).store(to);
        }
      }
    }
  }
}

// Additions of one chain before it joins the others.
constexpr int64_t kWeightChain = 256;

// TW output pixels: each input column is loaded once and meets every gradient whose kernel covers it. Two sums a tap,
// since three taps alone would wait for one another.
template <int K, int S, int TW>
MNV4_INLINE void weight_tile(const float* x, const float* grad, Vec (&acc)[2][K]) {
  Vec g[TW];
#pragma GCC unroll 8
  for (int o = 0; o < TW; ++o) g[o] = Vec::load(grad + o * kPanel);
#pragma GCC unroll 32
  for (int column = 0; column < (TW - 1) * S + K; ++column) {
    const Vec v = Vec::load(x + column * kPanel);
#pragma GCC unroll 8
    for (int o = 0; o < TW; ++o) {
      const int kx = column - o * S;
      if (kx >= 0 && kx < K) acc[o % 2][kx] = fma(v, g[o], acc[o % 2][kx]);
    }
  }
}

template <int K, int S>
MNV4_INLINE void weight_row(const float* x, const float* grad, int64_t width, Vec (&acc)[2][K]) {
  const int64_t wide = width % 7 == 0 ? 7 : 8;
  int64_t ox = 0;
  for (; ox + wide <= width; ox += wide) {
    if (wide == 7) {
      weight_tile<K, S, 7>(x + ox * S * kPanel, grad + ox * kPanel, acc);
    } else {
      weight_tile<K, S, 8>(x + ox * S * kPanel, grad + ox * kPanel, acc);
    }
  }
  for (; ox + 2 <= width; ox += 2) weight_tile<K, S, 2>(x + ox * S * kPanel, grad + ox * kPanel, acc);
  if (ox < width) weight_tile<K, S, 1>(x + ox * S * kPanel, grad + ox * kPanel, acc);
}

template <int K, int S>
void depthwise_weight_of(const DepthwiseWeightArgs& a) {
  const int64_t step = std::max<int64_t>(1, kWeightChain / std::max<int64_t>(1, a.width));
  for (int64_t first = 0; first < a.height; first += step) {
    const int64_t last = std::min(a.height, first + step);
    for (int ky = 0; ky < K; ++ky) {
      for (int lane = 0; lane < kPanel; lane += Vec::kWidth) {
        Vec acc[2][K];
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) acc[0][kx] = acc[1][kx] = Vec::zero();
        for (int64_t oy = first; oy < last; ++oy) {
          weight_row<K, S>(a.x + (oy * S + ky) * a.x_row + lane, a.grad + oy * a.width * kPanel + lane, a.width, acc);
        }
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) add_to(a.out + (ky * K + kx) * kPanel + lane, acc[0][kx] + acc[1][kx]);
      }
    }
  }
}

// Any kernel, stride and dilation.
void depthwise_weight_any(const DepthwiseWeightArgs& a) {
  for (int ky = 0; ky < a.kernel_h; ++ky) {
    for (int kx = 0; kx < a.kernel_w; ++kx) {
      for (int lane = 0; lane < kPanel; lane += Vec::kWidth) {
        for (int64_t oy = 0; oy < a.height; ++oy) {
          const float* x = a.x + (oy * a.stride_h + ky * a.dilation_h) * a.x_row + kx * a.dilation_w * kPanel + lane;
          const float* grad = a.grad + oy * a.width * kPanel + lane;
          Vec sum = Vec::zero();
          for (int64_t ox = 0; ox < a.width; ++ox) {
            sum = fma(Vec::load(x + ox * a.stride_w * kPanel), Vec::load(grad + ox * kPanel), sum);
          }
          add_to(a.out + (ky * a.kernel_w + kx) * kPanel + lane, sum);
        }
      }
    }
  }
}

void depthwise_weight(const DepthwiseWeightArgs& a) {
  const bool square = a.kernel_h == a.kernel_w && a.stride_h == a.stride_w;
  if (!square || a.dilation_h != 1 || a.dilation_w != 1) return depthwise_weight_any(a);
  switch (a.kernel_w * 10 + a.stride_w) {
    case 31:
      return depthwise_weight_of<3, 1>(a);
    case 32:
      return depthwise_weight_of<3, 2>(a);
    case 51:
      return depthwise_weight_of<5, 1>(a);
    case 52:
      return depthwise_weight_of<5, 2>(a);
    default:
      return depthwise_weight_any(a);
  }
}

void block_end(const BlockEnd& end, const float* residual, ptrdiff_t residual_row, float* y) {
  const Normalisation& norm = end.norm;
  with_activation(norm.act, [&](auto act) {
    each_vector(end.rows, end.channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
      const Vec mean = Vec::load(norm.mean + c), slope = Vec::load(norm.slope + c), shift = Vec::load(norm.shift + c);
      const Vec scale = Vec::load(end.scale + c);
      for (int64_t i = 0; i < count; ++i) {
        const Vec x = load(end.x + (r + i) * end.x_row + c, valid);
        Vec value = simd::activate(act, fma(x - mean, slope, shift)) * scale;
        if (residual) value = value + load(residual + (r + i) * residual_row + c, valid);
        store(y + (r + i) * end.channels + c, value, valid);
      }
    });
  });
}

void block_end_gradient(const BlockEnd& end, const float* grad, ptrdiff_t grad_row, float* dx, float* sums) {
  const Normalisation& norm = end.norm;
  const int64_t padded = round_up(end.channels, kPanel);
  with_activation(norm.act, [&](auto act) {
    each_vector(end.rows, end.channels, [&](int64_t r, int64_t count, int64_t c, int valid) {
      const Vec mean = Vec::load(norm.mean + c), slope = Vec::load(norm.slope + c), shift = Vec::load(norm.shift + c);
      const Vec scale = Vec::load(end.scale + c);
      Vec total = Vec::zero(), spread = Vec::zero(), scaled = Vec::zero();
      for (int64_t i = 0; i < count; ++i) {
        const Vec centred = load(end.x + (r + i) * end.x_row + c, valid) - mean;
        const Vec argument = fma(centred, slope, shift);
        const Vec dy = load(grad + (r + i) * grad_row + c, valid);
        const Vec g = simd::derivative(act, dy * scale, argument);
        total = total + g;
        spread = fma(g, centred, spread);
        scaled = fma(dy, simd::activate(act, argument), scaled);
        store(dx + (r + i) * end.channels + c, g * slope, valid);
      }
      add_to(sums + c, total);
      add_to(sums + padded + c, spread);
      add_to(sums + 2 * padded + c, scaled);
    });
  });
}

constexpr TrainingKernels make_training_kernels(const char* name) {
  return {name,  activate,         result_gradient, moments,           input_gradient,
          outer, depthwise_weight, block_end,       block_end_gradient};
}

}  // namespace
}  // namespace mnv4
