// Dense 3x3 convolutions in fewer products for every 2x2 outputs: 25 instead of 36 of stride 2, 16 of stride 1.
//
// Along an axis of stride 2 two outputs read five inputs: y0 = x0 g0 + x1 g1 + x2 g2, y1 = x2 g0 + x3 g1 + x4 g2. The
// even inputs are a convolution of two taps, which Winograd's F(2, 2) does in three products, the odd ones take two. In
// the order in which they are kept, these terms are
//
//   m0 = (x0 - x2) g0   n0 = x1 g1 | m1 = x2 (g0 + g2) | m2 = (x4 - x2) g2   n1 = x3 g1
//
// and y0 = (m0 + n0) + m1, y1 = m1 + (m2 + n1): three sums an axis, nine for a tile, each one product over its terms
// and all channels. Transforms only add and subtract, so the error hardly grows.
//
// Of stride 1 it is F(2, 3), two outputs of four inputs:
//
//   m0 = (x0 - x2) g0 | m1 = (x1 + x2) (g0 + g1 + g2) / 2 | m2 = (x2 - x1) (g0 - g1 + g2) / 2 | m3 = (x1 - x3) g2
//
// and y0 = m0 + m1 + m2, y1 = m1 - m2 - m3: each sum is one term.
#pragma once

#include <cstdint>

#include "kernels/conv/conv.h"

namespace mnv4 {

// Along an axis.
struct WinogradForm {
  int terms;  // as many as a tile's inputs
  int sums;
  int step;  // inputs from a tile to the next
};

// [stride - 1]
inline constexpr WinogradForm kWinogradForms[] = {{4, 4, 2}, {5, 3, 4}};
inline constexpr int kWinogradMostTerms = 5;

struct WinogradTransforms {
  // One row of tiles of one plane: rows[i] is input row i of tile 0, tiles are `step` pixels apart, a pixel has
  // `channels` floats. Term (a, b) of tile t goes to terms + (terms of an axis * a + b) * term + t * channels.
  void (*make_terms)(const float* const* rows, int64_t tiles, int64_t channels, float* terms, ptrdiff_t term);
  // One panel of 16 channels: sum (i, j) of tile t is sums + (sums of an axis * i + j) * sum + t * 16. `width` pixels
  // go to y[0] and y[1], y_pixel floats apart; y[1] may be null.
  void (*make_rows)(const float* sums, ptrdiff_t sum, int64_t tiles, int64_t width, Activation act, float* const* y,
                    ptrdiff_t y_pixel);
};

struct WinogradKernels {
  const char* name;
  WinogradTransforms of_stride[2];  // [stride - 1]
};

// The first entry of the list that the active tier can run.
const WinogradKernels& winograd_kernels();

// Whether a convolution has this form; images (planar input) have too few channels.
bool winograd_fits(const ConvShape& shape, int64_t stride_h, int64_t stride_w, int64_t dilation_h);

// OIHW weights to [ceil(K / 16)][winograd_depth][16], and back, exactly: stride 1, whose terms don't tell every tap,
// has the weights themselves behind the panels. `winograd_floats` counts both.
int64_t winograd_depth(int64_t channels, int64_t stride);
int64_t winograd_floats(int64_t out_channels, int64_t channels, int64_t stride);
void pack_winograd(const float* weight, int64_t out_channels, int64_t channels, int64_t stride, float* packed);
void unpack_winograd(const float* packed, int64_t out_channels, int64_t channels, int64_t stride, float* weight);

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
  const WinogradForm form_;
  const WinogradTransforms& transforms_;
  const ConvArgs args_;
  // a tile is a window
  const ConvArgs tile_args_;
  PaddedRows rows_;
  // from a term and a sum to the next
  const ptrdiff_t term_;
  const ptrdiff_t sum_;
  float* terms_;
  float* sums_;
  ptrdiff_t* segment_;
  GemmArgs product_{};
};

}  // namespace mnv4
