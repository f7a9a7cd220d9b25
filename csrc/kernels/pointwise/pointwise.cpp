#include "kernels/pointwise/pointwise.h"

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

}  // namespace mnv4
