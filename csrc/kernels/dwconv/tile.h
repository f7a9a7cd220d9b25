// The depthwise register tile, over whichever Vec the including file chose.
#pragma once

#include <type_traits>

#include "kernels/dwconv/dwconv.h"
#include "kernels/gemm/gemm.h"
#include "simd/activation.h"
#include "simd/stored.h"

namespace mnv4 {
namespace {

using simd::Vec;

// One row of `TW` output pixels of one vector of channels. Coordinates of the input are relative to `x`.
template <class In, class Out>
struct DwconvRow {
  const In* x;      // tap (0, 0) of output 0; may point outside the image where taps are clipped
  ptrdiff_t x_row;  // times dilation_h
  ptrdiff_t x_pixel;
  int tap_begin;  // rows of taps inside the image
  int tap_end;
  int column_begin;  // input columns inside the image, relative to x
  int column_end;
  const float* weight;  // [kh * kw][16]
  Vec bias;
  Out* y;
  ptrdiff_t y_pixel;
  Activation act;
  int valid;  // channels of this vector
};

// Where a tile's input columns may lie outside the image.
enum class Edge {
  kNone,   // nowhere
  kLeft,   // the first K / 2 columns do
  kRight,  // those past TW * S do
  kBoth,
  kRuntime,  // column_begin and column_end tell
};

// Each input column is loaded once per row of taps and feeds every output that it touches. Columns outside the image
// are skipped, not multiplied by zero: an infinity beyond the border must not become NaN.
// X_PIXEL and Y_PIXEL are the pixel strides where they are known (planes of 16 channels, alone or in pairs), so that
// columns are displacements.
template <int K, int S, int TW, Edge EDGE, bool PARTIAL, int X_PIXEL = 0, int Y_PIXEL = 0, class In, class Out>
MNV4_INLINE void dwconv_tile(const DwconvRow<In, Out>& t) {
  constexpr int kLeft = EDGE == Edge::kLeft || EDGE == Edge::kBoth ? K / 2 : 0;
  constexpr int kRight = EDGE == Edge::kRight || EDGE == Edge::kBoth ? K / 2 + TW * S : (TW - 1) * S + K;
  const ptrdiff_t x_pixel = X_PIXEL ? X_PIXEL : t.x_pixel;
  const ptrdiff_t x_row = t.x_row;
  const int tap_end = t.tap_end;
  Vec acc[TW];
#pragma GCC unroll 16
  for (int o = 0; o < TW; ++o) acc[o] = t.bias;
  const In* row = t.x + t.tap_begin * x_row;
  const float* weight = t.weight + t.tap_begin * K * kPanel;
#pragma GCC unroll 1
  for (int ky = t.tap_begin; ky < tap_end; ++ky, row += x_row, weight += K * kPanel) {
    Vec w[K];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) w[kx] = Vec::load(weight + kx * kPanel);
#pragma GCC unroll 64
    for (int column = 0; column < (TW - 1) * S + K; ++column) {
      if (column < kLeft || column >= kRight) continue;
      if (EDGE == Edge::kRuntime && (column < t.column_begin || column >= t.column_end)) continue;
      const In* p = row + column * x_pixel;
      const Vec x = PARTIAL ? simd::Stored<In>::load(p, t.valid) : simd::Stored<In>::load(p);
#pragma GCC unroll 16
      for (int o = 0; o < TW; ++o) {
        const int kx = column - o * S;
        if (kx >= 0 && kx < K) acc[o] = fma(x, w[kx], acc[o]);
      }
    }
  }
  if (t.act == Activation::kRelu) {
#pragma GCC unroll 16
    for (int o = 0; o < TW; ++o) acc[o] = max(Vec::zero(), acc[o]);
  }
#pragma GCC unroll 16
  for (int o = 0; o < TW; ++o) {
    Out* p = t.y + o * (Y_PIXEL ? Y_PIXEL : t.y_pixel);
    if (PARTIAL) {
      simd::Stored<Out>::store(p, acc[o], t.valid);
    } else {
      simd::Stored<Out>::store(p, acc[o]);
    }
  }
}

// A whole output row of any width and padding, in tiles of 8, 4, 2 and 1 whose edges are known at run time.
template <int K, int S, bool PARTIAL, class In, class Out>
void dwconv_row(DwconvRow<In, Out> t, int64_t out_width, int64_t width, int pad_left) {
  const In* x = t.x;
  Out* y = t.y;
  for (int64_t ox = 0; ox < out_width;) {
    const int64_t left = out_width - ox;
    const int64_t ix = ox * S - pad_left;
    t.x = x + ix * t.x_pixel;
    t.y = y + ox * t.y_pixel;
    t.column_begin = static_cast<int>(ix < 0 ? -ix : 0);
    // an int is enough: only columns within the tile's span are compared
    const int64_t inside = width - ix;
    t.column_end = static_cast<int>(inside < 64 ? inside : 64);
    if (left >= 8 && !PARTIAL) {
      dwconv_tile<K, S, 8, Edge::kRuntime, PARTIAL>(t);
      ox += 8;
    } else if (left >= 4) {
      dwconv_tile<K, S, 4, Edge::kRuntime, PARTIAL>(t);
      ox += 4;
    } else if (left >= 2 && !PARTIAL) {
      dwconv_tile<K, S, 2, Edge::kRuntime, PARTIAL>(t);
      ox += 2;
    } else {
      dwconv_tile<K, S, 1, Edge::kRuntime, PARTIAL>(t);
      ox += 1;
    }
  }
}

// A whole output row of a multiple of TW pixels with the usual padding of K / 2: edges known at compile time.
template <int K, int S, int TW, int X_PIXEL, int Y_PIXEL, class In, class Out>
MNV4_INLINE void dwconv_row_tiled(DwconvRow<In, Out>& t, int64_t out_width) {
  const ptrdiff_t x_pixel = X_PIXEL ? X_PIXEL : t.x_pixel;
  const ptrdiff_t y_pixel = Y_PIXEL ? Y_PIXEL : t.y_pixel;
  t.x -= (K / 2) * x_pixel;
  if (out_width == TW) return dwconv_tile<K, S, TW, Edge::kBoth, false, X_PIXEL, Y_PIXEL>(t);
  dwconv_tile<K, S, TW, Edge::kLeft, false, X_PIXEL, Y_PIXEL>(t);
  t.x += TW * S * x_pixel;
  t.y += TW * y_pixel;
  for (int64_t ox = TW; ox + TW < out_width; ox += TW) {
    dwconv_tile<K, S, TW, Edge::kNone, false, X_PIXEL, Y_PIXEL>(t);
    t.x += TW * S * x_pixel;
    t.y += TW * y_pixel;
  }
  dwconv_tile<K, S, TW, Edge::kRight, false, X_PIXEL, Y_PIXEL>(t);
}

// The rows of taps of output row `oy` that are inside the image, and where the first of them begins.
template <class In, class Out>
MNV4_INLINE void place_row(const DwconvArgs& a, int64_t oy, int64_t channel, DwconvRow<In, Out>& t) {
  const int64_t iy = oy * a.stride_h - a.pad_top;
  const int64_t above = iy < 0 ? div_up(-iy, a.dilation_h) : 0;
  const int64_t inside = iy < a.height ? div_up(a.height - iy, a.dilation_h) : 0;
  t.tap_begin = static_cast<int>(above);
  t.tap_end = static_cast<int>(inside < a.kernel_h ? inside : a.kernel_h);
  t.x = static_cast<const In*>(a.x) + iy * a.x_row + channel;
  t.y = static_cast<Out*>(a.y) + oy * a.y_row + channel;
}

// Rows of a multiple of TW pixels that read nothing outside of the image's width.
template <int K, int S, int TW, int X_PIXEL, int Y_PIXEL, class In, class Out>
void dwconv_rows_inside(const DwconvArgs& a, DwconvRow<In, Out>& t, int64_t channel, int64_t row_begin,
                        int64_t row_end) {
  const ptrdiff_t x_pixel = X_PIXEL ? X_PIXEL : t.x_pixel;
  const ptrdiff_t y_pixel = Y_PIXEL ? Y_PIXEL : t.y_pixel;
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    place_row(a, oy, channel, t);
    for (int64_t ox = 0; ox < a.out_width; ox += TW) {
      dwconv_tile<K, S, TW, Edge::kNone, false, X_PIXEL, Y_PIXEL>(t);
      t.x += TW * S * x_pixel;
      t.y += TW * y_pixel;
    }
  }
}

// Any kernel, stride and dilation, one output pixel at a time: dilated backbones and unusual kernels.
template <class In, class Out>
void dwconv_row_any(const DwconvArgs& a, const DwconvRow<In, Out>& t) {
  for (int64_t ox = 0; ox < a.out_width; ++ox) {
    const int64_t ix = ox * a.stride_w - a.pad_left;
    Vec acc = t.bias;
    for (int ky = t.tap_begin; ky < t.tap_end; ++ky) {
      for (int kx = 0; kx < a.kernel_w; ++kx) {
        const int64_t column = ix + kx * a.dilation_w;
        if (column < 0 || column >= a.width) continue;
        const Vec x = simd::Stored<In>::load(t.x + ky * t.x_row + column * t.x_pixel, t.valid);
        acc = fma(x, Vec::load(t.weight + (ky * a.kernel_w + kx) * kPanel), acc);
      }
    }
    if (t.act == Activation::kRelu) acc = max(Vec::zero(), acc);
    simd::Stored<Out>::store(t.y + ox * t.y_pixel, acc, t.valid);
  }
}

// Output rows [row_begin, row_end) of one vector of channels.
template <class In, class Out>
using DwconvRowsFn = void (*)(const DwconvArgs&, DwconvRow<In, Out>&, int64_t, int64_t, int64_t);

template <int K, int S, int TW, int X_PIXEL, int Y_PIXEL, class In, class Out>
void dwconv_rows_tiled(const DwconvArgs& a, DwconvRow<In, Out>& t, int64_t channel, int64_t row_begin,
                       int64_t row_end) {
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    place_row(a, oy, channel, t);
    dwconv_row_tiled<K, S, TW, X_PIXEL, Y_PIXEL>(t, a.out_width);
  }
}

template <int K, int S, bool PARTIAL, class In, class Out>
void dwconv_rows(const DwconvArgs& a, DwconvRow<In, Out>& t, int64_t channel, int64_t row_begin, int64_t row_end) {
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    place_row(a, oy, channel, t);
    dwconv_row<K, S, PARTIAL>(t, a.out_width, a.width, a.pad_left);
  }
}

template <class In, class Out>
void dwconv_rows_any(const DwconvArgs& a, DwconvRow<In, Out>& t, int64_t channel, int64_t row_begin, int64_t row_end) {
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    place_row(a, oy, channel, t);
    dwconv_row_any(a, t);
  }
}

// Whole rows of planes of 16 channels with the usual padding of K / 2, where the width is a multiple of some tile's;
// else null. A tile's sums, K weights and one input must fit the registers: 32 with AVX-512, 16 below.
template <class In, class Out>
struct PlaneRows {
  template <int K, int S>
  static DwconvRowsFn<In, Out> select(const DwconvArgs& a) {
    if constexpr (Vec::kWidth > 1) {
      if (a.x_pixel == kPanel && a.y_pixel == kPanel) return of_width<K, S, kPanel, kPanel>(a.out_width);
    }
    if constexpr (Vec::kWidth == kPanel) {
      // what a matrix unit will read, from what it summed or has read, too
      if constexpr (std::is_same_v<Out, simd::Bf16>) {
        constexpr int kPair = 2 * kPanel;
        constexpr int kInput = std::is_same_v<In, float> ? kPanel : kPair;
        if (a.x_pixel == kInput && a.y_pixel == kPair) return of_width<K, S, kInput, kPair>(a.out_width);
      }
    }
    return nullptr;
  }

 private:
  template <int K, int S, int X_PIXEL, int Y_PIXEL>
  static DwconvRowsFn<In, Out> of_width(int64_t out_width) {
    if constexpr (Vec::kWidth == kPanel) {
      if (out_width % 16 == 0) return dwconv_rows_tiled<K, S, 16, X_PIXEL, Y_PIXEL, In, Out>;
      if (out_width % 14 == 0) return dwconv_rows_tiled<K, S, 14, X_PIXEL, Y_PIXEL, In, Out>;
      if (out_width % 12 == 0) return dwconv_rows_tiled<K, S, 12, X_PIXEL, Y_PIXEL, In, Out>;
    }
    if (out_width % 8 == 0) return dwconv_rows_tiled<K, S, 8, X_PIXEL, Y_PIXEL, In, Out>;
    if (out_width % 7 == 0) return dwconv_rows_tiled<K, S, 7, X_PIXEL, Y_PIXEL, In, Out>;
    if constexpr (Vec::kWidth < kPanel) {
      if (out_width % 6 == 0) return dwconv_rows_tiled<K, S, 6, X_PIXEL, Y_PIXEL, In, Out>;
    }
    return nullptr;
  }
};

// The same for rows that read nothing outside of the image's width: pooling, of a mirrored plane too.
template <int K, int S, class In, class Out>
DwconvRowsFn<In, Out> select_rows_inside(const DwconvArgs& a) {
  if (a.pad_left != 0 || (a.out_width - 1) * S + K > a.width) return nullptr;
  if (a.x_pixel == kPanel && a.y_pixel == kPanel) {
    if (a.out_width % 8 == 0) return dwconv_rows_inside<K, S, 8, kPanel, kPanel, In, Out>;
    if (a.out_width % 7 == 0) return dwconv_rows_inside<K, S, 7, kPanel, kPanel, In, Out>;
  }
  if (a.out_width % 8 == 0) return dwconv_rows_inside<K, S, 8, 0, 0, In, Out>;
  if (a.out_width % 7 == 0) return dwconv_rows_inside<K, S, 7, 0, 0, In, Out>;
  return nullptr;
}

template <int K, int S, class In, class Out>
DwconvRowsFn<In, Out> select_rows_of(const DwconvArgs& a, bool partial) {
  if (partial) return dwconv_rows<K, S, true, In, Out>;
  if constexpr (K <= 3 && S == 2) {
    if (const DwconvRowsFn<In, Out> rows = select_rows_inside<K, S, In, Out>(a)) return rows;
  }
  if constexpr (K == 3 || K == 5) {
    if (a.pad_left == K / 2 && a.width == a.out_width * S) {
      const DwconvRowsFn<In, Out> rows = PlaneRows<In, Out>::template select<K, S>(a);
      if (rows) return rows;
      if (a.out_width % 8 == 0) return dwconv_rows_tiled<K, S, 8, 0, 0, In, Out>;
      if (a.out_width % 7 == 0) return dwconv_rows_tiled<K, S, 7, 0, 0, In, Out>;
    }
  }
  return dwconv_rows<K, S, false, In, Out>;
}

template <class In, class Out>
DwconvRowsFn<In, Out> select_rows(const DwconvArgs& a, bool partial) {
  const bool square = a.kernel_h == a.kernel_w && a.stride_h == a.stride_w;
  if (!square || a.dilation_w != 1) return dwconv_rows_any<In, Out>;
  switch (a.kernel_w * 10 + a.stride_w) {
    case 22:
      return select_rows_of<2, 2, In, Out>(a, partial);
    case 31:
      return select_rows_of<3, 1, In, Out>(a, partial);
    case 32:
      return select_rows_of<3, 2, In, Out>(a, partial);
    case 51:
      return select_rows_of<5, 1, In, Out>(a, partial);
    case 52:
      return select_rows_of<5, 2, In, Out>(a, partial);
    case 71:
      return select_rows_of<7, 1, In, Out>(a, partial);
    case 72:
      return select_rows_of<7, 2, In, Out>(a, partial);
    default:
      return dwconv_rows_any<In, Out>;
  }
}

template <class In, class Out>
void dwconv_run(const DwconvArgs& a, int64_t row_begin, int64_t row_end, int64_t channel_begin, int64_t channel_end) {
  const int taps = a.kernel_h * a.kernel_w;
  DwconvRow<In, Out> t;
  t.x_row = a.x_row * a.dilation_h;
  t.x_pixel = a.x_pixel;
  t.y_pixel = a.y_pixel;
  t.act = a.act;
  for (int64_t c = channel_begin; c < channel_end; c += Vec::kWidth) {
    const int64_t channels = channel_end - c;
    t.valid = static_cast<int>(channels < Vec::kWidth ? channels : Vec::kWidth);
    t.bias = Vec::load(a.bias + c, t.valid);
    t.weight = a.weight + c / kPanel * taps * kPanel + c % kPanel;
    select_rows<In, Out>(a, t.valid < Vec::kWidth)(a, t, c, row_begin, row_end);
    if (a.act == Activation::kNone || a.act == Activation::kRelu) continue;
    // over rows that are still in L1
    for (int64_t oy = row_begin; oy < row_end; ++oy) {
      simd::activate_pixels(a.act, static_cast<Out*>(a.y) + oy * a.y_row + c, a.y_pixel, a.out_width, t.valid);
    }
  }
}

template <class In, class Out>
constexpr DwconvKernel make_dwconv_kernel(const char* name) {
  return {name, simd::Stored<In>::kStorage, simd::Stored<Out>::kStorage, dwconv_run<In, Out>};
}

}  // namespace
}  // namespace mnv4
