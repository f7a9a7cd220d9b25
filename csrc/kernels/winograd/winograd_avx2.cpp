#include "simd/vec_avx2.h"

#include "kernels/winograd/winograd_impl.h"

namespace mnv4 {

extern const WinogradKernels winograd_avx2 = {"winograd_avx2", MNV4_WINOGRAD_TRANSFORMS};

}  // namespace mnv4
