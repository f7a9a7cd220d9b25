// mnv4_kernels::bn_act and its backward on the CPU.
#include <algorithm>

#include "ops/training.h"

namespace mnv4::ops {
namespace {

// Layer scale times stochastic depth, for each image where there is the latter.
class BlockScale {
 public:
  BlockScale(const OptionalTensor& layer_scale, const OptionalTensor& keep, int64_t batch, int64_t channels)
      : padded_(round_up(channels, kPanel)) {
    std::vector<float> scale(static_cast<size_t>(padded_), 1.0f);
    if (layer_scale) {
      const Vector given(layer_scale, channels, "layer_scale");
      std::copy_n(given.data(), padded_, scale.data());
    }
    if (keep) {
      const Vector given(keep, batch, "keep");
      keep_.assign(given.data(), given.data() + batch);
    }
    for (int64_t n = 0; n < (keep ? batch : 1); ++n) {
      for (const float value : scale) values_.push_back(value * this->keep(n));
    }
  }
  const float* of(int64_t image) const { return values_.data() + (keep_.empty() ? 0 : image * padded_); }
  float keep(int64_t image) const { return keep_.empty() ? 1.0f : keep_[static_cast<size_t>(image)]; }

 private:
  int64_t padded_;
  std::vector<float> values_, keep_;
};

// Pixels of a task: a few reads and writes of them stay in L2.
int64_t pixels_per_task(int64_t channels) { return std::max<int64_t>(8, 65536 / std::max<int64_t>(1, channels)); }

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2) &&
                      t.size(3) == x.size(3),
                  "`", name, "` must have x's shape ", shape_text(x), ", got ", shape_text(t));
}

BlockEnd block_end(const InputNorm& norm, const BlockScale& scale, const Image& in, int64_t image, int64_t first,
                   int64_t rows) {
  const float* x = in.data + image * in.n_stride + first * in.pixel;
  return {norm.kernel(), scale.of(image), x, in.pixel, rows, in.channels};
}

Tensor bn_act(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma, OptionalTensor beta, double eps,
              std::string act, OptionalTensor layer_scale, OptionalTensor keep, OptionalTensor residual) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  if (residual) check_like(*residual, x, "residual");
  const int64_t channels = x.size(1);
  const InputNorm norm(mean, var, gamma, beta, eps, act, channels);
  const Image in = dense_image(x, "x");
  const BlockScale scale(layer_scale, keep, in.batch, channels);
  std::optional<Image> skip;
  if (residual) skip = dense_image(*residual, "residual");
  Result out(x, in.batch, channels, in.height, in.width, is_channels_last(x));
  const int64_t step = pixels_per_task(channels);
  const int64_t chunks = div_up(in.pixels(), step);
  parallel(in.batch * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / chunks;
      const int64_t first = t % chunks * step;
      const int64_t rows = std::min(step, in.pixels() - first);
      const float* added = skip ? skip->data + n * skip->n_stride + first * skip->pixel : nullptr;
      training_kernels().block_end(block_end(norm, scale, in, n, first, rows), added, skip ? skip->pixel : 0,
                                   out.data() + (n * in.pixels() + first) * channels);
    }
  });
  return out.finish();
}

SixTensors bn_act_backward(Tensor grad, Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                           OptionalTensor beta, double eps, std::string act, OptionalTensor layer_scale,
                           OptionalTensor keep) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  check_like(grad, x, "grad");
  const int64_t channels = x.size(1);
  const int64_t padded = round_up(channels, kPanel);
  const InputNorm norm(mean, var, gamma, beta, eps, act, channels);
  const Image in = dense_image(x, "x");
  const Image dy = dense_image(grad, "grad");
  const BlockScale scale(layer_scale, keep, in.batch, channels);
  Result dx(x, in.batch, channels, in.height, in.width, is_channels_last(x));
  const int64_t step = pixels_per_task(channels);
  const int64_t chunks = div_up(in.pixels(), step);
  const int64_t tasks = in.batch * chunks;
  const Tensor sums = zeroed(std::max<int64_t>(1, tasks * 3 * padded));
  parallel(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / chunks;
      const int64_t first = t % chunks * step;
      const int64_t rows = std::min(step, in.pixels() - first);
      float* partial = floats(sums) + t * 3 * padded;
      training_kernels().block_end_gradient(block_end(norm, scale, in, n, first, rows),
                                            dy.data + n * dy.n_stride + first * dy.pixel, dy.pixel,
                                            dx.data() + (n * in.pixels() + first) * channels, partial);
      for (int64_t c = 0; c < channels; ++c) partial[2 * padded + c] *= scale.keep(n);
    }
  });
  const std::vector<double> joined = join(floats(sums), tasks, 3 * padded);
  Tensor none = nothing(x);
  SixTensors found{none, none, none, none, none, none};
  auto& [d_x, d_mean, d_var, d_gamma, d_beta, d_scale] = found;
  norm.finish(joined, &d_mean, &d_var, &d_gamma, &d_beta);
  if (layer_scale) {
    const double* last = joined.data() + 2 * padded;
    d_scale = channel_gradient(std::vector<float>(last, last + channels), layer_scale, x);
  }
  d_x = dx.finish();
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
}

}  // namespace mnv4::ops
