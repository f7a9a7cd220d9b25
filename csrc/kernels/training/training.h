// What training adds to the products and convolutions: normalising what they read, the moments of what they wrote,
// weight gradients, and the way back through a BatchNorm and an activation.
//
// Maps are rows of channels, `row` floats apart: pixels of an NHWC tensor. Panels are [panel][row][16], the last one
// filled up with zeros. Vectors over channels are padded with zeros to whole panels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"

namespace mnv4 {

// a = act((x - mean) * slope + shift)
struct Normalisation {
  const float* mean;
  const float* slope;
  const float* shift;
  Activation act;
};

// The whole gradient of a convolution's result z, directly and through its moments: grad + constant + factor (z -
// mean).
struct MomentsGradient {
  const float* grad;
  ptrdiff_t grad_row;
  const float* z;  // null: grad alone
  ptrdiff_t z_row;
  const float* mean;
  const float* constant;
  const float* factor;
};

// Where panels or rows of a result go.
struct Target {
  float* data;
  ptrdiff_t row;
  ptrdiff_t panel;
  // true: the last panel is written whole, zeros behind the channels
  bool padded;
};

// One 16 x 16 tile of a weight gradient: tile[o][c] (+)= sum over rows i and columns j of left[i][j][o] *
// right[i][j][c].
struct OuterArgs {
  const float* left;
  ptrdiff_t left_row;
  ptrdiff_t left_column;
  const float* right;
  ptrdiff_t right_row;
  ptrdiff_t right_column;
  int64_t rows;
  int64_t columns;
  float* tile;
  bool first;  // store instead of add
};

// Gradient of a depthwise kernel over one plane of 16 channels: out[ky][kx][16] += sum of grad * x.
struct DepthwiseWeightArgs {
  const float* x;  // padded plane, [rows][x_row / 16][16]
  ptrdiff_t x_row;
  const float* grad;  // [height][width][16]
  int64_t height;
  int64_t width;
  int kernel_h;
  int kernel_w;
  int stride_h;
  int stride_w;
  int dilation_h;
  int dilation_w;
  float* out;
};

// The end of a block: y = act(bn(x)) * scale + residual, and back.
struct BlockEnd {
  Normalisation norm;
  const float* scale;  // layer scale times stochastic depth, per channel
  const float* x;
  ptrdiff_t x_row;
  int64_t rows;
  int64_t channels;
};

struct TrainingKernels {
  const char* name;
  // y = act(bn(x))
  void (*activate)(const Normalisation& norm, const float* x, ptrdiff_t x_row, int64_t rows, int64_t channels,
                   const Target& y);
  void (*result_gradient)(const MomentsGradient& gradient, int64_t rows, int64_t channels, const Target& y);
  // mean[c] and the sum of squares about it, m2[c], over the rows
  void (*moments)(const float* z, ptrdiff_t z_row, int64_t rows, int64_t channels, float* mean, float* m2);
  // From da to dx, through activation and BatchNorm; adds to sums[0][c] the gradient g of the activation's argument and
  // to sums[1][c] g * (x - mean). dx may be da.
  void (*input_gradient)(const Normalisation& norm, const float* da, ptrdiff_t da_row, ptrdiff_t da_panel,
                         const float* x, ptrdiff_t x_row, int64_t rows, int64_t channels, float* dx, ptrdiff_t dx_row,
                         float* sums);
  void (*outer)(const OuterArgs& args);
  void (*depthwise_weight)(const DepthwiseWeightArgs& args);
  void (*block_end)(const BlockEnd& end, const float* residual, ptrdiff_t residual_row, float* y);
  // Also adds to sums[2][c] grad * act(bn(x)).
  void (*block_end_gradient)(const BlockEnd& end, const float* grad, ptrdiff_t grad_row, float* dx, float* sums);
};

// The first entry of the list that the active tier can run.
const TrainingKernels& training_kernels();

}  // namespace mnv4
