#include "simd/vec_neon.h"

#include "kernels/training/training_impl.h"

namespace mnv4 {

extern const TrainingKernels training_neon = make_training_kernels("training_neon");

}  // namespace mnv4
