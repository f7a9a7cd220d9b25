#include "simd/vec_avx2.h"

#include "kernels/training/training_impl.h"

namespace mnv4 {

extern const TrainingKernels training_avx2 = make_training_kernels("training_avx2");

}  // namespace mnv4
