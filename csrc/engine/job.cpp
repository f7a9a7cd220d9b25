#include "engine/job.h"

#include <algorithm>
#include <cstring>

#include "kernels/pointwise/pointwise.h"

namespace mnv4::engine {
namespace {

// Index of the image row or column that position i of a mirrored axis shows.
int64_t mirrored(int64_t i, int64_t size) {
  if (i < 0) i = -i;
  if (i >= size) i = 2 * (size - 1) - i;
  return i;
}

// The plane of a block in `scratch`, in float32 and with its pixels p.pixel() apart.
float* widened(const Planes& p, char* arena, int64_t image, int64_t block, float* scratch) {
  const int64_t beside = p.paired() ? block % 2 : 0;
  pointwise_kernels().widen(p.at(arena, image, block - beside), p.type, scratch, p.pixels() * p.pixel());
  return scratch + beside * kPanel;
}

}  // namespace

void Planes::clear_partner(char* arena, int64_t i, int64_t b, int64_t row_begin, int64_t row_end) const {
  if (!paired() || b % 2 || b + 1 < blocks()) return;
  auto* half = static_cast<uint16_t*>(at(arena, i * image() + block(b) + row_begin * row() + kPanel));
  for (int64_t p = 0; p < (row_end - row_begin) * width; ++p)
    std::memset(half + p * pixel(), 0, kPanel * sizeof(*half));
}

Matrix Matrix::of(const Planes& p) {
  const ptrdiff_t panel = p.paired() ? p.pair() : p.plane();
  return {p.offset, p.type, p.images, p.pixels(), p.image(), p.pixel(), panel, p.channels, p.paired()};
}

Matrix Matrix::row_major(Storage type, int64_t images, int64_t rows, int64_t columns) {
  return {0, type, images, rows, rows * columns, columns, kPanel, columns};
}

int64_t Depthwise::rows_ready(int64_t rows) const {
  if (rows >= args.height) return args.out_height;
  // those of padding alone count with the first ones that read something
  if (rows == 0) return 0;
  const int64_t last = rows - 1 - static_cast<int64_t>(args.kernel_h - 1) * args.dilation_h + args.pad_top;
  return last < 0 ? 0 : std::min(last / args.stride_h + 1, args.out_height);
}

int64_t Depthwise::padded_floats() const {
  if (!reflect) return 0;
  return (args.height + 2 * args.kernel_h) * (args.width + 2 * args.kernel_w) * kPanel;
}

double Depthwise::plane_cost() const {
  // a depthwise row runs at about half of a product's rate
  return 2.0 * static_cast<double>(args.out_height * args.out_width * args.kernel_h * args.kernel_w * kPanel);
}

void Depthwise::run(const DwconvKernel& kernel, const void* x, int64_t x_pixel, char* arena, int64_t image,
                    int64_t block, int64_t row_begin, int64_t row_end, float* padded) const {
  DwconvArgs a = args;
  a.x = x;
  a.x_pixel = x_pixel;
  a.x_row = a.width * x_pixel;
  if (reflect) {
    const int64_t pixel_bytes = kPanel * storage_bytes(kernel.input);
    const int64_t height = (a.out_height - 1) * a.stride_h + a.kernel_h;
    const int64_t width = (a.out_width - 1) * a.stride_w + a.kernel_w;
    auto* to = reinterpret_cast<char*>(padded);
    // pixels of a row that lie side by side, as those of the padded one do
    const int64_t run = x_pixel == kPanel ? std::min(args.width, width - a.pad_left) : 1;
    for (int64_t y = 0; y < height; ++y) {
      const int64_t row = mirrored(y - a.pad_top, args.height) * args.width;
      for (int64_t i = 0; i < width;) {
        const int64_t pixels = i == a.pad_left ? run : 1;
        const void* from = advance(x, kernel.input, (row + mirrored(i - a.pad_left, args.width)) * x_pixel);
        std::memcpy(to, from, static_cast<size_t>(pixels * pixel_bytes));
        to += pixels * pixel_bytes;
        i += pixels;
      }
    }
    a.x = padded;
    a.height = height;
    a.width = width;
    a.x_pixel = kPanel;
    a.x_row = width * kPanel;
    a.pad_top = 0;
    a.pad_left = 0;
  }
  a.y = y.at(arena, image, block);
  a.y_pixel = y.pixel();
  a.y_row = y.row();
  a.weight = weight + block * a.kernel_h * a.kernel_w * kPanel;
  a.bias = bias + block * kPanel;
  a.channels = kPanel;
  kernel.run(a, row_begin, row_end, 0, kPanel);
  y.clear_partner(arena, image, block, row_begin, row_end);
}

std::vector<Stream::Range> Job::weights(int64_t, int64_t) const { return {}; }
int64_t Job::passes(int64_t, int64_t) const { return 0; }

InputJob::InputJob(const Planes& y, int64_t first_image)
    : Job(y.images * y.height, static_cast<double>(y.width * round_up(y.channels, kPanel))),
      y_(y),
      first_image_(first_image) {}

void InputJob::run(const Context& context, int64_t begin, int64_t end, Worker&) const {
  const Input& in = context.input;
  for (; begin < end; ++begin) {
    const int64_t image = begin / y_.height;
    const int64_t row = begin % y_.height;
    for (int64_t block = 0; block < y_.blocks(); ++block) {
      const float* x =
          in.data + (context.first_image + first_image_ + image) * in.image + row * in.row + block * in.block;
      void* y = y_.at(context.arena, image * y_.image() + y_.block(block) + row * y_.row());
      const int64_t channels = std::min<int64_t>(kPanel, y_.channels - block * kPanel);
      for (int64_t i = 0; i < y_.width; ++i) {
        float pixel[kPanel] = {};
        for (int64_t c = 0; c < channels; ++c) pixel[c] = x[i * in.pixel + c * in.channel];
        pointwise_kernels().narrow(pixel, y_.type, advance(y, y_.type, i * y_.pixel()), kPanel);
      }
      y_.clear_partner(context.arena, image, block, row, row + 1);
    }
  }
}

namespace {

double conv_row_cost(const ConvArgs& a) {
  return static_cast<double>(a.out_width * a.out_channels * a.channels * a.kernel_h * a.kernel_w);
}

int64_t conv_units(const ConvJob::Spec& s) {
  return s.y.images * div_up(s.y.height, s.args.winograd ? WinogradRows::kRows : ConvRows::kRows);
}

double conv_cost(const ConvJob::Spec& s) {
  const double source = s.has_source ? conv_row_cost(s.source) * static_cast<double>(s.args.stride_h) : 0.0;
  const int64_t projected = s.projection ? s.y.width * s.y.channels * s.projection->y.channels : 0;
  return conv_row_cost(s.args) + source + static_cast<double>(projected);
}

Storage conv_compute(const ConvJob::Spec& s) { return s.from_input ? s.y.type : s.x.type; }

int64_t conv_weight_bytes(const ConvArgs& a, Storage type) {
  const int64_t depth = a.winograd ? winograd_depth(a.channels, a.stride_h) : conv_depth(a.shape());
  return depth * round_up(a.out_channels, kPanel) * storage_bytes(type);
}

}  // namespace

ConvJob::ConvJob(Spec spec)
    : Job(conv_units(spec), conv_cost(spec)),
      spec_(std::move(spec)),
      kernel_(gemm_kernel(conv_compute(spec_), spec_.y.type)),
      source_kernel_(gemm_kernel(conv_compute(spec_), conv_compute(spec_))) {
  ConvArgs& a = spec_.args;
  a.y_pixel = spec_.y.pixel();
  a.y_row = spec_.y.row();
  a.y_panel = Matrix::of(spec_.y).panel;
  // a row to project is a map of its own
  if (spec_.projection) a.y_panel = spec_.y.row();
  a.y_paired = spec_.y.paired();
  // whole panels: the padded channels of the result are zeros
  a.out_channels = round_up(spec_.y.channels, kPanel);
  a.x_type = spec_.source.x_type = conv_compute(spec_);
  if (spec_.from_input) {
    outer().x_type = Storage::kFloat32;
  } else {
    outer().x_block = Matrix::of(spec_.x).panel;
    outer().x_paired = spec_.x.paired();
    outer().x_row = spec_.x.row();
    outer().x_pixel = spec_.x.pixel();
    outer().x_channel = 1;
  }
  if (spec_.projection) {
    projection_kernel_ = &gemm_kernel(spec_.y.type, spec_.projection->y.type);
    for (int64_t b = 0; b < spec_.y.blocks(); ++b) segment_.push_back(b * spec_.y.width * kPanel);
  }
}

int64_t ConvJob::own_scratch() const {
  return spec_.args.winograd ? winograd_scratch(spec_.args) : conv_scratch(spec_.args);
}

int64_t ConvJob::scratch_floats() const {
  return own_scratch() + (spec_.has_source ? conv_scratch(spec_.source) : 0) +
         (spec_.projection ? rows_of_unit() * row_floats() : 0);
}

void ConvJob::project(const Context& context, int64_t image, int64_t oy, const void* row, Stream* stream) const {
  const Projection& p = *spec_.projection;
  const Matrix y = Matrix::of(p.y);
  const int64_t at = image * y.image + oy * p.y.row();
  GemmArgs g{};
  g.a = row;
  g.a_row = spec_.y.pixel();
  if (spec_.y.paired()) g.packed_pitch = spec_.y.width;
  g.segment = segment_.data();
  g.segments = spec_.y.blocks();
  g.segment_length = kPanel;
  g.b = p.weight;
  g.b_panel = spec_.y.blocks() * kPanel * kPanel;
  g.bias = p.bias;
  g.act = p.act;
  g.n = p.y.blocks() * kPanel;
  g.c = p.y.at(context.arena, at);
  g.c_row = y.row;
  g.c_panel = y.panel;
  g.paired = y.paired;
  if (p.residual) {
    const Matrix residual = Matrix::of(*p.residual);
    g.residual = p.residual->at(context.arena, image * residual.image + oy * p.residual->row());
    g.residual_row = residual.row;
    g.residual_panel = residual.panel;
    g.residual_paired = residual.paired;
  }
  g.stream = stream;
  gemm(*projection_kernel_, g, 0, spec_.y.width, 0, p.y.blocks());
}

template <class Rows>
void ConvJob::walk(const Context& context, const ConvArgs& args, ConvRows* source, int64_t image, int64_t first,
                   int64_t rows, float* buffer, Worker& worker) const {
  const Planes& y = spec_.y;
  Rows conv(kernel_, args, worker.scratch, source);
  for (int64_t oy = first; oy < first + rows; oy += Rows::kRows) {
    void* row[Rows::kRows];
    const int64_t count = std::min(Rows::kRows, y.height - oy);
    for (int64_t r = 0; r < Rows::kRows; ++r) {
      void* to = spec_.projection ? static_cast<void*>(buffer + r * row_floats())
                                  : y.at(context.arena, image * y.image() + (oy + r) * args.y_row);
      row[r] = r < count ? to : nullptr;
    }
    conv.rows(oy, row);
    if (!spec_.projection) continue;
    for (int64_t r = 0; r < count; ++r) project(context, image, oy + r, row[r], &worker.stream);
  }
}

void ConvJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  const int64_t step = rows_of_unit();
  const int64_t image_units = div_up(spec_.y.height, step);
  while (begin < end) {
    const int64_t image = begin / image_units;
    const int64_t first = begin % image_units;
    const int64_t units = std::min(image_units - first, end - begin);
    ConvArgs args = spec_.args;
    ConvArgs source_args = spec_.source;
    ConvArgs& reader = spec_.has_source ? source_args : args;
    if (spec_.from_input) {
      const Input& in = context.input;
      reader.x = in.data + (context.first_image + spec_.first_image + image) * in.image;
      reader.x_channel = in.channel;
      reader.x_block = in.block;
      reader.x_row = in.row;
      reader.x_pixel = in.pixel;
    } else {
      reader.x = spec_.x.at(context.arena, image * spec_.x.image());
    }
    args.stream = source_args.stream = &worker.stream;
    float* buffer = worker.scratch + own_scratch();
    std::optional<ConvRows> source;
    if (spec_.has_source) {
      source.emplace(source_kernel_, source_args, buffer + (spec_.projection ? step * row_floats() : 0));
    }
    ConvRows* rows = source ? &*source : nullptr;
    if (args.winograd) {
      walk<WinogradRows>(context, args, rows, image, first * step, units * step, buffer, worker);
    } else {
      walk<ConvRows>(context, args, rows, image, first * step, units * step, buffer, worker);
    }
    begin += units;
  }
}

std::vector<Stream::Range> ConvJob::weights(int64_t begin, int64_t end) const {
  if (begin == end) return {};
  std::vector<Stream::Range> found{{spec_.args.weight, conv_weight_bytes(spec_.args, kernel_.input)}};
  if (spec_.projection) {
    const int64_t values = spec_.y.blocks() * spec_.projection->y.blocks() * kPanel * kPanel;
    found.push_back({spec_.projection->weight, values * storage_bytes(spec_.y.type)});
  }
  return found;
}

int64_t ConvJob::passes(int64_t begin, int64_t end) const {
  const ConvArgs& a = spec_.args;
  const int64_t rows = a.winograd ? div_up(spec_.y.width, 2) : spec_.y.width;
  // Winograd's products take one panel at a time
  const int64_t depth = a.winograd ? 0 : conv_depth(a.shape());
  return (end - begin) * gemm_passes(kernel_, rows, depth) * conv_weight_bytes(spec_.args, kernel_.input);
}

DepthwiseJob::DepthwiseJob(const Planes& x, Depthwise dw, int64_t part, int64_t parts)
    : Job(dw.y.images * dw.y.blocks() * (dw.y.height * (part + 1) / parts - dw.y.height * part / parts),
          dw.plane_cost() / static_cast<double>(dw.y.height)),
      kernel_(dwconv_kernel(x.type, dw.y.type)),
      x_(x),
      dw_(std::move(dw)),
      first_row_(dw_.y.height * part / parts),
      last_row_(dw_.y.height * (part + 1) / parts) {}

void DepthwiseJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  const int64_t height = last_row_ - first_row_;
  while (begin < end) {
    const int64_t row = first_row_ + begin % height;
    const int64_t rows = std::min(last_row_ - row, end - begin);
    const int64_t image = begin / height / x_.blocks();
    const int64_t block = begin / height % x_.blocks();
    dw_.run(kernel_, x_.at(context.arena, image, block), x_.pixel(), context.arena, image, block, row, row + rows,
            worker.scratch);
    begin += rows;
  }
}

DownsampleJob::DownsampleJob(const Planes& x, const float* scale, const float* shift, Depthwise key, Depthwise value)
    : Job(x.images * x.blocks(), key.plane_cost() + value.plane_cost() + static_cast<double>(x.plane())),
      kernel_(dwconv_kernel(Storage::kFloat32, key.y.type)),
      x_(x),
      scale_(scale),
      shift_(shift),
      key_(std::move(key)),
      value_(std::move(value)) {}

void DownsampleJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  for (; begin < end; ++begin) {
    const int64_t image = begin / x_.blocks();
    const int64_t block = begin % x_.blocks();
    const float* scale = scale_ + block * kPanel;
    const float* shift = shift_ + block * kPanel;
    float* plane = widened(x_, context.arena, image, block, worker.scratch);
    for (int64_t p = 0; p < x_.pixels(); ++p) {
      float* pixel = plane + p * x_.pixel();
      for (int c = 0; c < kPanel; ++c) pixel[c] = pixel[c] * scale[c] + shift[c];
    }
    for (const Depthwise* path : {&key_, &value_}) {
      path->run(kernel_, plane, x_.pixel(), context.arena, image, block, 0, path->args.out_height, nullptr);
    }
  }
}

KeyPanelsJob::KeyPanelsJob(const Matrix& key, const Matrix& packed)
    : Job(key.images * div_up(key.rows, kPanel), static_cast<double>(packed.columns * kPanel)),
      key_(key),
      packed_(packed) {}

void KeyPanelsJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  const int64_t panels = div_up(key_.rows, kPanel);
  const int64_t key_dim = packed_.columns;
  for (; begin < end; ++begin) {
    const int64_t image = begin / panels;
    const int64_t first = begin % panels * kPanel;
    const auto* key = static_cast<const float*>(key_.at(context.arena, image * key_.image + first * key_.row));
    void* to = packed_.at(context.arena, begin * key_dim * kPanel);
    const bool pairs = packed_.type != Storage::kFloat32;
    float* panel = pairs ? worker.scratch : static_cast<float*>(to);
    pack_panels(key, std::min<int64_t>(kPanel, key_.rows - first), key_dim, key_.row, 1, panel);
    if (pairs) pack_pairs(panel, 1, key_dim, static_cast<uint16_t*>(to));
  }
}

ValuePairsJob::ValuePairsJob(const Planes& value, const Matrix& packed)
    : Job(value.images * value.blocks(), static_cast<double>(value.plane())), value_(value), packed_(packed) {}

void ValuePairsJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  const int64_t positions = packed_.rows;
  for (; begin < end; ++begin) {
    const auto* plane = static_cast<const float*>(value_.at(context.arena, begin * value_.plane()));
    std::fill(std::copy_n(plane, value_.plane(), worker.scratch), worker.scratch + positions * kPanel, 0.0f);
    pack_pairs(worker.scratch, 1, positions,
               static_cast<uint16_t*>(packed_.at(context.arena, begin * positions * kPanel)));
  }
}

AttentionJob::AttentionJob(const AttentionArgs& args, int64_t rows, const Matrix& query, const Matrix& key,
                           const Matrix& value, const Matrix& y)
    : Job(y.images * div_up(rows, 2 * gemm_kernel(query.type).max_rows), 1.0),
      kernel_(gemm_kernel(query.type)),
      mixing_(gemm_kernel(query.type, y.type)),
      args_(args),
      rows_(rows),
      blocks_(div_up(rows, 2 * kernel_.max_rows)),
      query_(query),
      key_(key),
      value_(value),
      y_(y) {}

void AttentionJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  while (begin < end) {
    const int64_t image = begin / blocks_;
    const int64_t block = begin % blocks_;
    const int64_t count = std::min(blocks_ - block, end - begin);
    AttentionArgs a = args_;
    a.query = query_.at(context.arena, image * query_.image);
    a.key = key_.at(context.arena, image * key_.image);
    a.value = value_.at(context.arena, image * value_.image);
    a.y = y_.at(context.arena, image * rows_ * a.value_dim);
    attention(kernel_, mixing_, a, rows_ * block / blocks_, rows_ * (block + count) / blocks_, worker.scratch);
    begin += count;
  }
}

MeanJob::MeanJob(const Planes& x, const Planes& y)
    : Job(x.images * x.blocks(), static_cast<double>(x.plane())), x_(x), y_(y) {}

void MeanJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  for (; begin < end; ++begin) {
    float mean[kPanel];
    const float* plane = widened(x_, context.arena, begin / x_.blocks(), begin % x_.blocks(), worker.scratch);
    pointwise_kernels().mean_pixels(plane, x_.pixels(), x_.pixel(), kPanel, mean);
    pointwise_kernels().narrow(mean, y_.type, y_.at(context.arena, begin * kPanel), kPanel);
  }
}

LinearJob::LinearJob(const Planes& x, const Planes& y, const void* weight, const float* bias, Activation act)
    : Job(div_up(y.blocks(), kFewPanels), static_cast<double>(x.images * x.image() * kPanel)),
      kernel_(gemm_kernel(x.type, y.type)),
      x_(x),
      y_(y),
      weight_(weight),
      bias_(bias),
      act_(act) {}

void LinearJob::run(const Context& context, int64_t begin, int64_t end, Worker&) const {
  const ptrdiff_t whole_row = 0;
  GemmArgs a{};
  a.a = x_.at(context.arena, 0);
  a.a_row = x_.image();
  a.segment = &whole_row;
  a.segments = 1;
  a.segment_length = x_.image();
  a.b = weight_;
  a.b_panel = x_.image() * kPanel;
  a.bias = bias_;
  a.c = y_.at(context.arena, 0);
  a.c_row = y_.image();
  a.c_panel = kPanel;
  a.n = y_.image();
  a.act = act_;
  a.chain = kShortChain;
  gemm(kernel_, a, 0, x_.images, begin * kFewPanels, std::min(y_.blocks(), end * kFewPanels));
}

std::vector<Stream::Range> LinearJob::weights(int64_t begin, int64_t end) const {
  const int64_t unit = kFewPanels * x_.image() * kPanel;
  const int64_t all = y_.blocks() * x_.image() * kPanel;
  std::vector<Stream::Range> found;
  // the first ones last, for they are to be found in L2, which does not hold all
  for (int64_t u = end; u-- > begin;) {
    const int64_t values = std::min(unit, all - u * unit);
    found.push_back({advance(weight_, x_.type, u * unit), values * storage_bytes(x_.type)});
  }
  return found;
}

// Memory bounds it: nothing can be fetched meanwhile.
int64_t LinearJob::passes(int64_t, int64_t) const { return 0; }

OutputJob::OutputJob(const Planes& x, int64_t index, int64_t first_image)
    : Job(x.images * x.blocks(), static_cast<double>(x.plane())), x_(x), index_(index), first_image_(first_image) {}

void OutputJob::run(const Context& context, int64_t begin, int64_t end, Worker& worker) const {
  const int64_t pixels = x_.pixels();
  const int64_t pixel = x_.pixel();
  for (; begin < end; ++begin) {
    const int64_t image = begin / x_.blocks();
    const int64_t first = begin % x_.blocks() * kPanel;
    const int64_t channels = std::min<int64_t>(kPanel, x_.channels - first);
    const int64_t block = begin % x_.blocks();
    const float* x = x_.type == Storage::kFloat32 ? static_cast<const float*>(x_.at(context.arena, image, block))
                                                  : widened(x_, context.arena, image, block, worker.scratch);
    float* y = context.outputs[index_] + (context.first_image + first_image_ + image) * x_.channels * pixels;
    if (context.nhwc) {
      y += first;
      for (int64_t p = 0; p < pixels; ++p) std::copy_n(x + p * pixel, channels, y + p * x_.channels);
      continue;
    }
    y += first * pixels;
    // as many pixels at a time as stay in L1 for all channels
    for (int64_t p = 0; p < pixels; p += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, pixels - p);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < count; ++i) y[c * pixels + p + i] = x[(p + i) * pixel + c];
      }
    }
  }
}

}  // namespace mnv4::engine
