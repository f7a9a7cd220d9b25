// The workers of one parallel region and their barrier.
#pragma once

#include <atomic>
#include <cstdint>

namespace mnv4::engine {

// A thread may stand for several workers: a pool that was asked for `size` threads may bring fewer. Arrivals count
// workers, so the barrier opens whenever all of them are covered.
class Barrier {
 public:
  explicit Barrier(int64_t size) : size_(size) {}
  // Blocks until every worker has arrived; the caller stands for `workers` of them.
  void arrive(int64_t workers);

 private:
  const int64_t size_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> generation_{0};
};

}  // namespace mnv4::engine
