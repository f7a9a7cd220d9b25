#include "simd/vec_scalar.h"

#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_f32_scalar = make_gemm_kernel<float, float, 2, 1, 1>("gemm_f32_scalar");

}  // namespace mnv4
