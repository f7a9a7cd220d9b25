// Which instruction sets this machine has, and which of them may be used.
#pragma once

#include <vector>

namespace mnv4::cpu {

// Ordered: a later tier includes every earlier one of its architecture.
enum class Tier { kScalar, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* tier_name(Tier tier);

// Tiers whose kernels are in this build, worst first.
std::vector<Tier> compiled_tiers();

// Best compiled tier that this machine can run.
Tier detected_tier();

// The tier in use: the detected one, lowered by the cap. Without a cap that somebody set, the fastest one.
Tier active_tier();

// Limits the tier in use, for tests and as MNV4_KERNELS_TIER does; a cap above the detected tier changes nothing.
void set_tier_cap(Tier cap);
void clear_tier_cap();

// Name to tier; false where no tier has that name.
bool parse_tier(const char* name, Tier* tier);

// Bytes of the last-level data caches that the planner sizes its blocks by.
struct CacheSizes {
  long l1;
  long l2;
  long l3;
};
const CacheSizes& cache_sizes();

}  // namespace mnv4::cpu
