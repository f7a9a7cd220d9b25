#include "simd/vec_neon.h"

#include "kernels/winograd/winograd_impl.h"

namespace mnv4 {

extern const WinogradKernels winograd_neon = {"winograd_neon", MNV4_WINOGRAD_TRANSFORMS};

}  // namespace mnv4
