#include "kernels/gemm/amx.h"
#include "kernels/peak/peak.h"

namespace mnv4 {
namespace {

// tdpbf16ps: 16 x 16 sums of 32 products each
float peak_bf16(int64_t iterations) {
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.row_bytes[t] = 64;
    shapes.rows[t] = kMatrixRows;
  }
  load_shapes(shapes);
  for (int64_t t = 0; t < iterations; ++t) {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  alignas(64) float sums[kMatrixRows * kPanel];
  store_tile<0>(sums, 64);
  release_tiles();
  return sums[0];
}

}  // namespace

extern const PeakKernel peak_bf16_amx = {"peak_bf16_amx", int64_t{4} * 2 * kMatrixRows* kPanel* kMatrixDepth,
                                         peak_bf16};

}  // namespace mnv4
