#include "kernels/pointwise/pointwise.h"

#include <algorithm>

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_POINTWISE_KERNELS(tier, name) extern const PointwiseKernels name;
#include "kernels/pointwise/pointwise.inc"
#undef MNV4_POINTWISE_KERNELS

const PointwiseKernels& pointwise_kernels() {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_POINTWISE_KERNELS(tier, name) \
  if (active >= tier) return name;
#include "kernels/pointwise/pointwise.inc"
#undef MNV4_POINTWISE_KERNELS
  return pointwise_scalar;
}

void round_to(Storage type, float* values, int64_t n) {
  if (type == Storage::kFloat32) return;
  uint16_t rounded[512];
  for (int64_t i = 0; i < n; i += 512) {
    const int64_t count = std::min<int64_t>(512, n - i);
    pointwise_kernels().narrow(values + i, type, rounded, count);
    pointwise_kernels().widen(rounded, type, values + i, count);
  }
}

}  // namespace mnv4
