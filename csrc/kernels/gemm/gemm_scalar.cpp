#include "simd/vec_scalar.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_scalar = {
    "gemm_f32_scalar", 2, MNV4_GEMM_TABLE(MNV4_GEMM_TILES_2), 0, 1, {nullptr},
};

}  // namespace mnv4
