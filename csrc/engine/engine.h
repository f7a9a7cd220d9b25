// A program with its weights packed once, and its plans by input shape.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "engine/plan.h"
#include "engine/program.h"

namespace mnv4::engine {

// Calls body(begin, end) on ranges that cover [0, workers), all at the same time.
using ParallelRegion = std::function<void(int64_t workers, const std::function<void(int64_t, int64_t)>& body)>;

class Engine {
 public:
  // `compute` is how activations and the products' weights are stored: float32, or bfloat16, which runs as float32 on
  // the same rounded weights while the tier in use does not multiply it. The weights are zero: pack() brings each.
  Engine(std::vector<Node> nodes, Storage compute);

  // Reads weights where they lie, packed by pack() for the same nodes and `compute`: they must be there in every run.
  Engine(std::vector<Node> nodes, Storage compute, char* packed);

  // Bytes that pack() writes for a program of these nodes; the arrays may be missing.
  static int64_t packed_bytes(const Program& program, Storage compute);
  static void pack(const Program& program, Storage compute, char* to, int64_t workers, const ParallelRegion& parallel);

  // The program's array `number`, which nobody needs to keep. Before the first run: it may not be read meanwhile.
  void pack(int64_t number, const Array& array);

  // Shapes of the outputs for an input of `shape`.
  std::vector<Shape> output_shapes(const Shape& shape, int64_t workers, int64_t tag);

  // The program's arrays, flat, as they are stored: nobody else needs to keep them.
  std::vector<std::vector<float>> arrays() const;

  int64_t channels() const { return program_.nodes.front().channels; }

  // Thread-safe; `shape` has channels() channels. Input strides in floats; outputs dense NCHW or NHWC.
  void run(const Shape& shape, const Input& input, const std::vector<float*>& outputs, bool nhwc, int64_t workers,
           int64_t tag, const ParallelRegion& parallel);

  // Seconds of each step, [repeats][steps], and what each step is, as in Step.
  struct Profile {
    struct What {
      int64_t node;
      std::string part;
      std::string reason;
    };
    std::vector<double> seconds;
    std::vector<What> steps;
  };
  Profile profile(const Shape& shape, const Input& input, int64_t workers, int64_t tag, int64_t repeats,
                  const ParallelRegion& parallel);

 private:
  // The first images of a batch: `shape` is what each of `teams` plans computes at the same time.
  struct Part {
    std::shared_ptr<Plan> plan;
    Shape shape;
    int64_t teams;
  };
  // As many as there are workers take equal numbers of images each, and each computes its own from end to end: maps
  // stay in its own L2, and nobody waits. What is left of a batch is shared, image by image.
  Part part(const Shape& shape, int64_t workers, int64_t tag);
  // `context` without an arena.
  void run_part(const Part& part, const Context& context, const ParallelRegion& parallel);

  // An array's place in the packed weights.
  struct Slot {
    size_t node;
    size_t array;
    Storage type;
    int64_t depth;  // values of K in a panel
    int64_t panels;
  };
  struct Entry {
    Shape shape;
    int64_t workers;
    int64_t tag;
    cpu::Tier tier;
    std::shared_ptr<Plan> plan;
  };

  const std::vector<PackedNode>& packed_for(Storage compute);
  std::shared_ptr<Plan> plan(const Shape& shape, int64_t workers, int64_t tag);

  void find(char* packed);

  Program program_;
  Storage compute_;
  std::vector<Slot> slots_;
  Memory weights_;
  std::vector<PackedNode> packed_;
  // bfloat16 weights widened for a lower tier, made at need
  Memory widened_;
  std::vector<PackedNode> widened_packed_;
  std::mutex mutex_;
  std::list<Entry> plans_;  // most recent first
};

}  // namespace mnv4::engine
