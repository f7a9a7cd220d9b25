// mnv4_kernels::dwconv_bn_act on the CPU.
#include <algorithm>

#include "cpu/features.h"
#include "kernels/dwconv/dwconv.h"
#include "ops/common.h"

namespace mnv4::ops {
namespace {

// Input rows of a task stay in half of L2, so that each is read from memory once.
int64_t rows_per_task(const DwconvArgs& a) {
  const int64_t row_bytes = a.width * a.channels * a.stride_h * static_cast<int64_t>(sizeof(float));
  return std::max<int64_t>(1, cpu::cache_sizes().l2 / 2 / std::max<int64_t>(1, row_bytes));
}

Tensor dwconv_bn_act(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor shift, IntList stride,
                     IntList padding, IntList dilation, std::string act, OptionalTensor packed) {
  const Geometry g = geometry(x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  MNV4_CHECK_SHAPE(weight.size(0) == channels && weight.size(1) == 1, weight, "weight",
                   "have shape [C, 1, kh, kw] with C = ", channels);
  const Packed panels(weight, scale, packed, Packing::kDepthwise);
  const Vector bias(shift, channels, "shift");
  const Image in = image(x, "x");
  Result out(x, in.batch, channels, g.out_height, g.out_width, is_channels_last(x));

  DwconvArgs args{};
  args.x_row = in.row;
  args.x_pixel = in.pixel;
  args.height = in.height;
  args.width = in.width;
  args.y_pixel = channels;
  args.y_row = channels * g.out_width;
  args.weight = panels.data();
  args.bias = bias.data();
  args.channels = channels;
  set_window(args, g);
  args.act = activation_of(act);

  // images by row chunks by channel chunks; enough tasks to balance, each long enough to amortise its halo
  const int64_t blocks = div_up(channels, kPanel);
  const int64_t workers = torch::stable::get_num_threads();
  const int64_t row_chunks = div_up(g.out_height, rows_per_task(args));
  const int64_t wanted = div_up(4 * workers, std::max<int64_t>(1, in.batch * row_chunks));
  const int64_t channel_chunks = workers == 1 ? 1 : std::min(blocks, wanted);
  const DwconvKernel& kernel = dwconv_kernel();
  parallel(in.batch * row_chunks * channel_chunks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / (row_chunks * channel_chunks);
      const int64_t r = t / channel_chunks % row_chunks;
      const int64_t c = t % channel_chunks;
      DwconvArgs task = args;
      task.x = in.data + n * in.n_stride;
      task.y = out.data() + n * g.out_height * args.y_row;
      kernel.run(task, g.out_height * r / row_chunks, g.out_height * (r + 1) / row_chunks,
                 blocks * c / channel_chunks * kPanel, std::min(channels, blocks * (c + 1) / channel_chunks * kPanel));
    }
  });
  return out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) { m.impl("dwconv_bn_act", TORCH_BOX(&dwconv_bn_act)); }

}  // namespace mnv4::ops
