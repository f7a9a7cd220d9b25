#include "simd/vec_avx2.h"

#include "kernels/dwconv/tile.h"

namespace mnv4 {

extern const DwconvKernel dwconv_f32_avx2 = {"dwconv_f32_avx2", dwconv_run};

}  // namespace mnv4
