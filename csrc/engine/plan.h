// The schedule of a program for one input shape and number of workers.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/job.h"
#include "engine/memory.h"
#include "engine/program.h"
#include "engine/team.h"

namespace mnv4::engine {

struct Shape {
  int64_t images = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  // behind the pool: [images, channels] instead of a map
  bool vector = false;
};

// A node's arrays in the order in which the kernels read them.
struct PackedNode {
  std::vector<const void*> arrays;
};

struct Step {
  int64_t node = 0;       // the program's node that it computes, or begins with
  const char* part = "";  // what of it
  std::vector<std::unique_ptr<Job>> jobs;
  // [job][worker]: first unit of each worker's share, one more entry than workers
  std::vector<std::vector<int64_t>> bounds;
  // [worker] what each brings into its cache meanwhile
  struct Ahead {
    std::vector<Stream::Range> ranges;
    double rate = 0.0;
  };
  std::vector<Ahead> ahead;
};

class Plan {
 public:
  Plan(const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t workers, int64_t tag,
       Storage compute);

  // Runs workers [begin, end) of the plan; all workers must be running at the same time.
  void run(const Context& context, Barrier& barrier, int64_t begin, int64_t end, float* scratch) const;

  // An arena of this plan's size with every worker's scratch behind it; given back when done.
  Memory borrow();
  void give_back(Memory memory);

  const std::vector<Shape>& outputs() const { return outputs_; }
  int64_t workers() const { return workers_; }
  int64_t arena_bytes() const { return arena_bytes_; }
  int64_t scratch_floats() const { return scratch_floats_; }
  // Worker w's scratch in a borrowed arena.
  float* scratch(const Memory& memory, int64_t w) const {
    return reinterpret_cast<float*>(memory.data() + arena_bytes_) + w * scratch_floats_;
  }
  const std::vector<Step>& steps() const { return steps_; }

 private:
  friend class Planner;
  std::vector<Step> steps_;
  std::vector<Shape> outputs_;
  // biases of attention's products; earlier ones stay where they are
  std::deque<std::vector<float>> zeros_;
  int64_t workers_;
  int64_t arena_bytes_ = 0;
  int64_t scratch_floats_ = 0;
  std::mutex mutex_;
  std::vector<Memory> free_;
};

}  // namespace mnv4::engine
