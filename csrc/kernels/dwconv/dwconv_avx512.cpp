#include "simd/vec_avx512.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_f32_avx512 = make_dwconv_kernel<float, float>("dwconv_f32_avx512");

}  // namespace mnv4
