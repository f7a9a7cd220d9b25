#include "simd/vec_avx512.h"

#include "kernels/peak/tile.h"

namespace mnv4 {

extern const PeakKernel peak_f32_avx512 = {"peak_f32_avx512", kPeakOperations, peak_f32};

}  // namespace mnv4
