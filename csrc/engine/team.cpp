#include "engine/team.h"

#include <sched.h>

#include <algorithm>

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

bool Queue::take_front(int64_t grain, int64_t* begin, int64_t* end) {
  uint64_t range = range_.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t left = last(range) - first(range);
    if (left <= 0) return false;
    *begin = first(range);
    *end = *begin + std::min(left, std::max(grain, (left + 1) / 2 / grain * grain));
    if (range_.compare_exchange_weak(range, pack(*end, last(range)), std::memory_order_relaxed)) return true;
  }
}

bool Queue::take_back(int64_t grain, int64_t* begin, int64_t* end) {
  uint64_t range = range_.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t left = last(range) - first(range);
    if (left < 2 * grain) return false;
    *end = last(range);
    *begin = *end - std::max(grain, left / 2 / grain * grain);
    if (range_.compare_exchange_weak(range, pack(first(range), *begin), std::memory_order_relaxed)) return true;
  }
}

}  // namespace mnv4::engine
