#include "simd/vec_avx512.h"

#include "kernels/gemm/matrix.h"
#include "kernels/gemm/tile.h"

namespace mnv4 {

extern const GemmKernel gemm_bf16_bf16_amx = make_matrix_kernel<Pairs, simd::Bf16>("gemm_bf16_bf16_amx");
extern const GemmKernel gemm_bf16_f32_amx = make_matrix_kernel<Pairs, float>("gemm_bf16_f32_amx");
// Processors with AMX do two multiply-adds of 512 bits a cycle and two loads: tiles of one panel, which load for each
// multiply-add, reach 90% of the peak, pairs of panels 97%.
extern const GemmKernel gemm_f32_amx = with_split(make_gemm_kernel<float, float, 14, 3, 4, 12>("gemm_f32_amx"));

}  // namespace mnv4
