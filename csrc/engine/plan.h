// The schedule of a program for one input shape and number of workers.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/layout.h"
#include "engine/memory.h"
#include "engine/program.h"
#include "engine/shares.h"
#include "engine/team.h"

namespace mnv4::engine {

// A node's arrays in the order in which the kernels read them.
struct PackedNode {
  std::vector<const void*> arrays;
  bool pairs = false;     // as ConvArgs::pairs
  bool winograd = false;  // as ConvArgs::winograd
};

class Plan {
 public:
  Plan(const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t workers, int64_t tag,
       Storage compute, int64_t cache_bytes);

  // Runs workers [begin, end) of the plan; all workers must be running at the same time.
  void run(const Context& context, Team& team, int64_t begin, int64_t end, float* scratch) const;

  // Jobs of the step that has the most of them.
  int64_t most_jobs() const;

  // For each of `teams` that run at the same time an arena of this plan's size, with every worker's scratch behind it;
  // given back when done.
  Memory borrow(int64_t teams);
  void give_back(Memory memory);

  const std::vector<Shape>& outputs() const { return outputs_; }
  int64_t workers() const { return workers_; }
  int64_t arena_bytes() const { return arena_bytes_; }
  int64_t scratch_floats() const { return scratch_floats_; }
  char* arena(const Memory& memory, int64_t team) const { return memory.data() + team * team_bytes(); }
  // The scratch of a team's worker w.
  float* scratch(const Memory& memory, int64_t team, int64_t w) const {
    return reinterpret_cast<float*>(arena(memory, team) + arena_bytes_) + w * scratch_floats_;
  }
  const std::vector<Step>& steps() const { return steps_; }

 private:
  friend class Planner;
  int64_t team_bytes() const {
    const int64_t scratch_bytes = workers_ * scratch_floats_ * static_cast<int64_t>(sizeof(float));
    return round_up(arena_bytes_ + scratch_bytes, 4096);
  }
  // Fills the queues of workers [begin, end) for a step.
  void prepare(Team& team, size_t step, int64_t begin, int64_t end) const;

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
