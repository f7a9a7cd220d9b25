// mnv4_kernels::conv_bn_act on the CPU.
#include <algorithm>

#include "kernels/conv/conv.h"
#include "ops/common.h"

namespace mnv4::ops {
namespace {

// Output rows of a task: long enough that the rows a ring copies twice, at a task's border, cost little.
constexpr int64_t kRowsPerTask = 8;

// An image with few channels is read as it lies; anything else as NHWC.
Image source(const Tensor& x, ptrdiff_t* channel_stride) {
  *channel_stride = 1;
  const bool planar = x.dim() == 4 && conv_is_planar(x.size(1)) && storage_of(x, "x") == Storage::kFloat32;
  if (!planar) return image(x, "x");
  Image v{};
  v.data = static_cast<const float*>(x.const_data_ptr());
  v.batch = x.size(0);
  v.channels = x.size(1);
  v.height = x.size(2);
  v.width = x.size(3);
  v.n_stride = x.stride(0);
  v.row = x.stride(2);
  v.pixel = x.stride(3);
  *channel_stride = x.stride(1);
  return v;
}

Tensor conv_bn_act(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor shift, IntList stride, IntList padding,
                   IntList dilation, std::string act, bool channels_last, OptionalTensor packed) {
  const Geometry g = geometry(x, weight, stride, padding, dilation);
  const int64_t channels = x.size(1);
  const int64_t outputs = weight.size(0);
  MNV4_CHECK_SHAPE(weight.size(1) == channels, weight, "weight", "have shape [K, C, kh, kw] with C = ", channels,
                   ", the channels of `x`");
  const Packed panels(weight, scale, packed, Packing::kDense);
  const Vector bias(shift, outputs, "shift");
  ConvArgs args{};
  const Image in = source(x, &args.x_channel);
  Result out(x, in.batch, outputs, g.out_height, g.out_width, channels_last || is_channels_last(x));

  args.x_type = Storage::kFloat32;
  args.x_block = kPanel;
  args.x_row = in.row;
  args.x_pixel = in.pixel;
  args.channels = channels;
  args.height = in.height;
  args.width = in.width;
  args.weight = panels.data();
  args.bias = bias.data();
  args.y_pixel = outputs;
  args.y_row = outputs * g.out_width;
  args.y_panel = kPanel;
  args.out_channels = outputs;
  set_window(args, g);
  args.act = activation_of(act);

  const int64_t workers = torch::stable::get_num_threads();
  const int64_t by_length = div_up(g.out_height, kRowsPerTask);
  const int64_t by_workers = div_up(workers, std::max<int64_t>(1, in.batch));
  // as few chunks an image as keep every worker busy
  const int64_t chunks = std::max<int64_t>(1, std::min(g.out_height, std::min(by_length, by_workers)));
  const int64_t tasks = in.batch * chunks;
  const int64_t per_worker = conv_scratch(args);
  const GemmKernel& kernel = gemm_kernel();
  parallel(tasks, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch(per_worker);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / chunks;
      const int64_t c = t % chunks;
      ConvArgs task = args;
      task.x = in.data + n * in.n_stride;
      task.y = out.data() + n * g.out_height * args.y_row;
      conv(kernel, task, g.out_height * c / chunks, g.out_height * (c + 1) / chunks, floats(buffer));
    }
  });
  return out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) { m.impl("conv_bn_act", TORCH_BOX(&conv_bn_act)); }

}  // namespace mnv4::ops
