// What the training ops share: the normalisation of what they read, the moments of what they write, and the small
// gradients that go with both.
#pragma once

#include <tuple>
#include <vector>

#include "kernels/training/training.h"
#include "ops/common.h"

namespace mnv4 {
namespace [[gnu::visibility("hidden")]] ops {

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The BatchNorm that an op applies to its input; without one, identity.
class InputNorm {
 public:
  InputNorm(const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
            const OptionalTensor& beta, double eps, const std::string& act, int64_t channels);
  const Normalisation& kernel() const { return kernel_; }
  bool is_identity() const { return !mean_ && kernel_.act == Activation::kNone; }
  // The normalisation of 16 channels from `channel` on.
  Normalisation panel(int64_t channel) const;
  // Gradients of mean, var, gamma and beta from the sums of `input_gradient`, [2][padded channels].
  void finish(const std::vector<double>& sums, Tensor* mean, Tensor* var, Tensor* gamma, Tensor* beta) const;

 private:
  OptionalTensor mean_, var_, gamma_, beta_;
  int64_t channels_;
  std::vector<float> vectors_;  // mean, slope, shift
  std::vector<double> rstd_, slope_;
  Normalisation kernel_;
};

// Partial moments of parts of a map, joined in order: (count, mean, sum of squares about it) per channel.
class Moments {
 public:
  Moments(int64_t parts, int64_t channels);
  float* mean(int64_t part) { return data_ + part * 2 * padded_; }
  float* m2(int64_t part) { return mean(part) + padded_; }
  // (mean, biased variance); of parts of `counts` pixels.
  std::tuple<Tensor, Tensor> finish(const std::vector<int64_t>& counts);

 private:
  int64_t parts_, channels_, padded_;
  Tensor partial_;
  float* data_;
};

// What a result's gradient gets through its moments.
class ThroughMoments {
 public:
  ThroughMoments(const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const OptionalTensor& z,
                 const OptionalTensor& z_mean, const Tensor& grad);
  // Rows of the result's gradient from element `offset` on, for `channel` on.
  MomentsGradient rows(int64_t image, int64_t row, int64_t channel) const;
  const Image& grad() const { return grad_; }

 private:
  Image grad_;
  std::optional<Image> z_;
  std::vector<float> vectors_;  // mean, constant, factor
  int64_t padded_;
};

// Sums over parts in order: [parts][width] floats to [width] doubles.
std::vector<double> join(const float* parts, int64_t count, int64_t width);

// [n] values in `like`'s dtype; an empty tensor where `like` is absent.
Tensor channel_gradient(const std::vector<float>& values, const OptionalTensor& like, const Tensor& x);
// No gradient: an empty tensor of x's dtype.
Tensor nothing(const Tensor& x);

// Zeros, freed with the tensor.
Tensor zeroed(int64_t n);

// [n][k] weights with any strides to [ceil(n / 16)][round_up(k, 16)][16], zeros where there is nothing.
Tensor pack_padded(const float* weight, int64_t n, int64_t k, ptrdiff_t row, ptrdiff_t column);

// float32 values of a weight in its logical order; a view where it already is that.
class PlainWeight {
 public:
  explicit PlainWeight(const Tensor& weight);
  const float* data() const { return data_; }

 private:
  Tensor source_;
  std::vector<float> copy_;
  const float* data_;
};

// The gradient of a weight: computed as contiguous float32, converted by finish() where the weight is of another type.
class WeightGradient {
 public:
  explicit WeightGradient(const Tensor& weight);
  float* data() { return data_; }
  Tensor finish();

 private:
  Tensor out_, wide_;
  float* data_;
  Storage type_;
};

// `rows` pixels in `count` chunks of `step`, whose `floats_per_row` stay in half of L2. Few chunks are a multiple of
// four, so that as many workers have equal shares; very few rows are one. The shape alone decides.
struct Chunks {
  int64_t step;
  int64_t count;
};
Chunks chunks_of(int64_t rows, int64_t floats_per_row);

// What is read next and comes from memory while a product is multiplied.
class Ahead {
 public:
  // `rows` whole rows from `data` on
  void add(const float* data, ptrdiff_t row, int64_t rows);
  // For a product that passes through `passing` bytes of weights.
  Stream stream(int64_t passing) const;

 private:
  static constexpr int kRanges = 3;
  Stream::Range ranges_[kRanges];
  int count_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace ops
}  // namespace mnv4
