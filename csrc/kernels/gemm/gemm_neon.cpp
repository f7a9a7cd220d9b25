// 6 rows x 16 columns: 24 sums, four weight vectors and a row's factor of 32 registers.
#include "simd/vec_neon.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_neon = make_gemm_kernel<float, float, 6, 3, 2>("gemm_f32_neon");

}  // namespace mnv4
