// Depthwise convolution: a row of output pixels of one 16-channel block at a time, in registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/storage.h"

namespace mnv4 {

// Geometry of a depthwise convolution over an image; strides are in elements, x and y of the kernel's types.
struct DwconvArgs {
  const void* x;  // [H][W][C]
  ptrdiff_t x_row;
  ptrdiff_t x_pixel;
  int64_t height;
  int64_t width;
  void* y;  // [Ho][Wo][C]
  ptrdiff_t y_row;
  ptrdiff_t y_pixel;
  int64_t out_height;
  int64_t out_width;
  // packed [ceil(C / 16)][kh * kw][16]; where x is bfloat16, their values are, too
  const float* weight;
  const float* bias;  // [C]
  int64_t channels;
  int kernel_h;
  int kernel_w;
  int stride_h;
  int stride_w;
  int pad_top;
  int pad_left;
  int dilation_h;
  int dilation_w;
  Activation act;
};

struct DwconvKernel {
  const char* name;
  Storage input;
  Storage output;
  // Output rows [row_begin, row_end) of channels [channel_begin, channel_end); channel_begin is a multiple of 16.
  void (*run)(const DwconvArgs& args, int64_t row_begin, int64_t row_end, int64_t channel_begin, int64_t channel_end);
};

// The first kernel of the list that the active tier can run; every tier has float32 in and out.
const DwconvKernel& dwconv_kernel(Storage input = Storage::kFloat32, Storage output = Storage::kFloat32);

}  // namespace mnv4
