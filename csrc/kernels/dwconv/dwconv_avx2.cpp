#include "simd/vec_avx2.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_f32_avx2 = make_dwconv_kernel<float, float>("dwconv_f32_avx2");

}  // namespace mnv4
