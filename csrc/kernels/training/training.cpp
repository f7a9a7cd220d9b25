#include "kernels/training/training.h"

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_TRAINING_KERNELS(tier, name) extern const TrainingKernels name;
#include "kernels/training/training.inc"
#undef MNV4_TRAINING_KERNELS

const TrainingKernels& training_kernels() {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_TRAINING_KERNELS(tier, name) \
  if (active >= tier) return name;
#include "kernels/training/training.inc"
#undef MNV4_TRAINING_KERNELS
  return training_scalar;
}

}  // namespace mnv4
