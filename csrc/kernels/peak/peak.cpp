#include "kernels/peak/peak.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/features.h"

namespace mnv4 {

#define MNV4_PEAK_KERNEL(tier, name, bf16) extern const PeakKernel name;
#include "kernels/peak/peak.inc"
#undef MNV4_PEAK_KERNEL

const PeakKernel& peak_kernel(bool bf16) {
  using cpu::Tier;
  const Tier active = cpu::active_tier();
#define MNV4_PEAK_KERNEL(tier, name, takes_bf16) \
  if (active >= tier && bf16 >= takes_bf16) return name;
#include "kernels/peak/peak.inc"
#undef MNV4_PEAK_KERNEL
  return peak_f32_scalar;
}

namespace {

using Clock = std::chrono::steady_clock;

// Long enough that starting a thread (some 20 us) hardly counts, short enough to find a quiet moment.
constexpr double kSeconds = 0.005;
constexpr int kTries = 40;

double seconds_of(const PeakKernel& kernel, int64_t iterations, int threads) {
  [[maybe_unused]] static volatile float sink;
  std::vector<std::thread> others;
  const auto start = Clock::now();
  for (int i = 1; i < threads; ++i) others.emplace_back([&] { sink = kernel.run(iterations); });
  sink = kernel.run(iterations);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

double peak_gflops(bool bf16, int threads) {
  const PeakKernel& kernel = peak_kernel(bf16);
  int64_t iterations = 1 << 12;
  while (seconds_of(kernel, iterations, 1) < kSeconds) iterations *= 2;
  double best = seconds_of(kernel, iterations, threads);
  for (int i = 1; i < kTries; ++i) best = std::min(best, seconds_of(kernel, iterations, threads));
  return static_cast<double>(kernel.operations * iterations * threads) / best * 1e-9;
}

}  // namespace mnv4
