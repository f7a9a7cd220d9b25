#include "simd/vec_avx512.h"

#include "kernels/training/training_impl.h"

namespace mnv4 {

extern const TrainingKernels training_avx512 = make_training_kernels("training_avx512");

}  // namespace mnv4
