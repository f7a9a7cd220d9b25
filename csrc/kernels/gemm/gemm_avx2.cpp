// 12 sums of 16 registers: 3 rows x 32 columns, three factors and a vector of weights; 6 rows x 16 columns, a factor
// and two vectors of weights.
#include "simd/vec_avx2.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

namespace {

// L1 has 32 KiB, and another thread may share it: 16 of them are for a pair's weights.
constexpr GemmKernel in_chains(GemmKernel kernel) {
  kernel.depth = 128;
  return kernel;
}

}  // namespace

extern const GemmKernel gemm_f32_avx2 = in_chains(make_gemm_kernel<float, float, 6, 3, 2, 3>("gemm_f32_avx2"));

}  // namespace mnv4
