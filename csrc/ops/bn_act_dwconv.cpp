// mnv4_kernels::bn_act_dwconv and its backward on the CPU: a plane of 16 channels of one image at a time, in cache.
#include <algorithm>

#include "kernels/dwconv/dwconv.h"
#include "ops/training.h"

namespace mnv4::ops {
namespace {

// A depthwise convolution of a dense plane [height][width][16] into a dense plane.
void convolve(const float* x, int64_t height, int64_t width, const float* weight, const Geometry& g, float* y) {
  static const float zeros[kPanel] = {};
  DwconvArgs args{};
  args.x = x;
  args.x_row = width * kPanel;
  args.x_pixel = kPanel;
  args.height = height;
  args.width = width;
  args.y = y;
  args.y_pixel = kPanel;
  args.y_row = g.out_width * kPanel;
  args.weight = weight;
  args.bias = zeros;
  args.channels = kPanel;
  set_window(args, g);
  args.act = Activation::kNone;
  dwconv_kernel().run(args, 0, g.out_height, 0, kPanel);
}

void check_weight(const Tensor& weight, int64_t channels) {
  MNV4_CHECK_SHAPE(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1, weight, "weight",
                   "have shape [C, 1, kh, kw] with C = ", channels);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_dwconv(Tensor x, OptionalTensor mean, OptionalTensor var,
                                                 OptionalTensor gamma, OptionalTensor beta, double eps, std::string act,
                                                 Tensor weight, IntList stride, IntList padding, IntList dilation,
                                                 bool moments) {
  const Geometry g = geometry(x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  check_weight(weight, channels);
  const InputNorm norm(mean, var, gamma, beta, eps, act, channels);
  const Packed packed(weight, std::nullopt, std::nullopt, Packing::kDepthwise);
  const Image in = dense_image(x, "x");
  Result out(x, in.batch, channels, g.out_height, g.out_width, is_channels_last(x));
  const Storage type = storage_of(x, "x");
  const int64_t panels = div_up(channels, kPanel);
  const int64_t taps = static_cast<int64_t>(g.kernel_h) * g.kernel_w;
  const int64_t pixels = g.out_height * g.out_width;
  Moments partial(moments ? in.batch : 0, channels);
  const TrainingKernels& kernels = training_kernels();
  parallel(in.batch * panels, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch((in.pixels() + pixels) * kPanel);
    float* plane = floats(buffer);
    float* result = plane + in.pixels() * kPanel;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / panels;
      const int64_t first = t % panels * kPanel;
      const int64_t valid = std::min<int64_t>(kPanel, channels - first);
      kernels.activate(norm.panel(first), in.data + n * in.n_stride + first, in.pixel, in.pixels(), valid,
                       {plane, kPanel, 0, true});
      convolve(plane, in.height, in.width, packed.data() + first * taps, g, result);
      round_to(type, result, pixels * kPanel);
      if (moments) kernels.moments(result, kPanel, pixels, kPanel, partial.mean(n) + first, partial.m2(n) + first);
      const MomentsGradient copy{result, kPanel, nullptr, 0, nullptr, nullptr, nullptr};
      float* z = out.data() + n * pixels * channels + first;
      kernels.result_gradient(copy, pixels, valid, {z, static_cast<ptrdiff_t>(channels), 0, false});
    }
  });
  if (!moments) return {out.finish(), scratch(0), scratch(0)};
  auto [z_mean, z_var] = partial.finish(std::vector<int64_t>(static_cast<size_t>(in.batch), pixels));
  return {out.finish(), z_mean, z_var};
}

// Packed taps in reverse order: the kernel of the way back.
std::vector<float> reversed(const float* packed, int64_t panels, int64_t taps) {
  std::vector<float> found(static_cast<size_t>(panels * taps * kPanel));
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      std::copy_n(packed + (panel * taps + tap) * kPanel, kPanel,
                  found.data() + (panel * taps + taps - 1 - tap) * kPanel);
    }
  }
  return found;
}

SixTensors bn_act_dwconv_backward(Tensor grad, OptionalTensor grad_mean, OptionalTensor grad_var, OptionalTensor z,
                                  OptionalTensor z_mean, Tensor x, OptionalTensor mean, OptionalTensor var,
                                  OptionalTensor gamma, OptionalTensor beta, double eps, std::string act, Tensor weight,
                                  IntList stride, IntList padding, IntList dilation, bool need_input,
                                  bool need_weight) {
  const Geometry g = geometry(x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  check_weight(weight, channels);
  MNV4_CHECK_SHAPE(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == channels &&
                       grad.size(2) == g.out_height && grad.size(3) == g.out_width,
                   grad, "grad", "have the result's shape [", x.size(0), ", ", channels, ", ", g.out_height, ", ",
                   g.out_width, "]");
  const InputNorm norm(mean, var, gamma, beta, eps, act, channels);
  const ThroughMoments result(grad_mean, grad_var, z, z_mean, grad);
  const Image in = dense_image(x, "x");
  std::optional<Result> dx;
  if (need_input) dx.emplace(x, in.batch, channels, in.height, in.width, is_channels_last(x));
  const int64_t panels = div_up(channels, kPanel);
  const int64_t padded = panels * kPanel;
  const int64_t taps = static_cast<int64_t>(g.kernel_h) * g.kernel_w;
  const Packed packed(weight, std::nullopt, std::nullopt, Packing::kDepthwise);
  const std::vector<float> back = reversed(packed.data(), panels, taps);
  const int64_t pixels = g.out_height * g.out_width;

  // the plane that a kernel walks over without asking for edges
  const int64_t full_height = in.height + padding[0] + padding[1];
  const int64_t full_width = in.width + padding[2] + padding[3];
  // the way back of a stride: gradients with zeros between them, convolved with stride 1
  const bool strided = g.stride_h != 1 || g.stride_w != 1;
  const int64_t spread_height = strided ? std::max(in.height, (g.out_height - 1) * g.stride_h + 1) : g.out_height;
  const int64_t spread_width = strided ? std::max(in.width, (g.out_width - 1) * g.stride_w + 1) : g.out_width;
  Geometry inverse = g;
  inverse.stride_h = inverse.stride_w = 1;
  inverse.pad_top = g.dilation_h * (g.kernel_h - 1) - g.pad_top;
  inverse.pad_left = g.dilation_w * (g.kernel_w - 1) - g.pad_left;
  inverse.out_height = in.height;
  inverse.out_width = in.width;

  const int64_t tasks = in.batch * panels;
  const Tensor sums = zeroed(std::max<int64_t>(1, in.batch * 2 * padded));
  const Tensor partial = zeroed(need_weight ? in.batch * padded * taps : 1);
  const TrainingKernels& kernels = training_kernels();
  parallel(tasks, [&](int64_t begin, int64_t end) {
    const int64_t full = need_weight ? full_height * full_width * kPanel : 0;
    const int64_t spread = strided && need_input ? spread_height * spread_width * kPanel : 0;
    const Tensor buffer = zeroed(pixels * kPanel + full + spread + in.pixels() * kPanel);
    float* dz = floats(buffer);
    float* walked = dz + pixels * kPanel;
    float* spaced = walked + full;
    float* da = spaced + spread;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / panels;
      const int64_t first = t % panels * kPanel;
      const int64_t valid = std::min<int64_t>(kPanel, channels - first);
      const float* source = in.data + n * in.n_stride + first;
      kernels.result_gradient(result.rows(n, 0, first), pixels, valid, {dz, kPanel, 0, true});
      if (need_weight) {
        for (int64_t row = 0; row < in.height; ++row) {
          float* to = walked + ((row + padding[0]) * full_width + padding[2]) * kPanel;
          kernels.activate(norm.panel(first), source + row * in.row, in.pixel, in.width, valid, {to, kPanel, 0, true});
        }
        DepthwiseWeightArgs args{};
        args.x = walked;
        args.x_row = full_width * kPanel;
        args.grad = dz;
        args.height = g.out_height;
        args.width = g.out_width;
        args.kernel_h = g.kernel_h;
        args.kernel_w = g.kernel_w;
        args.stride_h = g.stride_h;
        args.stride_w = g.stride_w;
        args.dilation_h = g.dilation_h;
        args.dilation_w = g.dilation_w;
        args.out = floats(partial) + (n * padded + first) * taps;
        kernels.depthwise_weight(args);
      }
      if (need_input) {
        if (strided) {
          for (int64_t row = 0; row < g.out_height; ++row) {
            for (int64_t column = 0; column < g.out_width; ++column) {
              std::copy_n(dz + (row * g.out_width + column) * kPanel, kPanel,
                          spaced + (row * g.stride_h * spread_width + column * g.stride_w) * kPanel);
            }
          }
        }
        convolve(strided ? spaced : dz, spread_height, spread_width, back.data() + first * taps, inverse, da);
        // sums lie [image][2][padded]: this panel's 16 of both are written through a local copy
        float local[2 * kPanel] = {};
        kernels.input_gradient(norm.panel(first), da, kPanel, 0, source, in.pixel, in.pixels(), valid,
                               dx->data() + n * in.pixels() * channels + first, channels, local);
        float* to = floats(sums) + n * 2 * padded + first;
        std::copy_n(local, kPanel, to);
        std::copy_n(local + kPanel, kPanel, to + padded);
      }
    }
  });

  Tensor none = nothing(x);
  SixTensors found{none, none, none, none, none, none};
  auto& [d_x, d_mean, d_var, d_gamma, d_beta, d_weight] = found;
  if (need_input) {
    norm.finish(join(floats(sums), in.batch, 2 * padded), &d_mean, &d_var, &d_gamma, &d_beta);
    d_x = dx->finish();
  }
  if (need_weight) {
    const std::vector<double> joined = join(floats(partial), in.batch, padded * taps);
    WeightGradient result_weight(weight);
    float* to = result_weight.data();
    for (int64_t c = 0; c < channels; ++c) {
      const double* from = joined.data() + c / kPanel * taps * kPanel + c % kPanel;
      for (int64_t tap = 0; tap < taps; ++tap) *to++ = static_cast<float>(from[tap * kPanel]);
    }
    d_weight = result_weight.finish();
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("bn_act_dwconv", TORCH_BOX(&bn_act_dwconv));
  m.impl("bn_act_dwconv_backward", TORCH_BOX(&bn_act_dwconv_backward));
}

}  // namespace mnv4::ops
