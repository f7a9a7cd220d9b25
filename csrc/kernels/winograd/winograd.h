// Dense 3x3 convolutions of stride 2 in 25 products for every 2x2 outputs instead of 36.
//
// Along an axis two outputs read five inputs: y0 = x0 g0 + x1 g1 + x2 g2, y1 = x2 g0 + x3 g1 + x4 g2. The even inputs
// are a convolution of two taps, which Winograd's F(2, 2) does in three products, the odd ones take two. In the order
// in which they are kept, these terms are
//
//   m0 = (x0 - x2) g0   n0 = x1 g1 | m1 = x2 (g0 + g2) | m2 = (x4 - x2) g2   n1 = x3 g1
//
// and y0 = (m0 + n0) + m1, y1 = m1 + (m2 + n1): three sums an axis, nine for a tile, each one product over its terms
// and all channels. Transforms only add and subtract, so the error hardly grows.
#pragma once

#include <cstdint>

#include "kernels/conv/conv.h"

namespace mnv4 {

inline constexpr int kWinogradTerms = 5;  // an axis, as many as a tile's inputs
inline constexpr int kWinogradSums = 3;

struct WinogradKernels {
  const char* name;
  // One row of tiles of one plane: rows[i] is input row i of tile 0, tiles are 4 pixels apart, a pixel has `channels`
  // floats. Term (a, b) of tile t goes to terms + (5 a + b) * term + t * channels.
  void (*make_terms)(const float* const* rows, int64_t tiles, int64_t channels, float* terms, ptrdiff_t term);
  // One panel of 16 channels: sums are [3][3][tiles][16]; `width` pixels to y[0] and y[1], y_pixel floats apart. y[1]
  // may be null.
  void (*make_rows)(const float* sums, int64_t tiles, int64_t width, Activation act, float* const* y,
                    ptrdiff_t y_pixel);
};

// The first entry of the list that the active tier can run.
const WinogradKernels& winograd_kernels();

// Whether a convolution has this form; images (planar input) have too few channels.
bool winograd_fits(const ConvShape& shape, int64_t stride_h, int64_t stride_w, int64_t dilation_h);

// OIHW weights to [ceil(K / 16)][winograd_depth][16], and back, exactly.
int64_t winograd_depth(int64_t channels);
void pack_winograd(const float* weight, int64_t out_channels, int64_t channels, float* packed);
void unpack_winograd(const float* packed, int64_t out_channels, int64_t channels, float* weight);

// Floats of scratch that one worker needs.
int64_t winograd_scratch(const ConvArgs& args);

// One worker's way down an image, two output rows at a time; float32, whole panels of output channels.
class WinogradRows {
 public:
  // As ConvRows; args.weight is packed by pack_winograd.
  WinogradRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source = nullptr);

  static constexpr int64_t kRows = 2;
  // Output rows oy, which is even, and oy + 1 to y[0] and y[1]; rows come in ascending order. y[1] is null where the
  // image ends before it.
  void rows(int64_t oy, void* const* y);

 private:
  const GemmKernel& kernel_;
  const WinogradKernels& transforms_;
  const ConvArgs args_;
  // a tile is a window of five pixels, four apart
  const ConvArgs tile_args_;
  PaddedRows rows_;
  float* terms_;
  float* sums_;
  ptrdiff_t* segment_;
  GemmArgs product_{};
};

}  // namespace mnv4
