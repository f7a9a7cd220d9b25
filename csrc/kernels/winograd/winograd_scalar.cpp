#include "simd/vec_scalar.h"

#include "kernels/winograd/winograd_impl.h"

namespace mnv4 {

extern const WinogradKernels winograd_scalar = {"winograd_scalar", MNV4_WINOGRAD_TRANSFORMS};

}  // namespace mnv4
