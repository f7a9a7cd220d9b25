#include "simd/vec_avx512.h"

#include "kernels/pointwise/pointwise_impl.h"

namespace mnv4 {

extern const PointwiseKernels pointwise_avx512 = {
    "pointwise_avx512", widen, narrow, narrow_triples, mean_pixels, softmax_rows, softmax_gradient_rows};

}  // namespace mnv4
