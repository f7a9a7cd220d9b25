#include "simd/vec_avx2.h"

#include "kernels/peak/tile.h"

namespace mnv4 {

extern const PeakKernel peak_f32_avx2 = {"peak_f32_avx2", kPeakOperations, peak_f32};

}  // namespace mnv4
