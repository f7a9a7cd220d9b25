// mnv4_kernels::pwconv_bn_act on the CPU.
#include "kernels/conv/conv.h"
#include "ops/common.h"

namespace mnv4::ops {
namespace {

Tensor pwconv_bn_act(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor shift, std::string act,
                     OptionalTensor gamma, OptionalTensor residual, OptionalTensor packed) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  const int64_t channels = x.size(1);
  MNV4_CHECK_SHAPE(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1,
                   weight, "weight", "have shape [K, C, 1, 1] with C = ", channels);
  const int64_t outputs = weight.size(0);
  if (residual) {
    const Tensor& r = *residual;
    MNV4_CHECK_SHAPE(r.dim() == 4 && r.size(0) == x.size(0) && r.size(1) == outputs && r.size(2) == x.size(2) &&
                         r.size(3) == x.size(3),
                     r, "residual", "have the result's shape [", x.size(0), ", ", outputs, ", ", x.size(2), ", ",
                     x.size(3), "]");
  }
  const Packed panels(weight, scale, packed, Packing::kDense);
  const Vector bias(shift, outputs, "shift");
  std::optional<Vector> layer_scale;
  if (gamma) layer_scale.emplace(gamma, outputs, "gamma");
  const Image in = dense_image(x, "x");
  std::optional<Image> skip;
  if (residual) skip = dense_image(*residual, "residual");
  Result out(x, in.batch, outputs, in.height, in.width, is_channels_last(x));

  const ptrdiff_t whole_row = 0;
  GemmArgs args{};
  args.a = in.data;
  args.a_row = in.pixel;
  args.segment = &whole_row;
  args.segments = 1;
  args.segment_length = channels;
  args.b = panels.data();
  args.b_panel = channels * kPanel;
  args.bias = bias.data();
  args.gamma = layer_scale ? layer_scale->data() : nullptr;
  args.residual = skip ? skip->data : nullptr;
  args.residual_row = skip ? skip->pixel : 0;
  args.residual_panel = kPanel;
  args.c = out.data();
  args.c_row = outputs;
  args.c_panel = kPanel;
  args.n = outputs;
  args.act = activation_of(act);
  args.chain = gemm_chain(in.pixels());

  const GemmKernel& kernel = gemm_kernel();
  const int64_t rows = in.batch * in.pixels();
  const int64_t columns = div_up(outputs, kPanel);
  if (rows == 0 || columns == 0) return out.finish();
  const GemmGrid grid = gemm_grid(kernel, rows, columns, torch::stable::get_num_threads());
  parallel(grid.row_chunks * grid.panel_chunks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t r = t / grid.panel_chunks;
      const int64_t p = t % grid.panel_chunks;
      gemm(kernel, args, rows * r / grid.row_chunks, rows * (r + 1) / grid.row_chunks, columns * p / grid.panel_chunks,
           columns * (p + 1) / grid.panel_chunks);
    }
  });
  return out.finish();
}

Tensor prepack(Tensor weight, bool depthwise) {
  MNV4_CHECK_SHAPE(weight.dim() == 4 || weight.dim() == 2, weight, "weight",
                   "have shape [K, C, kh, kw], [C, 1, kh, kw] or [K, C]");
  const Packing packing = depthwise ? Packing::kDepthwise : Packing::kDense;
  Tensor packed = scratch(packed_size(weight, packing));
  pack_into(scaled_weight(weight, std::nullopt, "weight").data(), weight, packing, floats(packed));
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("pwconv_bn_act", TORCH_BOX(&pwconv_bn_act));
  m.impl("prepack", TORCH_BOX(&prepack));
}

}  // namespace mnv4::ops
