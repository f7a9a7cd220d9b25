#include "simd/vec_scalar.h"

#include "kernels/peak/tile.h"

namespace mnv4 {

extern const PeakKernel peak_f32_scalar = {"peak_f32_scalar", kPeakOperations, peak_f32};

}  // namespace mnv4
