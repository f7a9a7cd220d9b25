#include "simd/vec_avx2.h"

#include "kernels/pointwise/pointwise_impl.h"

namespace mnv4 {

extern const PointwiseKernels pointwise_avx2 = {
    "pointwise_avx2", widen, narrow, narrow_triples, mean_pixels, softmax_rows, softmax_gradient_rows};

}  // namespace mnv4
