#include "kernels/dwconv/dwconv.h"

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_DWCONV_KERNEL(tier, name) extern const DwconvKernel name;
#include "kernels/dwconv/dwconv.inc"
#undef MNV4_DWCONV_KERNEL

const DwconvKernel& dwconv_kernel() {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_DWCONV_KERNEL(tier, name) \
  if (active >= tier) return name;
#include "kernels/dwconv/dwconv.inc"
#undef MNV4_DWCONV_KERNEL
  return dwconv_f32_scalar;
}

}  // namespace mnv4
