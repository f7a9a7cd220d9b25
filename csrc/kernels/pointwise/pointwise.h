// What is left beside the products: widening and rounding of storage types, pooling, softmax.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/storage.h"

namespace mnv4 {

struct PointwiseKernels {
  const char* name;
  // y[i] = x[i], widened to float32
  void (*widen)(const void* x, Storage type, float* y, int64_t n);
  // y[i] = x[i], rounded to nearest even
  void (*narrow)(const float* x, Storage type, void* y, int64_t n);
  // y[3 i + c] = x[c * x_plane + i], rounded to bfloat16: an image's planes to pixels
  void (*narrow_triples)(const float* x, ptrdiff_t x_plane, uint16_t* y, int64_t n);
  // y[c] = mean over pixels of x[pixel][c]; the sum runs over pixels in order
  void (*mean_pixels)(const float* x, int64_t pixels, ptrdiff_t x_pixel, int64_t channels, float* y);
  // softmax of scale * x over `columns`, in place, for each row; rows are x_row apart
  void (*softmax_rows)(float* x, int64_t rows, int64_t columns, ptrdiff_t x_row, float scale);
  // The way back through it: from weights w and their gradients g to those of x, in place of g, row by row:
  // w (g - sum(w g)) scale
  void (*softmax_gradient_rows)(const float* weights, float* grad, int64_t rows, int64_t columns, ptrdiff_t row_pitch,
                                float scale);
};

// The first entry of the list that the active tier can run.
const PointwiseKernels& pointwise_kernels();

// values[i] as it is once stored as `type`
void round_to(Storage type, float* values, int64_t n);

}  // namespace mnv4
