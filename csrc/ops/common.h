// What every op does around its kernel: checks, memory format, storage types, scratch, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/team.h"
#include "kernels/gemm/gemm.h"
#include "kernels/pointwise/pointwise.h"

// hidden, like the stable ABI's own types that its classes hold
namespace mnv4 {
namespace [[gnu::visibility("hidden")]] ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using IntList = std::vector<int64_t>;

// "[2, 3, 5]"
std::string shape_text(const Tensor& t);

// Raises "`name` must be <what>, got [..]" where the condition fails.
#define MNV4_CHECK_SHAPE(condition, tensor, name, ...) \
  STD_TORCH_CHECK(condition, "`" name "` must ", __VA_ARGS__, ", got ", shape_text(tensor))

// The storage type of a floating-point CPU tensor; raises on any other.
Storage storage_of(const Tensor& t, const char* name);

Activation activation_of(const std::string& name);

// An uninitialised CPU tensor of at most four dimensions, NCHW or NHWC.
Tensor fresh(const IntList& size, torch::headeronly::ScalarType type, bool channels_last = false);

// The elements of a dense tensor from `offset` on as a contiguous one of `size`.
Tensor viewed(const Tensor& t, const IntList& size, int64_t offset = 0);

// Uninitialised float32 scratch of n floats, freed with the tensor.
Tensor scratch(int64_t n);
float* floats(const Tensor& t);

// f(begin, end) over [0, tasks), in several ranges a thread: each has a run of its own, and who is done helps others
// with the ends of theirs. Inline where one task is all there is.
template <class F>
void parallel(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  if (tasks == 1) return f(int64_t{0}, int64_t{1});
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (workers == 1) return f(int64_t{0}, tasks);
  std::vector<engine::Queue> queues(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w) {
    queues[static_cast<size_t>(w)].reset(tasks * w / workers, tasks * (w + 1) / workers);
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    int64_t begin = 0, end = 0;
    for (int64_t w = first; w < last; ++w) {
      while (queues[static_cast<size_t>(w)].take_front(1, &begin, &end)) f(begin, end);
    }
    for (int64_t i = 1; i < workers; ++i) {
      while (queues[static_cast<size_t>((first + i) % workers)].take_back(1, &begin, &end)) f(begin, end);
    }
  });
}

// A [N, C, H, W] tensor as float32 [N][H][W][C] with strides in elements: a view where it already is one, else a copy.
struct Image {
  const float* data;
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  ptrdiff_t n_stride;
  ptrdiff_t row;
  ptrdiff_t pixel;
  OptionalTensor storage;

  int64_t pixels() const { return height * width; }
};

// Any strides between rows and pixels; channels adjacent.
Image image(const Tensor& x, const char* name);
// Also one stride from each pixel of the batch to the next.
Image dense_image(const Tensor& x, const char* name);

// True where the result of an op on x is NHWC; mnv4_kernels/ops/layout.py has the same rule.
bool is_channels_last(const Tensor& x);

// The result of an op: allocated in its final type and memory format, computed as float32 [N][H][W][C], and converted
// by finish() where the two differ.
class Result {
 public:
  Result(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last);
  float* data() { return data_; }
  Tensor finish();

 private:
  Tensor out_;
  OptionalTensor staged_;
  float* data_;
  Storage type_;
  bool channels_last_;
  int64_t batch_, channels_, pixels_;
};

// float32 values of a small tensor, zeros where there is none, padded with zeros to a whole panel; a view where the
// tensor already is that.
class Vector {
 public:
  Vector(const OptionalTensor& values, int64_t n, const char* name);
  const float* data() const { return data_; }

 private:
  OptionalTensor source_;
  std::vector<float> copy_;
  const float* data_;
};

// weight * scale in float32, contiguous; scale runs over the first dimension.
std::vector<float> scaled_weight(const Tensor& weight, const OptionalTensor& scale, const char* name);

// Packed weights for an op: the caller's, checked, or packed now from weight and scale.
enum class Packing { kDepthwise, kDense };

// Floats that prepack() gives for `weight`.
int64_t packed_size(const Tensor& weight, Packing packing);

class Packed {
 public:
  Packed(const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& packed, Packing packing);
  const float* data() const { return data_; }

 private:
  OptionalTensor given_;
  std::vector<float> own_;
  const float* data_;
};

// Packs contiguous values of a weight shaped like `weight`.
void pack_into(const float* values, const Tensor& weight, Packing packing, float* packed);

// Output size, and the checks of a convolution's arguments.
struct Geometry {
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t out_height, out_width;
};
Geometry geometry(const Tensor& x, const Tensor& weight, const IntList& stride, const IntList& padding,
                  const IntList& dilation);

// The part of a convolution kernel's arguments that follows from its geometry.
template <class Args>
void set_window(Args& args, const Geometry& g) {
  args.out_height = g.out_height;
  args.out_width = g.out_width;
  args.kernel_h = g.kernel_h;
  args.kernel_w = g.kernel_w;
  args.stride_h = g.stride_h;
  args.stride_w = g.stride_w;
  args.pad_top = g.pad_top;
  args.pad_left = g.pad_left;
  args.dilation_h = g.dilation_h;
  args.dilation_w = g.dilation_w;
}

}  // namespace ops
}  // namespace mnv4
