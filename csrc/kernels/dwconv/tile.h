// The depthwise register tile, over whichever Vec the including file chose.
#pragma once

#include "kernels/dwconv/dwconv.h"
#include "kernels/gemm/gemm.h"
#include "simd/activation.h"

namespace mnv4 {
namespace {

using simd::Vec;

// One row of `TW` output pixels of one vector of channels. Coordinates of the input are relative to `x`.
struct DwconvRow {
  const float* x;        // tap (0, 0) of output 0; may point outside the image where taps are clipped
  ptrdiff_t x_row;       // times dilation_h
  ptrdiff_t x_pixel;
  int tap_begin;         // rows of taps inside the image
  int tap_end;
  int column_begin;      // input columns inside the image, relative to x
  int column_end;
  const float* weight;   // [kh * kw][16]
  Vec bias;
  float* y;
  ptrdiff_t y_pixel;
  Activation act;
  int valid;             // channels of this vector
};

// Each input column is loaded once per row of taps and feeds every output that it touches. Columns outside the image
// are skipped, not multiplied by zero: an infinity beyond the border must not become NaN.
template <int K, int S, int TW, bool EDGE, bool PARTIAL>
MNV4_INLINE void dwconv_tile(const DwconvRow& t) {
  Vec acc[TW];
#pragma GCC unroll 8
  for (int o = 0; o < TW; ++o) acc[o] = t.bias;
  for (int ky = t.tap_begin; ky < t.tap_end; ++ky) {
    const float* row = t.x + ky * t.x_row;
    const float* weight = t.weight + ky * K * kPanel;
    Vec w[K];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) w[kx] = Vec::load(weight + kx * kPanel);
#pragma GCC unroll 32
    for (int column = 0; column < (TW - 1) * S + K; ++column) {
      if (EDGE && (column < t.column_begin || column >= t.column_end)) continue;
      const float* p = row + column * t.x_pixel;
      const Vec x = PARTIAL ? Vec::load(p, t.valid) : Vec::load(p);
#pragma GCC unroll 8
      for (int o = 0; o < TW; ++o) {
        const int kx = column - o * S;
        if (kx >= 0 && kx < K) acc[o] = fma(x, w[kx], acc[o]);
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < TW; ++o) {
    if (t.act == Activation::kRelu) acc[o] = max(Vec::zero(), acc[o]);
    float* p = t.y + o * t.y_pixel;
    if (PARTIAL) {
      acc[o].store(p, t.valid);
    } else {
      acc[o].store(p);
    }
  }
}

// Activations other than ReLU run over the finished row, which is still in L1: one copy of their code.
__attribute__((noinline)) void activate_row(float* y, ptrdiff_t y_pixel, int64_t pixels, int valid, Activation act) {
  for (int64_t i = 0; i < pixels; ++i) {
    float* p = y + i * y_pixel;
    simd::activate(act, Vec::load(p, valid)).store(p, valid);
  }
}

// A whole output row as tiles: 7s where they divide it (7, 14, 28, ...), else 8s, then 4, 2 and 1.
template <int K, int S, bool PARTIAL>
void dwconv_row(DwconvRow t, int64_t out_width, int64_t width, int pad_left) {
  const float* x = t.x;
  float* y = t.y;
  for (int64_t ox = 0; ox < out_width;) {
    const int64_t left = out_width - ox;
    const int64_t ix = ox * S - pad_left;
    t.x = x + ix * t.x_pixel;
    t.y = y + ox * t.y_pixel;
    t.column_begin = static_cast<int>(ix < 0 ? -ix : 0);
    const auto run = [&](auto tile, auto edge_tile, int tw) {
      const int64_t span = (tw - 1) * S + K;
      const int64_t inside = width - ix;
      t.column_end = static_cast<int>(inside < span ? (inside < 0 ? 0 : inside) : span);
      if (t.column_begin > 0 || t.column_end < span) {
        edge_tile(t);
      } else {
        tile(t);
      }
      ox += tw;
    };
#define MNV4_DWCONV_TILE(TW) run(dwconv_tile<K, S, TW, false, PARTIAL>, dwconv_tile<K, S, TW, true, PARTIAL>, TW)
    if constexpr (PARTIAL) {
      if (left >= 4) {
        MNV4_DWCONV_TILE(4);
      } else {
        MNV4_DWCONV_TILE(1);
      }
    } else if (out_width % 7 == 0) {
      MNV4_DWCONV_TILE(7);
    } else if (left >= 8) {
      MNV4_DWCONV_TILE(8);
    } else if (left >= 4) {
      MNV4_DWCONV_TILE(4);
    } else if (left >= 2) {
      MNV4_DWCONV_TILE(2);
    } else {
      MNV4_DWCONV_TILE(1);
    }
#undef MNV4_DWCONV_TILE
  }
}

// Any kernel, stride and dilation, one output pixel at a time: dilated backbones and unusual kernels.
void dwconv_row_any(const DwconvArgs& a, DwconvRow t) {
  for (int64_t ox = 0; ox < a.out_width; ++ox) {
    const int64_t ix = ox * a.stride_w - a.pad_left;
    Vec acc = t.bias;
    for (int ky = t.tap_begin; ky < t.tap_end; ++ky) {
      for (int kx = 0; kx < a.kernel_w; ++kx) {
        const int64_t column = ix + kx * a.dilation_w;
        if (column < 0 || column >= a.width) continue;
        const Vec x = Vec::load(t.x + ky * t.x_row + column * t.x_pixel, t.valid);
        acc = fma(x, Vec::load(t.weight + (ky * a.kernel_w + kx) * kPanel), acc);
      }
    }
    if (t.act == Activation::kRelu) acc = max(Vec::zero(), acc);
    acc.store(t.y + ox * t.y_pixel, t.valid);
  }
}

template <int K, int S>
void dwconv_row_fixed(const DwconvArgs& a, const DwconvRow& t) {
  if (t.valid == Vec::kWidth) {
    dwconv_row<K, S, false>(t, a.out_width, a.width, a.pad_left);
  } else {
    dwconv_row<K, S, true>(t, a.out_width, a.width, a.pad_left);
  }
}

using DwconvRowFn = void (*)(const DwconvArgs&, const DwconvRow&);

DwconvRowFn select_row(const DwconvArgs& a) {
  const bool square = a.kernel_h == a.kernel_w && a.stride_h == a.stride_w;
  const bool dilated = a.dilation_w != 1;
  if (square && !dilated) {
    const int key = a.kernel_w * 10 + a.stride_w;
    if (key == 31) return dwconv_row_fixed<3, 1>;
    if (key == 32) return dwconv_row_fixed<3, 2>;
    if (key == 51) return dwconv_row_fixed<5, 1>;
    if (key == 52) return dwconv_row_fixed<5, 2>;
    if (key == 71) return dwconv_row_fixed<7, 1>;
    if (key == 72) return dwconv_row_fixed<7, 2>;
  }
  return nullptr;
}

void dwconv_run(const DwconvArgs& a, int64_t row_begin, int64_t row_end, int64_t channel_begin, int64_t channel_end) {
  const DwconvRowFn fixed = select_row(a);
  const int taps = a.kernel_h * a.kernel_w;
  for (int64_t c = channel_begin; c < channel_end; c += Vec::kWidth) {
    DwconvRow t;
    const int64_t channels = channel_end - c;
    t.valid = static_cast<int>(channels < Vec::kWidth ? channels : Vec::kWidth);
    t.bias = Vec::load(a.bias + c, t.valid);
    t.weight = a.weight + c / kPanel * taps * kPanel + c % kPanel;
    t.x_row = a.x_row * a.dilation_h;
    t.x_pixel = a.x_pixel;
    t.y_pixel = a.y_pixel;
    t.act = a.act;
    for (int64_t oy = row_begin; oy < row_end; ++oy) {
      const int64_t iy = oy * a.stride_h - a.pad_top;
      // rows of taps above the image, and past those still inside it
      const int64_t above = iy < 0 ? div_up(-iy, a.dilation_h) : 0;
      const int64_t inside = iy < a.height ? div_up(a.height - iy, a.dilation_h) : 0;
      t.tap_begin = static_cast<int>(above);
      t.tap_end = static_cast<int>(inside < a.kernel_h ? inside : a.kernel_h);
      t.x = a.x + iy * a.x_row + c;
      t.y = a.y + oy * a.y_row + c;
      if (fixed) {
        fixed(a, t);
      } else {
        dwconv_row_any(a, t);
      }
      if (a.act != Activation::kNone && a.act != Activation::kRelu) {
        activate_row(t.y, a.y_pixel, a.out_width, t.valid, a.act);
      }
    }
  }
}

}  // namespace
}  // namespace mnv4
