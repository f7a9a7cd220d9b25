// The workers of one parallel region: who waits for whom, and who helps whom.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

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

// What is left of one worker's share of a job: the owner takes from the front, others who are done from the back.
class Queue {
 public:
  // Only while nobody takes.
  void reset(int64_t begin, int64_t end) { range_.store(pack(begin, end), std::memory_order_relaxed); }
  // The next run of units: half of what is left, in multiples of `grain` and at least one. False where nothing is.
  bool take_front(int64_t grain, int64_t* begin, int64_t* end);
  // The same for another worker, who leaves the owner its last runs.
  bool take_back(int64_t grain, int64_t* begin, int64_t* end);

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static int64_t first(uint64_t range) { return static_cast<int64_t>(range >> 32); }
  static int64_t last(uint64_t range) { return static_cast<int64_t>(range & 0xffffffff); }

  alignas(64) std::atomic<uint64_t> range_{0};
};

// The workers of one run of a plan: their barrier, and the queues of the step that runs and of the next one.
class Team {
 public:
  Team(int64_t workers, int64_t jobs)
      : barrier(workers), workers_(workers), jobs_(jobs), queues_(static_cast<size_t>(2 * jobs * workers)) {}
  Queue& queue(size_t step, size_t job, int64_t worker) {
    return queues_[(step % 2 * static_cast<size_t>(jobs_) + job) * static_cast<size_t>(workers_) +
                   static_cast<size_t>(worker)];
  }
  int64_t workers() const { return workers_; }

  Barrier barrier;

 private:
  const int64_t workers_;
  const int64_t jobs_;
  std::vector<Queue> queues_;
};

}  // namespace mnv4::engine
