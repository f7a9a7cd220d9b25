// 6 rows x 16 columns: 12 sums, two weight vectors and one broadcast of 16 registers.
#include "simd/vec_avx2.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_avx2 = {
    "gemm_f32_avx2", 6, MNV4_GEMM_TABLE(MNV4_GEMM_TILES_6), 1, 4, {nullptr, gemm_tile<1, 4>},
};

}  // namespace mnv4
