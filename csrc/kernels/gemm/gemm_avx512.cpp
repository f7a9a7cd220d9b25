// 14 rows x 16 columns: 14 sums and one weight vector of 32 registers; 97 to 99% of peak, wider tiles spill.
#include "simd/vec_avx512.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_avx512 = {
    "gemm_f32_avx512", 14, MNV4_GEMM_TABLE(MNV4_GEMM_TILES_14),
    3,                 4,  {nullptr, gemm_tile<1, 4>, gemm_tile<2, 4>, gemm_tile<3, 4>},
};

}  // namespace mnv4
