#include "simd/vec_scalar.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_f32_scalar = make_dwconv_kernel<float, float>("dwconv_f32_scalar");

}  // namespace mnv4
