#include "simd/vec_scalar.h"

#include "kernels/training/training_impl.h"

namespace mnv4 {

extern const TrainingKernels training_scalar = make_training_kernels("training_scalar");

}  // namespace mnv4
