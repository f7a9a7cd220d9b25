#include "simd/vec_scalar.h"

#include "kernels/pointwise/pointwise_impl.h"

namespace mnv4 {

extern const PointwiseKernels pointwise_scalar = {
    "pointwise_scalar", widen, narrow, narrow_triples, mean_pixels, softmax_rows, softmax_gradient_rows};

}  // namespace mnv4
