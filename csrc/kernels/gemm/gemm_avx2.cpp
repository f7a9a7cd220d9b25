// 6 rows x 16 columns: 12 sums, two weight vectors and one broadcast of 16 registers.
#include "simd/vec_avx2.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_avx2 = make_gemm_kernel<float, float, 6, 1, 4>("gemm_f32_avx2");

}  // namespace mnv4
