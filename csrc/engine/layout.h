// What a program's nodes are for one input shape: sizes, padding, who reads whom, how each is stored.
#pragma once

#include <vector>

#include "engine/job.h"
#include "engine/program.h"

namespace mnv4::engine {

struct Shape {
  int64_t images = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  // behind the pool: [images, channels] instead of a map
  bool vector = false;
};

struct Pads {
  int top = 0, left = 0;
};

class Layout {
 public:
  // Throws std::invalid_argument for an image too small for the network.
  Layout(const Program& program, const Shape& input, int64_t tag, Storage compute);

  int64_t count() const { return static_cast<int64_t>(program_.nodes.size()); }
  const Node& node(int64_t id) const { return program_.nodes[static_cast<size_t>(id)]; }
  const Shape& shape(int64_t id) const { return shapes_[static_cast<size_t>(id)]; }
  const Pads& pads(int64_t id) const { return pads_[static_cast<size_t>(id)]; }
  // False for what no output of the tag depends on.
  bool needed(int64_t id) const { return needed_[static_cast<size_t>(id)]; }
  // Times that needed nodes read `id`.
  int64_t reads_of(int64_t id) const;
  // The node's planes of `images` out of `stored`, at no offset yet.
  Planes planes(int64_t id, int64_t images, int64_t stored) const;
  int64_t image_bytes(int64_t id) const { return planes(id, 1, 1).bytes(); }
  // A leading dense convolution reads the caller's tensor as it lies; anything else wants planes.
  bool input_needs_planes() const;
  // A product that only the depthwise or the pool right behind it reads. What a pool reads stays as it was summed,
  // whether they run as one step, which depends on the number of workers, or as two: the same bits either way. Kernels
  // add residuals of their output's type, so beside one in bfloat16 the sum can't stay in float32.
  bool feeds_rider(int64_t id) const;
  // A product whose rows, packed for a matrix unit, don't leave room for the rest in L2.
  bool outgrows_cache(int64_t id) const;
  // A dense convolution whose rows only the dense convolution right behind it reads.
  bool feeds_conv(int64_t id) const;
  // A dense convolution whose rows only the pointwise one right behind it reads.
  bool feeds_projection(int64_t id) const;
  // Sizes and pads of attention's downsampled keys and values.
  Shape downsampled(int64_t id, Pads* pads) const;

 private:
  void find_needed(int64_t tag);
  void infer_shapes(const Shape& input);
  // Logits and features are handed out as they were summed.
  bool is_result(int64_t id) const;

  const Program& program_;
  Storage compute_;
  std::vector<Shape> shapes_;
  std::vector<Pads> pads_;
  std::vector<bool> needed_;
};

}  // namespace mnv4::engine
