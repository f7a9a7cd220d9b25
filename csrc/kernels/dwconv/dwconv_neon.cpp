#include "simd/vec_neon.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_f32_neon = make_dwconv_kernel<float, float>("dwconv_f32_neon");

}  // namespace mnv4
