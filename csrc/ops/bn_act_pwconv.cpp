// mnv4_kernels::bn_act_pwconv and its backward on the CPU.
#include <algorithm>

#include "ops/training.h"

namespace mnv4::ops {
namespace {

// Parts in which a weight gradient of so many floats is summed: the same for every thread count, so that the bits are.
// Each part costs a write and a read of the whole gradient.
int64_t splits_of(int64_t chunks, int64_t gradient) {
  return std::min(chunks, std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, gradient), 2, 16));
}

// Starts of the panels of a chunk [panel][rows][16].
std::vector<ptrdiff_t> panel_segments(int64_t channels, int64_t rows) {
  std::vector<ptrdiff_t> segment(static_cast<size_t>(div_up(channels, kPanel)));
  for (size_t p = 0; p < segment.size(); ++p) segment[p] = static_cast<ptrdiff_t>(p) * rows * kPanel;
  return segment;
}

// f(begin, end) over [0, panels): by all workers, or all of it by this one
template <class F>
void each_panel(bool share, int64_t panels, const F& f) {
  if (share) return parallel(panels, f);
  f(0, panels);
}

// rows x n = panels x packed weights, into rows `c_row` floats apart; `share`: among all workers
void multiply(const float* panels, int64_t k, int64_t rows, const float* packed, const float* zeros, int64_t n,
              float* c, ptrdiff_t c_row, const Ahead& ahead, bool share) {
  const GemmKernel& kernel = gemm_kernel();
  const std::vector<ptrdiff_t> segment = panel_segments(k, rows);
  GemmArgs args{};
  args.a = panels;
  args.a_row = kPanel;
  args.segment = segment.data();
  args.segments = static_cast<int64_t>(segment.size());
  args.segment_length = kPanel;
  args.b = packed;
  args.b_panel = round_up(k, kPanel) * kPanel;
  args.bias = zeros;
  args.c = c;
  args.c_row = c_row;
  args.c_panel = kPanel;
  args.n = n;
  args.act = Activation::kNone;
  const int64_t out_panels = div_up(n, kPanel);
  each_panel(share, out_panels, [&](int64_t begin, int64_t end) {
    const int64_t weights = args.b_panel * (end - begin) * static_cast<int64_t>(sizeof(float));
    Stream stream = ahead.stream(gemm_passes(kernel, rows, k) * weights);
    GemmArgs part = args;
    part.stream = &stream;
    gemm(kernel, part, 0, rows, begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> bn_act_pwconv(Tensor x, OptionalTensor mean, OptionalTensor var,
                                                 OptionalTensor gamma, OptionalTensor beta, double eps, std::string act,
                                                 Tensor weight, bool moments) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  const int64_t channels = x.size(1);
  MNV4_CHECK_SHAPE(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
                   weight, "weight", "have shape [K, C, 1, 1] with C = ", channels);
  const int64_t outputs = weight.size(0);
  const InputNorm norm(mean, var, gamma, beta, eps, act, channels);
  const Image in = dense_image(x, "x");
  Result out(x, in.batch, outputs, in.height, in.width, is_channels_last(x));
  const Storage type = storage_of(x, "x");
  const Tensor packed = pack_padded(PlainWeight(weight).data(), outputs, channels, channels, 1);
  const std::vector<float> zeros(static_cast<size_t>(round_up(outputs, kPanel)), 0.0f);

  const int64_t rows = in.batch * in.pixels();
  const auto [step, chunks] = chunks_of(rows, round_up(channels, kPanel) + outputs);
  Moments partial(moments ? chunks : 0, outputs);
  const TrainingKernels& kernels = training_kernels();
  parallel(chunks, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch(round_up(channels, kPanel) * step);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * step;
      const int64_t count = std::min(step, rows - first);
      kernels.activate(norm.kernel(), in.data + first * in.pixel, in.pixel, count, channels,
                       {floats(buffer), kPanel, count * kPanel, true});
      float* z = out.data() + first * outputs;
      Ahead ahead;
      ahead.add(in.data + (first + count) * in.pixel, in.pixel, std::min(step, rows - first - count));
      multiply(floats(buffer), channels, count, floats(packed), zeros.data(), outputs, z, outputs, ahead, chunks == 1);
      round_to(type, z, count * outputs);
      if (moments) kernels.moments(z, outputs, count, outputs, partial.mean(chunk), partial.m2(chunk));
    }
  });
  if (!moments) return {out.finish(), scratch(0), scratch(0)};
  std::vector<int64_t> counts(static_cast<size_t>(chunks));
  for (int64_t i = 0; i < chunks; ++i) counts[static_cast<size_t>(i)] = std::min(step, rows - i * step);
  auto [z_mean, z_var] = partial.finish(counts);
  return {out.finish(), z_mean, z_var};
}

SixTensors bn_act_pwconv_backward(Tensor grad, OptionalTensor grad_mean, OptionalTensor grad_var, OptionalTensor z,
                                  OptionalTensor z_mean, Tensor x, OptionalTensor mean, OptionalTensor var,
                                  OptionalTensor gamma, OptionalTensor beta, double eps, std::string act, Tensor weight,
                                  bool need_input, bool need_weight) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  const int64_t channels = x.size(1);
  const int64_t outputs = weight.size(0);
  MNV4_CHECK_SHAPE(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
                   weight, "weight", "have shape [K, C, 1, 1] with C = ", channels);
  MNV4_CHECK_SHAPE(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == outputs &&
                       grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                   grad, "grad", "have the result's shape [", x.size(0), ", ", outputs, ", ", x.size(2), ", ",
                   x.size(3), "]");
  const InputNorm norm(mean, var, gamma, beta, eps, act, channels);
  const ThroughMoments result(grad_mean, grad_var, z, z_mean, grad);
  const Image in = dense_image(x, "x");
  std::optional<Result> dx;
  if (need_input) dx.emplace(x, in.batch, channels, in.height, in.width, is_channels_last(x));
  Tensor packed = scratch(0);
  if (need_input) packed = pack_padded(PlainWeight(weight).data(), channels, outputs, 1, channels);
  const std::vector<float> zeros(static_cast<size_t>(round_up(channels, kPanel)), 0.0f);

  const int64_t in_padded = round_up(channels, kPanel);
  const int64_t out_padded = round_up(outputs, kPanel);
  const int64_t rows = in.batch * in.pixels();
  const auto [step, chunks] = chunks_of(rows, 2 * in_padded + out_padded);
  const Tensor sums = need_input ? zeroed(std::max<int64_t>(1, chunks * 2 * in_padded)) : scratch(0);
  const int64_t gradient = in_padded * out_padded;
  const int64_t splits = splits_of(chunks, gradient);
  const Tensor partial = scratch(need_weight ? splits * gradient : 0);
  const TrainingKernels& kernels = training_kernels();
  parallel(splits, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch((in_padded + out_padded) * step);
    float* left = floats(buffer);
    float* right = left + out_padded * step;
    for (int64_t split = begin; split < end; ++split) {
      const int64_t start = chunks * split / splits;
      for (int64_t chunk = start; chunk < chunks * (split + 1) / splits; ++chunk) {
        const int64_t first = chunk * step;
        const int64_t count = std::min(step, rows - first);
        const float* source = in.data + first * in.pixel;
        kernels.result_gradient(result.rows(0, first, 0), count, outputs, {left, kPanel, count * kPanel, true});
        if (need_weight) {
          kernels.activate(norm.kernel(), source, in.pixel, count, channels, {right, kPanel, count * kPanel, true});
          each_panel(chunks == 1, out_padded / kPanel, [&](int64_t from, int64_t to) {
            float* tile = floats(partial) + split * gradient + from * kPanel * in_padded;
            for (int64_t o = from * kPanel; o < to * kPanel; o += kPanel) {
              for (int64_t c = 0; c < in_padded; c += kPanel, tile += kPanel * kPanel) {
                kernels.outer(
                    {left + o * count, 0, kPanel, right + c * count, 0, kPanel, 1, count, tile, chunk == start});
              }
            }
          });
        }
        if (need_input) {
          float* to = dx->data() + first * channels;
          Ahead ahead;
          const int64_t next = std::min(step, rows - first - count);
          const MomentsGradient coming = result.rows(0, first + count, 0);
          ahead.add(coming.grad, coming.grad_row, next);
          if (coming.z) ahead.add(coming.z, coming.z_row, next);
          ahead.add(in.data + (first + count) * in.pixel, in.pixel, next);
          multiply(left, outputs, count, floats(packed), zeros.data(), channels, to, channels, ahead, chunks == 1);
          kernels.input_gradient(norm.kernel(), to, channels, kPanel, source, in.pixel, count, channels, to, channels,
                                 floats(sums) + chunk * 2 * in_padded);
        }
      }
    }
  });

  Tensor none = nothing(x);
  SixTensors found{none, none, none, none, none, none};
  auto& [d_x, d_mean, d_var, d_gamma, d_beta, d_weight] = found;
  if (need_input) {
    norm.finish(join(floats(sums), chunks, 2 * in_padded), &d_mean, &d_var, &d_gamma, &d_beta);
    d_x = dx->finish();
  }
  if (need_weight) {
    WeightGradient result_weight(weight);
    if (splits == 0) std::fill_n(result_weight.data(), weight.numel(), 0.0f);
    parallel(splits ? out_padded / kPanel : 0, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        float* sum = floats(partial) + panel * in_padded * kPanel;
        for (int64_t split = 1; split < splits; ++split) {
          const float* part = sum + split * gradient;
          for (int64_t i = 0; i < in_padded * kPanel; ++i) sum[i] += part[i];
        }
        for (int64_t o = panel * kPanel; o < std::min(outputs, (panel + 1) * kPanel); ++o) {
          for (int64_t c = 0; c < channels; c += kPanel) {
            const float* row = sum + (c + o % kPanel) * kPanel;
            std::copy_n(row, std::min<int64_t>(kPanel, channels - c), result_weight.data() + o * channels + c);
          }
        }
      }
    });
    d_weight = result_weight.finish();
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("bn_act_pwconv", TORCH_BOX(&bn_act_pwconv));
  m.impl("bn_act_pwconv_backward", TORCH_BOX(&bn_act_pwconv_backward));
}

}  // namespace mnv4::ops
