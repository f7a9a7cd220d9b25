// mnv4_kernels::bn_act_conv and its backward on the CPU.
#include <algorithm>

#include "kernels/conv/conv.h"
#include "ops/training.h"

namespace mnv4::ops {
namespace {

// Output rows of a task: a ring's or a chunk's borders cost little, its planes stay in L2.
constexpr int64_t kRowsPerTask = 8;

// Input rows of one phase of the stride that a task of the way back computes.
constexpr int64_t kInputRows = 4;

// Parts in which a weight gradient is summed, whatever the thread count.
constexpr int64_t kSplits = 16;

struct Shape {
  int64_t channels, outputs, taps, height, width;
  Geometry g;
};

Shape shape_of(const Tensor& x, const Tensor& weight, const IntList& stride, const IntList& padding,
               const IntList& dilation) {
  const Geometry g = geometry(x, weight, stride, padding, dilation);
  MNV4_CHECK_SHAPE(weight.size(1) == x.size(1), weight, "weight", "have shape [K, C, kh, kw] with C = ", x.size(1),
                   ", the channels of `x`");
  return {x.size(1), weight.size(0), static_cast<int64_t>(g.kernel_h) * g.kernel_w, x.size(2), x.size(3), g};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_conv(Tensor x, OptionalTensor mean, OptionalTensor var, OptionalTensor gamma,
                                               OptionalTensor beta, double eps, std::string act, Tensor weight,
                                               IntList stride, IntList padding, IntList dilation, bool moments,
                                               bool channels_last) {
  const Shape s = shape_of(x, weight, stride, padding, dilation);
  const Geometry& g = s.g;
  const InputNorm norm(mean, var, gamma, beta, eps, act, s.channels);
  const Packed packed(weight, std::nullopt, std::nullopt, Packing::kDense);
  const Image in = dense_image(x, "x");
  Result out(x, in.batch, s.outputs, g.out_height, g.out_width, channels_last || is_channels_last(x));
  const Storage type = storage_of(x, "x");
  const std::vector<float> zeros(static_cast<size_t>(round_up(s.outputs, kPanel)), 0.0f);
  ConvArgs args{};
  args.x_channel = 1;
  args.x_block = kPanel;
  args.x_row = in.row;
  args.x_pixel = in.pixel;
  args.channels = s.channels;
  args.height = in.height;
  args.width = in.width;
  args.weight = packed.data();
  args.bias = zeros.data();
  args.y_pixel = s.outputs;
  args.y_row = s.outputs * g.out_width;
  args.y_panel = kPanel;
  args.out_channels = s.outputs;
  set_window(args, g);
  args.act = Activation::kNone;
  const int64_t chunks = div_up(g.out_height, kRowsPerTask);
  const int64_t tasks = in.batch * chunks;
  Moments partial(moments ? tasks : 0, s.outputs);
  std::vector<int64_t> counts(static_cast<size_t>(tasks));
  const int64_t per_worker = conv_scratch(args);
  const GemmKernel& kernel = gemm_kernel();
  // input rows of a task, normalised before the convolution reads them
  const int64_t rows_in = (kRowsPerTask - 1) * g.stride_h + static_cast<int64_t>(g.kernel_h - 1) * g.dilation_h + 1;
  const int64_t line = in.width * s.channels;
  if (!norm.is_identity()) {
    args.x_pixel = s.channels;
    args.x_row = line;
  }
  parallel(tasks, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch(per_worker);
    const Tensor lines = scratch(norm.is_identity() ? 0 : rows_in * line);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / chunks;
      const int64_t first = t % chunks * kRowsPerTask;
      const int64_t last = std::min(g.out_height, first + kRowsPerTask);
      ConvArgs task = args;
      task.x = in.data + n * in.n_stride;
      if (!norm.is_identity()) {
        const int64_t top = std::max<int64_t>(0, first * g.stride_h - g.pad_top);
        const int64_t bottom = std::min(in.height, first * g.stride_h - g.pad_top + rows_in);
        for (int64_t y = top; y < bottom; ++y) {
          const Target to{floats(lines) + (y - top) * line, static_cast<ptrdiff_t>(s.channels), kPanel, false};
          training_kernels().activate(norm.kernel(), in.data + n * in.n_stride + y * in.row, in.pixel, in.width,
                                      s.channels, to);
        }
        task.x = floats(lines) - top * line;
      }
      float* z = out.data() + n * g.out_height * args.y_row;
      task.y = z;
      conv(kernel, task, first, last, floats(buffer));
      const int64_t pixels = (last - first) * g.out_width;
      counts[static_cast<size_t>(t)] = pixels;
      round_to(type, z + first * args.y_row, pixels * s.outputs);
      if (moments) {
        training_kernels().moments(z + first * args.y_row, s.outputs, pixels, s.outputs, partial.mean(t),
                                   partial.m2(t));
      }
    }
  });
  if (!moments) return {out.finish(), scratch(0), scratch(0)};
  auto [z_mean, z_var] = partial.finish(counts);
  return {out.finish(), z_mean, z_var};
}

// Rows [begin, begin + rows) of an image as planes of 16 channels [panel][rows][width][16], `left` columns of padding
// before and zeros wherever there is no image.
struct Planes {
  int64_t rows, width, left;
  int64_t plane() const { return rows * width * kPanel; }
};

template <class F>
void fill_planes(const Planes& p, int64_t begin, int64_t height, int64_t panels, float* to, const F& row_of) {
  std::fill_n(to, panels * p.plane(), 0.0f);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t y = begin + row;
    if (y >= 0 && y < height) row_of(y, Target{to + (row * p.width + p.left) * kPanel, kPanel, p.plane(), true});
  }
}

// The weight gradient's right-hand side for few channels: [pixels][lanes], a lane for each (ky, kx, c). Only the
// border of `padded` is zero, and stays so.
void gather_taps(const Image& in, const InputNorm& norm, int64_t n, const Geometry& g, int64_t first, int64_t rows,
                 float* padded, int64_t padded_width, float* to, int64_t lanes) {
  const TrainingKernels& kernels = training_kernels();
  const int64_t channels = in.channels;
  const int64_t rows_in = (rows - 1) * g.stride_h + static_cast<int64_t>(g.kernel_h - 1) * g.dilation_h + 1;
  for (int64_t row = 0; row < rows_in; ++row) {
    const int64_t y = first * g.stride_h - g.pad_top + row;
    float* line = padded + (row * padded_width + g.pad_left) * channels;
    const float* from = in.data + n * in.n_stride + y * in.row;
    if (y < 0 || y >= in.height) {
      std::fill_n(line, in.width * channels, 0.0f);
    } else if (norm.is_identity() && in.pixel == channels) {
      std::copy_n(from, in.width * channels, line);
    } else {
      kernels.activate(norm.kernel(), from, in.pixel, in.width, channels,
                       {line, static_cast<ptrdiff_t>(channels), kPanel, false});
    }
  }
  // taps side by side are adjacent in a line, unless they are apart
  const int64_t run = g.dilation_w == 1 ? g.kernel_w : 1;
  for (int64_t row = 0; row < rows; ++row) {
    float* target = to + row * g.out_width * lanes;
    for (int ky = 0; ky < g.kernel_h; ++ky) {
      const float* line = padded + (row * g.stride_h + ky * g.dilation_h) * padded_width * channels;
      for (int64_t kx = 0; kx < g.kernel_w; kx += run, target += run * channels) {
        const MomentsGradient copy{line + kx * g.dilation_w * channels,
                                   static_cast<ptrdiff_t>(g.stride_w * channels),
                                   nullptr,
                                   0,
                                   nullptr,
                                   nullptr,
                                   nullptr};
        kernels.result_gradient(copy, g.out_width, run * channels, {target, lanes, kPanel, false});
      }
    }
  }
}

// The gradient of a weight [K][C][kh][kw].
Tensor weight_of(const Shape& s, const ThroughMoments& result, const InputNorm& norm, const Image& in,
                 const Tensor& weight) {
  const Geometry& g = s.g;
  const bool planar = conv_is_planar(s.channels);
  const int64_t out_panels = div_up(s.outputs, kPanel);
  const int64_t in_panels = div_up(s.channels, kPanel);
  // tiles of an output panel: one for each tap and 16 channels, or for 16 of (ky, kx, c)
  const int64_t per_panel = planar ? div_up(s.taps * s.channels, kPanel) : s.taps * in_panels;
  constexpr int64_t kTile = kPanel * kPanel;
  const int64_t gradient = out_panels * per_panel * kTile;
  const int64_t splits = std::min(kSplits, in.batch);
  const Tensor partial = zeroed(std::max<int64_t>(1, splits * gradient));
  const int64_t reach = static_cast<int64_t>(g.kernel_h - 1) * g.dilation_h + 1;
  Planes planes{(kRowsPerTask - 1) * g.stride_h + reach, 0, g.pad_left};
  planes.width = std::max(g.pad_left + in.width,
                          (g.out_width - 1) * g.stride_w + static_cast<int64_t>(g.kernel_w - 1) * g.dilation_w + 1);
  const TrainingKernels& kernels = training_kernels();
  parallel(splits, [&](int64_t begin, int64_t end) {
    const int64_t pixels = kRowsPerTask * g.out_width;
    const int64_t right_size = planar ? per_panel * pixels * kPanel : in_panels * planes.plane();
    const int64_t line_size = planar ? planes.rows * planes.width * s.channels : 0;
    const Tensor buffer = zeroed(out_panels * pixels * kPanel + right_size + line_size);
    float* left = floats(buffer);
    float* right = left + out_panels * pixels * kPanel;
    for (int64_t split = begin; split < end; ++split) {
      for (int64_t n = in.batch * split / splits; n < in.batch * (split + 1) / splits; ++n) {
        for (int64_t first = 0; first < g.out_height; first += kRowsPerTask) {
          const int64_t rows = std::min(kRowsPerTask, g.out_height - first);
          const int64_t count = rows * g.out_width;
          kernels.result_gradient(result.rows(n, first * g.out_width, 0), count, s.outputs,
                                  {left, kPanel, count * kPanel, true});
          float* tile = floats(partial) + split * gradient;
          if (planar) {
            gather_taps(in, norm, n, g, first, rows, right + right_size, planes.width, right, per_panel * kPanel);
            for (int64_t o = 0; o < out_panels; ++o) {
              for (int64_t c = 0; c < per_panel; ++c, tile += kTile) {
                kernels.outer({left + o * count * kPanel, 0, kPanel, right + c * kPanel, 0,
                               static_cast<ptrdiff_t>(per_panel * kPanel), 1, count, tile, false});
              }
            }
            continue;
          }
          fill_planes(planes, first * g.stride_h - g.pad_top, in.height, in_panels, right,
                      [&](int64_t y, const Target& to) {
                        kernels.activate(norm.kernel(), in.data + n * in.n_stride + y * in.row, in.pixel, in.width,
                                         s.channels, to);
                      });
          for (int64_t o = 0; o < out_panels; ++o) {
            for (int64_t tap = 0; tap < s.taps; ++tap) {
              const int64_t ky = tap / g.kernel_w * g.dilation_h;
              const int64_t kx = tap % g.kernel_w * g.dilation_w;
              for (int64_t c = 0; c < in_panels; ++c, tile += kTile) {
                OuterArgs args{};
                args.left = left + o * count * kPanel;
                args.left_row = g.out_width * kPanel;
                args.left_column = kPanel;
                args.right = right + c * planes.plane() + (ky * planes.width + kx) * kPanel;
                args.right_row = g.stride_h * planes.width * kPanel;
                args.right_column = g.stride_w * kPanel;
                args.rows = rows;
                args.columns = g.out_width;
                args.tile = tile;
                kernels.outer(args);
              }
            }
          }
        }
      }
    }
  });
  float* sum = floats(partial);
  parallel(out_panels, [&](int64_t begin, int64_t end) {
    for (int64_t split = 1; split < splits; ++split) {
      const float* part = sum + split * gradient;
      for (int64_t i = begin * per_panel * kTile; i < end * per_panel * kTile; ++i) sum[i] += part[i];
    }
  });
  WeightGradient found(weight);
  for (int64_t o = 0; o < s.outputs; ++o) {
    const float* row = sum + (o / kPanel * per_panel * kPanel + o % kPanel) * kPanel;
    float* to = found.data() + o * s.channels * s.taps;
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        const int64_t lane = planar ? tap * s.channels + c : c;
        const int64_t block = planar ? lane / kPanel : tap * in_panels + c / kPanel;
        *to++ = row[block * kTile + lane % kPanel];
      }
    }
  }
  return found.finish();
}

// What the input pixels (phase + stride * i) of one axis see: the taps that reach them, and the result's row or column
// of each, relative to i.
struct Phase {
  std::vector<int> tap;
  std::vector<int64_t> offset;
};

std::vector<Phase> phases_of(int stride, int kernel, int pad, int dilation) {
  std::vector<Phase> phases(static_cast<size_t>(stride));
  for (int phase = 0; phase < stride; ++phase) {
    for (int tap = 0; tap < kernel; ++tap) {
      const int distance = phase + pad - tap * dilation;
      if (distance % stride != 0) continue;
      phases[static_cast<size_t>(phase)].tap.push_back(tap);
      phases[static_cast<size_t>(phase)].offset.push_back(distance / stride);
    }
  }
  return phases;
}

int64_t lowest(const std::vector<Phase>& phases) {
  int64_t found = 0;
  for (const Phase& phase : phases) {
    for (const int64_t offset : phase.offset) found = std::min(found, offset);
  }
  return found;
}

int64_t highest(const std::vector<Phase>& phases) {
  int64_t found = 0;
  for (const Phase& phase : phases) {
    for (const int64_t offset : phase.offset) found = std::max(found, offset);
  }
  return found;
}

// Gradient of the activated input into dx, [N][H][W][C]: for each phase of the stride a convolution with stride 1 over
// the result's gradient, so that nothing is multiplied with zeros between strides. `finish(n, first row, rows)` is
// called when rows of dx are there; it reads those rows of x.
template <class F>
void input_of(const Shape& s, const ThroughMoments& result, const std::vector<float>& weight, const Image& x, float* dx,
              const F& finish) {
  const int64_t batch = x.batch;
  const Geometry& g = s.g;
  const std::vector<Phase> vertical = phases_of(g.stride_h, g.kernel_h, g.pad_top, g.dilation_h);
  const std::vector<Phase> horizontal = phases_of(g.stride_w, g.kernel_w, g.pad_left, g.dilation_w);
  const int64_t out_panels = div_up(s.outputs, kPanel);
  const int64_t depth = out_panels * kPanel;
  const int64_t in_panels = div_up(s.channels, kPanel);
  std::vector<Tensor> packed;
  for (const Phase& v : vertical) {
    for (const Phase& h : horizontal) {
      const int64_t taps = static_cast<int64_t>(v.tap.size() * h.tap.size());
      packed.push_back(zeroed(std::max<int64_t>(1, in_panels * taps * depth * kPanel)));
      float* to = floats(packed.back());
      for (int64_t panel = 0; panel < in_panels; ++panel) {
        for (const int ky : v.tap) {
          for (const int kx : h.tap) {
            const float* from = weight.data() + panel * kPanel * s.taps + ky * g.kernel_w + kx;
            pack_panels(from, std::min<int64_t>(kPanel, s.channels - panel * kPanel), s.outputs, s.taps,
                        s.channels * s.taps, to);
            to += depth * kPanel;
          }
        }
      }
    }
  }
  const std::vector<float> zeros(static_cast<size_t>(in_panels * kPanel), 0.0f);
  const int64_t chunks = div_up(s.height, kInputRows * g.stride_h);
  const int64_t low_row = lowest(vertical), low_column = lowest(horizontal);
  const Planes planes{kInputRows + highest(vertical) - low_row,
                      std::max(g.out_width, div_up(s.width, g.stride_w) + highest(horizontal)) - low_column,
                      -low_column};
  const GemmKernel& kernel = gemm_kernel();
  const int64_t tiles = div_up(div_up(s.width, g.stride_w), kernel.max_rows);
  const int64_t passing =
      kInputRows * tiles * s.taps * depth * in_panels * kPanel * static_cast<int64_t>(sizeof(float));
  parallel(batch * chunks, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch(out_panels * planes.plane());
    std::vector<ptrdiff_t> segment;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / chunks;
      const int64_t first = t % chunks * kInputRows;
      fill_planes(planes, first + low_row, g.out_height, out_panels, floats(buffer), [&](int64_t y, const Target& to) {
        training_kernels().result_gradient(result.rows(n, y * g.out_width, 0), g.out_width, s.outputs, to);
      });
      const int64_t row = first * g.stride_h;
      const int64_t rows = std::min(s.height, (first + kInputRows) * g.stride_h) - row;
      Ahead ahead;
      ahead.add(x.data + n * x.n_stride + row * x.row, x.row, rows);
      // the next task's part of the result's gradient that this one has not read
      const int64_t below = std::min(g.out_height, first + planes.rows + low_row);
      const MomentsGradient coming = result.rows(n, below * g.out_width, 0);
      const int64_t count_below = std::min(g.out_height - below, kInputRows) * g.out_width;
      ahead.add(coming.grad, coming.grad_row, count_below);
      if (coming.z) ahead.add(coming.z, coming.z_row, count_below);
      Stream stream = ahead.stream(passing);
      float* image = dx + n * s.height * s.width * s.channels;
      for (int64_t i = first; i < first + kInputRows; ++i) {
        for (int ry = 0; ry < g.stride_h; ++ry) {
          const int64_t y = i * g.stride_h + ry;
          if (y >= s.height) continue;
          for (int rx = 0; rx < g.stride_w; ++rx) {
            const int64_t count = div_up(s.width - rx, g.stride_w);
            if (count <= 0) continue;
            const Phase& v = vertical[static_cast<size_t>(ry)];
            const Phase& h = horizontal[static_cast<size_t>(rx)];
            float* to = image + (y * s.width + rx) * s.channels;
            const int64_t apart = g.stride_w * s.channels;
            if (v.tap.empty() || h.tap.empty()) {
              for (int64_t j = 0; j < count; ++j) std::fill_n(to + j * apart, s.channels, 0.0f);
              continue;
            }
            segment.clear();
            for (const int64_t row : v.offset) {
              for (const int64_t column : h.offset) {
                for (int64_t o = 0; o < out_panels; ++o) {
                  const int64_t at = (i - first + row - low_row) * planes.width + column - low_column;
                  segment.push_back(o * planes.plane() + at * kPanel);
                }
              }
            }
            GemmArgs args{};
            args.a = floats(buffer);
            args.a_row = kPanel;
            args.segment = segment.data();
            args.segments = static_cast<int64_t>(segment.size());
            args.segment_length = kPanel;
            args.b = floats(packed[static_cast<size_t>(ry * g.stride_w + rx)]);
            args.b_panel = args.segments * kPanel * kPanel;
            args.bias = zeros.data();
            args.c = to;
            args.c_row = apart;
            args.c_panel = kPanel;
            args.n = s.channels;
            args.act = Activation::kNone;
            args.stream = &stream;
            gemm(kernel, args, 0, count, 0, in_panels);
          }
        }
      }
      finish(t, n, row, rows);
    }
  });
}

SixTensors bn_act_conv_backward(Tensor grad, OptionalTensor grad_mean, OptionalTensor grad_var, OptionalTensor z,
                                OptionalTensor z_mean, Tensor x, OptionalTensor mean, OptionalTensor var,
                                OptionalTensor gamma, OptionalTensor beta, double eps, std::string act, Tensor weight,
                                IntList stride, IntList padding, IntList dilation, bool need_input, bool need_weight) {
  const Shape s = shape_of(x, weight, stride, padding, dilation);
  const Geometry& g = s.g;
  MNV4_CHECK_SHAPE(grad.dim() == 4 && grad.size(0) == x.size(0) && grad.size(1) == s.outputs &&
                       grad.size(2) == g.out_height && grad.size(3) == g.out_width,
                   grad, "grad", "have the result's shape [", x.size(0), ", ", s.outputs, ", ", g.out_height, ", ",
                   g.out_width, "]");
  const InputNorm norm(mean, var, gamma, beta, eps, act, s.channels);
  const ThroughMoments result(grad_mean, grad_var, z, z_mean, grad);
  const Image in = dense_image(x, "x");
  Tensor none = nothing(x);
  SixTensors found{none, none, none, none, none, none};
  auto& [d_x, d_mean, d_var, d_gamma, d_beta, d_weight] = found;
  if (need_weight) d_weight = weight_of(s, result, norm, in, weight);
  if (!need_input) return found;

  Result dx(x, in.batch, s.channels, in.height, in.width, is_channels_last(x));
  const int64_t padded = round_up(s.channels, kPanel);
  const int64_t parts = in.batch * div_up(in.height, kInputRows * g.stride_h);
  const Tensor sums = zeroed(std::max<int64_t>(1, parts * 2 * padded));
  input_of(s, result, scaled_weight(weight, std::nullopt, "weight"), in, dx.data(),
           [&](int64_t task, int64_t n, int64_t row, int64_t rows) {
             float* to = dx.data() + (n * in.height + row) * in.width * s.channels;
             training_kernels().input_gradient(norm.kernel(), to, s.channels, kPanel,
                                               in.data + n * in.n_stride + row * in.row, in.pixel, rows * in.width,
                                               s.channels, to, s.channels, floats(sums) + task * 2 * padded);
           });
  norm.finish(join(floats(sums), parts, 2 * padded), &d_mean, &d_var, &d_gamma, &d_beta);
  d_x = dx.finish();
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("bn_act_conv", TORCH_BOX(&bn_act_conv));
  m.impl("bn_act_conv_backward", TORCH_BOX(&bn_act_conv_backward));
}

}  // namespace mnv4::ops
