#include "simd/vec_neon.h"

#include "kernels/pointwise/pointwise_impl.h"

namespace mnv4 {

extern const PointwiseKernels pointwise_neon = {
    "pointwise_neon", widen, narrow, narrow_triples, mean_pixels, softmax_rows, softmax_gradient_rows};

}  // namespace mnv4
