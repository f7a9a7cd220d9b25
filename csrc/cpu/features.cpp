#include "cpu/features.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mnv4::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "neon", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)
// Tiles of the matrix unit, products of bfloat16, and Linux's permission to use their registers, which a process has to
// ask for before its first one.
bool amx_permitted() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Intel's cores with AMX, which AVX512-FP16 tells even where a hypervisor hides AMX, do a vdpbf16ps in two cycles: half
// of the rate of float32's multiply-adds, as measured on an Emerald Rapids.
bool bf16_is_slow() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("intel") || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kFp16 = 1u << 23;
  return (edx & kFp16) != 0;
}
#else
bool bf16_is_slow() { return false; }
#endif

Tier detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && amx_permitted()) return Tier::kAmx;
  if (bf16) return Tier::kAvx512Bf16;
  if (avx512) return Tier::kAvx512;
  if (avx2) return Tier::kAvx2;
  return Tier::kScalar;
#elif defined(__aarch64__)
  return Tier::kNeon;
#else
  return Tier::kScalar;
#endif
}

constexpr int kNoCap = static_cast<int>(Tier::kAmx);

int default_cap() {
  const char* name = std::getenv("MNV4_KERNELS_TIER");
  Tier tier;
  if (name && parse_tier(name, &tier)) return static_cast<int>(tier);
  const bool slow = detected_tier() == Tier::kAvx512Bf16 && bf16_is_slow();
  return slow ? static_cast<int>(Tier::kAvx512) : kNoCap;
}

std::atomic<int>& cap() {
  static std::atomic<int> value{default_cap()};
  return value;
}

long cache_size(int name, long fallback) {
  const long size = sysconf(name);
  return size > 0 ? size : fallback;
}

}  // namespace

const char* tier_name(Tier tier) { return kNames[static_cast<int>(tier)]; }

bool parse_tier(const char* name, Tier* tier) {
  for (int i = 0; i <= kNoCap; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *tier = static_cast<Tier>(i);
      return true;
    }
  }
  return false;
}

std::vector<Tier> compiled_tiers() {
#if defined(__x86_64__)
  return {Tier::kScalar, Tier::kAvx2, Tier::kAvx512, Tier::kAvx512Bf16, Tier::kAmx};
#elif defined(__aarch64__)
  return {Tier::kScalar, Tier::kNeon};
#else
  return {Tier::kScalar};
#endif
}

Tier detected_tier() {
  static const Tier tier = detect();
  return tier;
}

Tier active_tier() {
  const int detected = static_cast<int>(detected_tier());
  const int limit = cap().load(std::memory_order_relaxed);
  return static_cast<Tier>(detected < limit ? detected : limit);
}

void set_tier_cap(Tier tier) { cap().store(static_cast<int>(tier), std::memory_order_relaxed); }

void clear_tier_cap() { cap().store(default_cap(), std::memory_order_relaxed); }

const CacheSizes& cache_sizes() {
  static const CacheSizes sizes{
      cache_size(_SC_LEVEL1_DCACHE_SIZE, 32 << 10),
      cache_size(_SC_LEVEL2_CACHE_SIZE, 512 << 10),
      cache_size(_SC_LEVEL3_CACHE_SIZE, 8 << 20),
  };
  return sizes;
}

}  // namespace mnv4::cpu
