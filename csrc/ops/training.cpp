#include "ops/training.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/features.h"

namespace mnv4::ops {
namespace {

void copy_vector(const OptionalTensor& values, int64_t n, const char* name, float otherwise, float* to) {
  if (!values) {
    std::fill_n(to, n, otherwise);
    return;
  }
  const Vector vector(values, n, name);
  std::copy_n(vector.data(), n, to);
}

}  // namespace

InputNorm::InputNorm(const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& gamma,
                     const OptionalTensor& beta, double eps, const std::string& act, int64_t channels)
    : mean_(mean), var_(var), gamma_(gamma), beta_(beta), channels_(channels) {
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "`mean` and `var` must be given both or neither");
  STD_TORCH_CHECK(mean.has_value() || (!gamma && !beta), "`gamma` and `beta` need a `mean` and a `var`");
  const int64_t padded = round_up(channels, kPanel);
  vectors_.assign(static_cast<size_t>(3 * padded), 0.0f);
  float* means = vectors_.data();
  float* slopes = means + padded;
  copy_vector(mean, channels, "mean", 0.0f, means);
  copy_vector(beta, channels, "beta", 0.0f, slopes + padded);
  copy_vector(gamma, channels, "gamma", 1.0f, slopes);
  rstd_.assign(static_cast<size_t>(channels), 1.0);
  slope_.assign(static_cast<size_t>(channels), 1.0);
  if (var) {
    const Vector variance(var, channels, "var");
    for (int64_t c = 0; c < channels; ++c) {
      const auto i = static_cast<size_t>(c);
      rstd_[i] = 1.0 / std::sqrt(static_cast<double>(variance.data()[c]) + eps);
      slope_[i] = rstd_[i] * slopes[c];
      slopes[c] = static_cast<float>(slope_[i]);
    }
  }
  kernel_ = {means, slopes, slopes + padded, activation_of(act)};
}

Normalisation InputNorm::panel(int64_t channel) const {
  return {kernel_.mean + channel, kernel_.slope + channel, kernel_.shift + channel, kernel_.act};
}

void InputNorm::finish(const std::vector<double>& sums, Tensor* mean, Tensor* var, Tensor* gamma, Tensor* beta) const {
  if (!mean_) return;
  const auto padded = static_cast<size_t>(round_up(channels_, kPanel));
  const auto n = static_cast<size_t>(channels_);
  std::vector<float> dmean(n), dvar(n), dgamma(n), dbeta(n);
  for (size_t c = 0; c < n; ++c) {
    const double total = sums[c];
    const double spread = sums[padded + c];
    dbeta[c] = static_cast<float>(total);
    dmean[c] = static_cast<float>(-slope_[c] * total);
    dgamma[c] = static_cast<float>(rstd_[c] * spread);
    dvar[c] = static_cast<float>(-0.5 * slope_[c] * rstd_[c] * rstd_[c] * spread);
  }
  *mean = channel_gradient(dmean, mean_, *mean_);
  *var = channel_gradient(dvar, var_, *mean_);
  *gamma = channel_gradient(dgamma, gamma_, *mean_);
  *beta = channel_gradient(dbeta, beta_, *mean_);
}

Moments::Moments(int64_t parts, int64_t channels)
    : parts_(parts),
      channels_(channels),
      padded_(round_up(channels, kPanel)),
      partial_(scratch(std::max<int64_t>(1, parts * 2 * padded_))),
      data_(floats(partial_)) {}

std::tuple<Tensor, Tensor> Moments::finish(const std::vector<int64_t>& counts) {
  Tensor mean = scratch(channels_), var = scratch(channels_);
  std::vector<double> means(static_cast<size_t>(padded_), 0.0), squares(means), deltas(means);
  double total = 0.0;
  for (int64_t part = 0; part < parts_; ++part) {
    const auto count = static_cast<double>(counts[static_cast<size_t>(part)]);
    if (count == 0.0) continue;
    const float* m = this->mean(part);
    const float* q = m2(part);
    const double joined = total + count;
    for (int64_t c = 0; c < channels_; ++c) {
      const auto i = static_cast<size_t>(c);
      const double delta = m[c] - means[i];
      means[i] += delta * (count / joined);
      squares[i] += q[c] + delta * delta * (total * count / joined);
    }
    total = joined;
  }
  float* to_mean = floats(mean);
  float* to_var = floats(var);
  for (int64_t c = 0; c < channels_; ++c) {
    const auto i = static_cast<size_t>(c);
    // no pixel at all: NaN, as in torch
    to_mean[c] = static_cast<float>(total > 0 ? means[i] : std::nan(""));
    to_var[c] = static_cast<float>(squares[i] / total);
  }
  return {mean, var};
}

ThroughMoments::ThroughMoments(const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const OptionalTensor& z,
                               const OptionalTensor& z_mean, const Tensor& grad)
    : grad_(dense_image(grad, "grad")), padded_(round_up(grad_.channels, kPanel)) {
  const bool given = grad_mean && grad_var && z && z_mean;
  STD_TORCH_CHECK(given || (!grad_mean && !grad_var && !z && !z_mean),
                  "`grad_mean`, `grad_var`, `z` and `z_mean` must be given all or none");
  if (!given) return;
  MNV4_CHECK_SHAPE(z->dim() == 4 && z->size(0) == grad.size(0) && z->size(1) == grad.size(1) &&
                       z->size(2) == grad.size(2) && z->size(3) == grad.size(3),
                   *z, "z", "have `grad`'s shape ", shape_text(grad));
  z_ = dense_image(*z, "z");
  const int64_t channels = grad_.channels;
  vectors_.assign(static_cast<size_t>(3 * padded_), 0.0f);
  float* constant = vectors_.data() + padded_;
  copy_vector(z_mean, channels, "z_mean", 0.0f, vectors_.data());
  copy_vector(grad_mean, channels, "grad_mean", 0.0f, constant);
  copy_vector(grad_var, channels, "grad_var", 0.0f, constant + padded_);
  const double count = std::max<double>(1.0, static_cast<double>(grad_.batch * grad_.pixels()));
  for (int64_t c = 0; c < channels; ++c) {
    constant[c] = static_cast<float>(constant[c] / count);
    constant[padded_ + c] = static_cast<float>(constant[padded_ + c] * 2.0 / count);
  }
}

MomentsGradient ThroughMoments::rows(int64_t image, int64_t row, int64_t channel) const {
  MomentsGradient gradient{};
  gradient.grad = grad_.data + image * grad_.n_stride + row * grad_.pixel + channel;
  gradient.grad_row = grad_.pixel;
  if (!z_) return gradient;
  gradient.z = z_->data + image * z_->n_stride + row * z_->pixel + channel;
  gradient.z_row = z_->pixel;
  gradient.mean = vectors_.data() + channel;
  gradient.constant = gradient.mean + padded_;
  gradient.factor = gradient.constant + padded_;
  return gradient;
}

std::vector<double> join(const float* parts, int64_t count, int64_t width) {
  constexpr int64_t kStep = 2048;
  std::vector<double> sums(static_cast<size_t>(width), 0.0);
  parallel(div_up(width, kStep), [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(width, end * kStep);
    for (int64_t part = 0; part < count; ++part) {
      for (int64_t i = begin * kStep; i < last; ++i) sums[static_cast<size_t>(i)] += parts[part * width + i];
    }
  });
  return sums;
}

Tensor channel_gradient(const std::vector<float>& values, const OptionalTensor& like, const Tensor& x) {
  if (!like) return nothing(x);
  Tensor out = fresh({static_cast<int64_t>(values.size())}, like->scalar_type());
  pointwise_kernels().narrow(values.data(), storage_of(*like, "gamma"), out.mutable_data_ptr(), out.numel());
  return out;
}

Tensor nothing(const Tensor& x) { return fresh({0}, x.scalar_type()); }

Tensor zeroed(int64_t n) {
  Tensor t = scratch(n);
  std::fill_n(floats(t), n, 0.0f);
  return t;
}

Tensor pack_padded(const float* weight, int64_t n, int64_t k, ptrdiff_t row, ptrdiff_t column) {
  const int64_t depth = round_up(k, kPanel);
  const int64_t panels = div_up(n, kPanel);
  Tensor packed = scratch(std::max<int64_t>(1, panels * depth * kPanel));
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float* to = floats(packed) + p * depth * kPanel;
      const float* from = weight + p * kPanel * row;
      if (row == 1 && n - p * kPanel >= kPanel) {
        for (int64_t i = 0; i < k; ++i) std::copy_n(from + i * column, kPanel, to + i * kPanel);
      } else {
        pack_panels(from, std::min<int64_t>(kPanel, n - p * kPanel), k, row, column, to);
      }
      std::fill(to + k * kPanel, to + depth * kPanel, 0.0f);
    }
  });
  return packed;
}

PlainWeight::PlainWeight(const Tensor& weight)
    : source_(weight.is_contiguous() ? weight : torch::stable::contiguous(weight)) {
  if (storage_of(weight, "weight") == Storage::kFloat32) {
    data_ = static_cast<const float*>(source_.const_data_ptr());
    return;
  }
  copy_ = scaled_weight(source_, std::nullopt, "weight");
  data_ = copy_.data();
}

WeightGradient::WeightGradient(const Tensor& weight) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i < weight.dim(); ++i) size.push_back(weight.size(i));
  out_ = fresh(size, weight.scalar_type());
  type_ = storage_of(weight, "weight");
  wide_ = type_ == Storage::kFloat32 ? out_ : scratch(weight.numel());
  data_ = floats(wide_);
}

Tensor WeightGradient::finish() {
  if (type_ != Storage::kFloat32) {
    pointwise_kernels().narrow(data_, type_, out_.mutable_data_ptr(), out_.numel());
  }
  return out_;
}

Chunks chunks_of(int64_t rows, int64_t floats_per_row) {
  const int64_t budget = cpu::cache_sizes().l2 / 2 / static_cast<int64_t>(sizeof(float));
  constexpr int64_t kTileRows = 14;
  constexpr int64_t kEven = 4;
  // less than weights are: whoever has one chunk shares its panels
  constexpr int64_t kFew = 128;
  if (rows <= kFew) return {std::max<int64_t>(1, rows), rows ? 1 : 0};
  const int64_t most = std::clamp<int64_t>(budget / std::max<int64_t>(1, floats_per_row) / kTileRows, 2, 16);
  const int64_t tiles = div_up(rows, kTileRows);
  const int64_t count = round_up(div_up(tiles, most), kEven);
  const int64_t step = kTileRows * std::max<int64_t>(2, div_up(tiles, std::max<int64_t>(1, count)));
  return {step, div_up(rows, step)};
}

void Ahead::add(const float* data, ptrdiff_t row, int64_t rows) {
  const int64_t bytes = row * rows * static_cast<int64_t>(sizeof(float));
  if (bytes <= 0 || count_ == kRanges) return;
  ranges_[count_++] = {data, bytes};
  bytes_ += bytes;
}

Stream Ahead::stream(int64_t passing) const {
  // a tenth more: what is left when the product ends is not fetched
  return {ranges_, ranges_ + count_,
          1.1 * static_cast<double>(bytes_) / static_cast<double>(std::max<int64_t>(1, passing))};
}

}  // namespace mnv4::ops
