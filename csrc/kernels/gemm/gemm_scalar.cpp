#include "simd/vec_scalar.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_scalar = {
    "gemm_f32_scalar", 2, {nullptr, gemm_tile<1, 1>, gemm_tile<2, 1>}, 0, 1, {nullptr},
};

}  // namespace mnv4
