#include "engine/team.h"

#include <sched.h>

namespace mnv4::engine {
namespace {

// Spins before the core is offered to others: a step takes tens of microseconds, a pause about 40 ns.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::arrive(int64_t workers) {
  if (workers == size_) return;
  const int64_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(workers, std::memory_order_acq_rel) + workers == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation;) {
    if (++spins < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace mnv4::engine
