// Dense k x k convolution as a product over segments: the stem and EdgeResidual's 3x3.
//
// A worker keeps the padded input rows that an output row needs in a ring, so that no tap is out of bounds and nothing
// is multiplied by padding that is not zero anyway; each input row is copied once per worker.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/gemm.h"

namespace mnv4 {

// Strides are in elements. NHWC and planes of 16 channels differ only in x_block and x_pixel, y_panel and y_pixel.
// x and the weights are of the kernel's input type, y of its output type.
struct ConvArgs {
  const void* x;
  ptrdiff_t x_channel;  // planar input
  ptrdiff_t x_block;    // else: from 16 channels to the next 16
  ptrdiff_t x_row;
  ptrdiff_t x_pixel;
  int64_t channels;
  int64_t height;
  int64_t width;
  const void* weight;  // packed [ceil(K / 16)][conv_depth][16] by pack_conv
  const float* bias;   // [ceil(K / 16) * 16]
  void* y;
  ptrdiff_t y_row;
  ptrdiff_t y_pixel;
  ptrdiff_t y_panel;
  int64_t out_channels;
  int64_t out_height;
  int64_t out_width;
  int kernel_h;
  int kernel_w;
  int stride_h;
  int stride_w;
  int pad_top;
  int pad_left;
  int dilation_h;
  int dilation_w;
  Activation act;
  Stream* stream = nullptr;  // or what to fetch meanwhile
};

// Few input channels (an image): rows are kept channel by channel and the reduction runs over (c, ky, kx); otherwise
// in blocks of 16 channels, over (ky, block, kx, c), the last block padded with zeros.
inline constexpr bool conv_is_planar(int64_t channels) { return channels < kPanel; }

// Length of the packed reduction.
inline constexpr int64_t conv_depth(int64_t channels, int64_t taps) {
  return (conv_is_planar(channels) ? channels : round_up(channels, kPanel)) * taps;
}

// Floats of scratch that one worker needs, whatever the kernel's input type.
int64_t conv_scratch(const ConvArgs& args);

// Output rows [row_begin, row_end), all output channels.
void conv(const GemmKernel& kernel, const ConvArgs& args, int64_t row_begin, int64_t row_end, float* scratch);

// OIHW weights to [ceil(K / 16)][conv_depth][16].
void pack_conv(const float* weight, int64_t out_channels, int64_t channels, int kernel_h, int kernel_w, float* packed);

}  // namespace mnv4
