#include "simd/vec_neon.h"

#include "kernels/peak/tile.h"

namespace mnv4 {

extern const PeakKernel peak_f32_neon = {"peak_f32_neon", kPeakOperations, peak_f32};

}  // namespace mnv4
