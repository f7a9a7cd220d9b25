#include "kernels/conv/conv.h"

#include <algorithm>
#include <limits>

#include "kernels/pointwise/pointwise.h"

namespace mnv4 {
namespace {

// Runs of consecutive K: `segments` of `length`, over `planes` of `plane_channels`.
struct Runs {
  bool planar;
  int64_t planes;
  int64_t plane_channels;
  int64_t taps_apart;  // taps of a row that are runs of their own
  int64_t taps;        // taps in a run
  int64_t length;
  int64_t segments;

  explicit Runs(const ConvShape& s) {
    const auto even = [&](int64_t n) { return s.pairs ? round_up(n, 2) : n; };
    planar = conv_is_planar(s.channels) && !s.pairs;
    // a matrix unit reads whole pixels
    const bool blocks = s.channels % kPanel == 0 && !s.pairs;
    planes = planar ? s.channels : blocks ? s.channels / kPanel : 1;
    plane_channels = planar ? 1 : blocks ? kPanel : s.dilated ? even(s.channels) : s.channels;
    taps_apart = s.dilated ? s.kernel_w : 1;
    taps = s.kernel_w / taps_apart;
    length = even(taps * plane_channels);
    segments = planes * s.kernel_h * taps_apart;
  }
};

// ptrdiff_t entries, in floats
int64_t segment_floats(int64_t segments) {
  return round_up(segments * static_cast<int64_t>(sizeof(ptrdiff_t) / sizeof(float)), kPanel);
}

// A caller's image lies in memory: the rows of the next output row arrive during this one's products.
template <class T>
void fetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += kPanel) __builtin_prefetch(row + i);
}

int64_t ring_floats(const ConvRing& ring) { return round_up(ring.slots * ring.slot, kPanel); }

}  // namespace

ConvRing::ConvRing(const ConvArgs& a) {
  const Runs runs(a.shape());
  planar = runs.planar;
  planes = runs.planes;
  plane_channels = runs.plane_channels;
  segments = runs.segments;
  length = runs.length;
  slots = static_cast<int64_t>(a.kernel_h - 1) * a.dilation_h + 1;
  // a run of rounded length reads past its last tap
  const int64_t past = runs.length - runs.taps * runs.plane_channels;
  const int64_t reach = (a.out_width - 1) * a.stride_w + static_cast<int64_t>(a.kernel_w - 1) * a.dilation_w + 1;
  width = std::max(reach, a.pad_left + a.width) + past;
  plane = width * plane_channels;
  // A line more than the row: rows whose pitch is a power of two would share L1 sets. In bfloat16 a line is two panels.
  slot = round_up(planes * plane, 2 * kPanel) + 2 * kPanel;
}

int64_t ConvRing::slot_of(int64_t row) const {
  const int64_t index = row % slots;
  return (index < 0 ? index + slots : index) * slot;
}

int64_t conv_depth(const ConvShape& shape) {
  const Runs runs(shape);
  return runs.segments * runs.length;
}

int64_t PaddedRows::floats(const ConvArgs& a) {
  const ConvRing ring(a);
  return ring_floats(ring) + ring.slot;
}

PaddedRows::PaddedRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source)
    : kernel_(kernel),
      args_(args),
      ring_(args),
      ring_rows_(scratch),
      wide_row_(scratch + ring_floats(ring_)),
      source_(source),
      filled_(std::numeric_limits<int64_t>::min()) {
  if (source) source->feed(ring_, args.channels);
}

// The row without its padding, in its ring's layout.
template <class T>
void PaddedRows::copy(int64_t iy, T* row) const {
  const T* x = static_cast<const T*>(args_.x) + iy * args_.x_row;
  if (ring_.planar) {
    for (int64_t p = 0; p < ring_.planes; ++p) {
      const T* in = x + p * args_.x_channel;
      T* out = row + p * ring_.plane;
      fetch(in + args_.stride_h * args_.x_row, args_.width * args_.x_pixel);
      if (args_.x_pixel == 1) {
        std::copy_n(in, args_.width, out);
      } else {
        for (int64_t i = 0; i < args_.width; ++i) out[i] = in[i * args_.x_pixel];
      }
    }
    return;
  }
  if (conv_is_planar(args_.channels)) {
    for (int64_t i = 0; i < args_.width; ++i) {
      const T* in = x + i * args_.x_pixel;
      for (int64_t c = 0; c < args_.channels; ++c) row[i * ring_.plane_channels + c] = in[c * args_.x_channel];
    }
    return;
  }
  const bool blocks = ring_.plane_channels == kPanel;
  for (int64_t first = 0; first < args_.channels; first += kPanel) {
    const int64_t block = first / kPanel;
    const int64_t channels = std::min<int64_t>(kPanel, args_.channels - first);
    const T* in = x + GemmArgs::panel_at(args_.x_paired, block, args_.x_block);
    T* out = row + (blocks ? block * ring_.plane : first);
    if (blocks && args_.x_pixel == kPanel) {
      std::copy_n(in, args_.width * kPanel, out);
    } else {
      for (int64_t i = 0; i < args_.width; ++i) {
        // a whole block's length is known to the compiler
        if (channels == kPanel) {
          std::copy_n(in + i * args_.x_pixel, kPanel, out + i * ring_.plane_channels);
        } else {
          std::copy_n(in + i * args_.x_pixel, channels, out + i * ring_.plane_channels);
        }
      }
    }
  }
}

// An image of three planes, or whose pixels lie as the ring's do, goes from float32 to the ring's bfloat16 in one pass.
bool PaddedRows::narrows() const {
  if (source_ || args_.x_type != Storage::kFloat32 || ring_.plane_channels != args_.channels) return false;
  const bool pixels = args_.x_channel == 1 && args_.x_pixel == args_.channels;
  return ring_.planes == 1 && (pixels || (args_.channels == 3 && args_.x_pixel == 1));
}

void PaddedRows::narrow(int64_t iy, uint16_t* row) const {
  const float* x = static_cast<const float*>(args_.x) + iy * args_.x_row;
  const int64_t next = args_.stride_h * args_.x_row;
  if (args_.x_channel == 1) {
    fetch(x + next, args_.width * args_.channels);
    return pointwise_kernels().narrow(x, kernel_.input, row, args_.width * args_.channels);
  }
  for (int64_t c = 0; c < args_.channels; ++c) fetch(x + c * args_.x_channel + next, args_.width);
  pointwise_kernels().narrow_triples(x, args_.x_channel, row, args_.width);
}

template <class T>
void PaddedRows::fill(int64_t iy, T* row) {
  const bool inside = iy >= 0 && iy < args_.height;
  const int64_t left = inside ? args_.pad_left * ring_.plane_channels : ring_.plane;
  const int64_t right = inside ? ring_.plane - left - args_.width * ring_.plane_channels : 0;
  for (int64_t p = 0; p < ring_.planes; ++p) {
    std::fill_n(row + p * ring_.plane, left, T{0});
    std::fill_n(row + (p + 1) * ring_.plane - right, right, T{0});
  }
  if (!inside) return;
  if (ring_.plane_channels > args_.channels && !ring_.planar) {
    for (int64_t i = 0; i < args_.width; ++i) row[left + i * ring_.plane_channels + args_.channels] = T{0};
  }
  if (source_) {
    source_->row(iy, row + left);
  } else if constexpr (sizeof(T) == sizeof(uint16_t)) {
    narrows() ? narrow(iy, row + left) : copy(iy, row + left);
  } else {
    copy(iy, row + left);
  }
}

void PaddedRows::advance_to(int64_t first) {
  for (filled_ = std::max(filled_, first); filled_ < first + ring_.slots; ++filled_) {
    if (kernel_.input == Storage::kFloat32) {
      fill(filled_, static_cast<float*>(at(filled_)));
    } else if (!source_ && args_.x_type == Storage::kFloat32 && !narrows()) {
      fill(filled_, wide_row_);
      pointwise_kernels().narrow(wide_row_, kernel_.input, at(filled_), ring_.planes * ring_.plane);
    } else {
      fill(filled_, static_cast<uint16_t*>(at(filled_)));
    }
  }
}

int64_t conv_scratch(const ConvArgs& a) {
  const int64_t own = round_up(PaddedRows::floats(a), kPanel) + segment_floats(ConvRing(a).segments);
  return std::max(own, round_up(StemRows::floats(a), kPanel));
}

ConvRows::ConvRows(const GemmKernel& kernel, const ConvArgs& args, float* scratch, ConvRows* source)
    : kernel_(kernel),
      args_(args),
      rows_(kernel, args, scratch, source),
      segment_(reinterpret_cast<ptrdiff_t*>(scratch + round_up(PaddedRows::floats(args), kPanel))) {
  const ConvRing& ring = rows_.ring();
  product_.a = rows_.data();
  product_.a_row = static_cast<ptrdiff_t>(args.stride_w) * ring.plane_channels;
  product_.segment = segment_;
  product_.segments = ring.segments;
  product_.segment_length = ring.length;
  product_.b = args.weight;
  product_.b_panel = ring.segments * ring.length * kPanel;
  product_.bias = args.bias;
  product_.c_row = args.y_pixel;
  product_.c_panel = args.y_panel;
  product_.paired = args.y_paired;
  product_.n = args.out_channels;
  product_.act = args.act;
  // behind the ring lies wide_row_, as long as a row of float32
  if (args.out_width >= kMatrixRows) product_.rows_behind = kMatrixRows;
  product_.stream = args.stream;
  if (!source && StemRows::takes(kernel, args)) stem_.emplace(kernel, args, scratch);
}

void ConvRows::feed(const ConvRing& ring, int64_t channels) {
  product_.c_row = ring.plane_channels;
  product_.c_panel = ring.plane_channels == kPanel ? ring.plane : kPanel;
  // panels of whole pixels are side by side
  product_.paired = kernel_.matrix && ring.plane_channels % (2 * kPanel) == 0;
  if (product_.paired) product_.c_panel = 2 * kPanel;
  product_.n = channels;
}

void ConvRows::fill_segments(int64_t iy) {
  const ConvRing& ring = rows_.ring();
  const int64_t taps = args_.dilation_w != 1 ? args_.kernel_w : 1;
  const ptrdiff_t step = static_cast<ptrdiff_t>(args_.dilation_w) * ring.plane_channels;
  // planar weights are in OIHW's own order, channels outermost
  const int64_t outer = ring.planar ? ring.planes : args_.kernel_h;
  const int64_t inner = ring.planar ? args_.kernel_h : ring.planes;
  ptrdiff_t* segment = segment_;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t ky = ring.planar ? j : i;
      const int64_t plane = ring.planar ? i : j;
      const int64_t first = ring.slot_of(iy + ky * args_.dilation_h) + plane * ring.plane;
      for (int64_t kx = 0; kx < taps; ++kx) *segment++ = first + kx * step;
    }
  }
}

void ConvRows::row(int64_t oy, void* y) {
  product_.c = y;
  if (stem_) return stem_->row(oy, product_);
  const int64_t first = oy * args_.stride_h - args_.pad_top;
  rows_.advance_to(first);
  fill_segments(first);
  gemm(kernel_, product_, 0, args_.out_width, 0, div_up(product_.n, kPanel));
}

void conv(const GemmKernel& kernel, const ConvArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
  ConvRows rows(kernel, args, scratch);
  for (int64_t oy = row_begin; oy < row_end; ++oy) rows.row(oy, advance(args.y, kernel.output, oy * args.y_row));
}

namespace {

// Calls visit(offset in OIHW, offset in the packed weights, output channels, input channels) for each tap of each run
// and panel: there `output` and `input` weights lie k and taps apart, packed ones 1 and kPanel.
template <class Visit>
void for_each_tap(int64_t out_channels, const ConvShape& shape, const Visit& visit) {
  const Runs runs(shape);
  const int64_t taps = static_cast<int64_t>(shape.kernel_h) * shape.kernel_w;
  const int64_t k = shape.channels * taps;
  int64_t packed = 0;
  for (int64_t panel = 0; panel < div_up(out_channels, kPanel); ++panel) {
    const int64_t columns = std::min<int64_t>(kPanel, out_channels - panel * kPanel);
    for (int64_t s = 0; s < runs.segments; ++s, packed += runs.length * kPanel) {
      // which tap row, plane and first tap the run is of
      const int64_t row = s / runs.taps_apart;
      const int64_t ky = runs.planar ? row % shape.kernel_h : row / runs.planes;
      const int64_t plane = runs.planar ? row / shape.kernel_h : row % runs.planes;
      const int64_t real = std::min(runs.plane_channels, shape.channels - plane * runs.plane_channels);
      for (int64_t t = 0; t < runs.taps; ++t) {
        const int64_t tap = ky * shape.kernel_w + s % runs.taps_apart + t;
        visit(panel * kPanel * k + plane * runs.plane_channels * taps + tap, packed + t * runs.plane_channels * kPanel,
              columns, real);
      }
    }
  }
}

}  // namespace

void pack_conv(const float* weight, int64_t out_channels, const ConvShape& shape, float* packed) {
  const int64_t taps = static_cast<int64_t>(shape.kernel_h) * shape.kernel_w;
  std::fill_n(packed, round_up(out_channels, kPanel) * conv_depth(shape), 0.0f);
  for_each_tap(out_channels, shape, [&](int64_t from, int64_t to, int64_t outputs, int64_t inputs) {
    pack_panels(weight + from, outputs, inputs, shape.channels * taps, taps, packed + to);
  });
}

void unpack_conv(const float* packed, int64_t out_channels, const ConvShape& shape, float* weight) {
  const int64_t taps = static_cast<int64_t>(shape.kernel_h) * shape.kernel_w;
  for_each_tap(out_channels, shape, [&](int64_t to, int64_t from, int64_t outputs, int64_t inputs) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        weight[to + o * shape.channels * taps + i * taps] = packed[from + i * kPanel + o];
      }
    }
  });
}

}  // namespace mnv4
