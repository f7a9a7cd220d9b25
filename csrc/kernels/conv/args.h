// A dense convolution, whichever kernel computes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/gemm/gemm.h"

namespace mnv4 {

// What decides how weights are packed and rows are kept.
struct ConvShape {
  int64_t channels;
  int kernel_h;
  int kernel_w;
  bool dilated;  // along the width
  // Every run of K is rounded up to an even length, as products of bfloat16 need; the weights there are zeros.
  bool pairs;
  // Weights are packed by pack_winograd (kernels/winograd), not by pack_conv.
  bool winograd = false;
};

// Strides are in elements. NHWC and planes of 16 channels differ only in x_block and x_pixel, y_panel and y_pixel.
// x is of the kernel's input type or float32, the weights are of the kernel's input type, y of its output type.
struct ConvArgs {
  const void* x;
  Storage x_type;
  ptrdiff_t x_channel;  // planar input
  ptrdiff_t x_block;    // else: from 16 channels to the next 16, or where they lie in pairs, from 32 to the next 32
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
  bool pairs = false;
  bool winograd = false;
  bool x_paired = false;
  bool y_paired = false;     // as GemmArgs::paired
  Stream* stream = nullptr;  // or what to fetch meanwhile

  ConvShape shape() const { return {channels, kernel_h, kernel_w, dilation_w != 1, pairs, winograd}; }
};

}  // namespace mnv4
