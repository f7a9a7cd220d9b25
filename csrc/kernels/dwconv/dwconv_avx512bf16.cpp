#include "simd/vec_avx512.h"

#include "kernels/dwconv/pairs.h"

namespace mnv4 {

extern const DwconvKernel dwconv_bf16_bf16_avx512bf16 =
    make_dwconv_kernel<simd::Bf16, simd::Bf16>("dwconv_bf16_bf16_avx512bf16");
extern const DwconvKernel dwconv_f32_bf16_avx512bf16 =
    make_dwconv_kernel<float, simd::Bf16>("dwconv_f32_bf16_avx512bf16");

}  // namespace mnv4
