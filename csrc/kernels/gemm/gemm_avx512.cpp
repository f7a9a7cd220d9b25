// 14 rows x 16 columns: 14 sums and one weight vector of 32 registers; 97 to 99% of peak, wider tiles spill.
#include "simd/vec_avx512.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_avx512 = {
    "gemm_f32_avx512",
    14,
    {nullptr, gemm_tile<1, 1>, gemm_tile<2, 1>, gemm_tile<3, 1>, gemm_tile<4, 1>, gemm_tile<5, 1>, gemm_tile<6, 1>,
     gemm_tile<7, 1>, gemm_tile<8, 1>, gemm_tile<9, 1>, gemm_tile<10, 1>, gemm_tile<11, 1>, gemm_tile<12, 1>,
     gemm_tile<13, 1>, gemm_tile<14, 1>},
    3,
    4,
    {nullptr, gemm_tile<1, 4>, gemm_tile<2, 4>, gemm_tile<3, 4>},
};

}  // namespace mnv4
