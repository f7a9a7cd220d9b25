#include "simd/vec_avx512.h"

#include "kernels/winograd/winograd_impl.h"

namespace mnv4 {

extern const WinogradKernels winograd_avx512 = {"winograd_avx512", MNV4_WINOGRAD_TRANSFORMS};

}  // namespace mnv4
