#include "kernels/dwconv/dwconv.h"

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_DWCONV_KERNEL(tier, in, out, name) extern const DwconvKernel name;
#include "kernels/dwconv/dwconv.inc"
#undef MNV4_DWCONV_KERNEL

const DwconvKernel& dwconv_kernel(Storage input, Storage output) {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_DWCONV_KERNEL(tier, in, out, name) \
  if (active >= tier && input == in && output == out) return name;
#include "kernels/dwconv/dwconv.inc"
#undef MNV4_DWCONV_KERNEL
  return dwconv_f32_scalar;
}

}  // namespace mnv4
