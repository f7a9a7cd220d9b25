// mnv4_kernels::head on the CPU.
#include <algorithm>

#include "kernels/conv/conv.h"
#include "ops/common.h"

namespace mnv4::ops {
namespace {

// y[rows][n] = act(a[rows][k] * panels + bias), split over the workers
void product(const float* a, int64_t rows, int64_t k, const Packed& panels, const Vector& bias, Activation act,
             float* y, int64_t n) {
  const ptrdiff_t whole_row = 0;
  GemmArgs args{};
  args.a = a;
  args.a_row = k;
  args.segment = &whole_row;
  args.segments = 1;
  args.segment_length = k;
  args.b = panels.data();
  args.b_panel = k * kPanel;
  args.bias = bias.data();
  args.c = y;
  args.c_row = n;
  args.c_panel = kPanel;
  args.n = n;
  args.act = act;
  args.chain = kShortChain;
  const GemmKernel& kernel = gemm_kernel();
  const int64_t columns = div_up(n, kPanel);
  const int64_t chunks = std::min<int64_t>(columns, torch::stable::get_num_threads());
  parallel(chunks, [&](int64_t begin, int64_t end) {
    gemm(kernel, args, 0, rows, columns * begin / chunks, columns * end / chunks);
  });
}

Tensor head(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor shift, std::string act,
            OptionalTensor classifier_weight, OptionalTensor classifier_bias, OptionalTensor packed,
            OptionalTensor classifier_packed) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  const int64_t channels = x.size(1);
  MNV4_CHECK_SHAPE(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
                   weight, "weight", "have shape [F, C, 1, 1] with C = ", channels);
  const int64_t features = weight.size(0);
  if (classifier_weight) {
    MNV4_CHECK_SHAPE(classifier_weight->dim() == 2 && classifier_weight->size(1) == features, *classifier_weight,
                     "classifier_weight", "have shape [K, F] with F = ", features);
  }
  const Packed panels(weight, scale, packed, Packing::kDense);
  const Vector bias(shift, features, "shift");
  const Image in = dense_image(x, "x");
  const int64_t outputs = classifier_weight ? classifier_weight->size(0) : features;
  Result out(x, in.batch, outputs, 1, 1, false);
  const Activation activation = activation_of(act);
  if (in.batch > 0) {
    const Tensor pooled = scratch(in.batch * channels);
    // blocks of channels a task: a pixel's lines are read whole
    constexpr int64_t kChannels = 4 * kPanel;
    const int64_t chunks = div_up(channels, kChannels);
    parallel(in.batch * chunks, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t n = t / chunks;
        const int64_t c = t % chunks * kChannels;
        pointwise_kernels().mean_pixels(in.data + n * in.n_stride + c, in.pixels(), in.pixel,
                                        std::min(kChannels, channels - c), floats(pooled) + n * channels + c);
      }
    });
    if (classifier_weight) {
      const Tensor hidden = scratch(in.batch * features);
      product(floats(pooled), in.batch, channels, panels, bias, activation, floats(hidden), features);
      const Packed classes(*classifier_weight, std::nullopt, classifier_packed, Packing::kDense);
      const Vector classes_bias(classifier_bias, outputs, "classifier_bias");
      product(floats(hidden), in.batch, features, classes, classes_bias, Activation::kNone, out.data(), outputs);
    } else {
      product(floats(pooled), in.batch, channels, panels, bias, activation, out.data(), features);
    }
  }
  return viewed(out.finish(), {in.batch, outputs});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) { m.impl("head", TORCH_BOX(&head)); }

}  // namespace mnv4::ops
