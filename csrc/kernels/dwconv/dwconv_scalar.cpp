#include "simd/vec_scalar.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_f32_scalar = {"dwconv_f32_scalar", dwconv_run};

}  // namespace mnv4
