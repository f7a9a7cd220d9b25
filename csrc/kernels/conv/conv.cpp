#include "kernels/conv/conv.h"

#include <algorithm>

namespace mnv4 {
namespace {

// How the ring of padded rows is laid out: [slot][plane][width][plane_channels].
struct Ring {
  bool planar;
  int64_t slots;  // input rows that one output row spans
  int64_t width;  // padded pixels of a row
  int64_t planes;
  int64_t plane_channels;
  int64_t plane;     // floats of a plane's row
  int64_t slot;      // floats of a row
  int64_t segments;  // runs of consecutive K
  int64_t length;

  explicit Ring(const ConvArgs& a) {
    planar = conv_is_planar(a.channels);
    slots = static_cast<int64_t>(a.kernel_h - 1) * a.dilation_h + 1;
    const int64_t reach = (a.out_width - 1) * a.stride_w + static_cast<int64_t>(a.kernel_w - 1) * a.dilation_w + 1;
    width = std::max(reach, a.pad_left + a.width);
    planes = planar ? a.channels : div_up(a.channels, kPanel);
    plane_channels = planar ? 1 : kPanel;
    plane = width * plane_channels;
    // one panel more than the row: rows whose pitch is a power of two would share L1 sets
    slot = round_up(planes * plane, kPanel) + kPanel;
    const int64_t taps_apart = a.dilation_w != 1 ? a.kernel_w : 1;
    segments = planes * a.kernel_h * taps_apart;
    length = plane_channels * a.kernel_w / taps_apart;
  }

  int64_t slot_of(int64_t row) const {
    const int64_t index = row % slots;
    return (index < 0 ? index + slots : index) * slot;
  }
};

template <class T>
void fill_row(const ConvArgs& a, const Ring& ring, int64_t iy, T* row) {
  if (iy < 0 || iy >= a.height) {
    std::fill_n(row, ring.planes * ring.plane, T{0});
    return;
  }
  const T* x = static_cast<const T*>(a.x) + iy * a.x_row;
  const int64_t left = a.pad_left * ring.plane_channels;
  const int64_t right = (ring.width - a.pad_left - a.width) * ring.plane_channels;
  for (int64_t p = 0; p < ring.planes; ++p) {
    T* start = row + p * ring.plane;
    std::fill_n(start, left, T{0});
    std::fill_n(start + ring.plane - right, right, T{0});
    T* out = start + left;
    if (ring.planar) {
      const T* in = x + p * a.x_channel;
      if (a.x_pixel == 1) {
        std::copy_n(in, a.width, out);
      } else {
        for (int64_t i = 0; i < a.width; ++i) out[i] = in[i * a.x_pixel];
      }
      continue;
    }
    const T* in = x + p * a.x_block;
    const int64_t channels = std::min<int64_t>(kPanel, a.channels - p * kPanel);
    if (a.x_pixel == kPanel) {
      // planes are padded to whole blocks already
      std::copy_n(in, a.width * kPanel, out);
    } else {
      for (int64_t i = 0; i < a.width; ++i) {
        std::copy_n(in + i * a.x_pixel, channels, out + i * kPanel);
        std::fill_n(out + i * kPanel + channels, kPanel - channels, T{0});
      }
    }
  }
}

void fill_segments(const ConvArgs& a, const Ring& ring, int64_t iy, ptrdiff_t* segment) {
  const int taps = a.dilation_w != 1 ? a.kernel_w : 1;
  const ptrdiff_t step = static_cast<ptrdiff_t>(a.dilation_w) * ring.plane_channels;
  const auto start = [&](int ky, int64_t p) {
    return ring.slot_of(iy + static_cast<int64_t>(ky) * a.dilation_h) + p * ring.plane;
  };
  // planar weights are in OIHW's own order, channels outermost
  const int64_t outer = ring.planar ? ring.planes : a.kernel_h;
  const int64_t inner = ring.planar ? a.kernel_h : ring.planes;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t first = ring.planar ? start(static_cast<int>(j), i) : start(static_cast<int>(i), j);
      for (int kx = 0; kx < taps; ++kx) *segment++ = first + kx * step;
    }
  }
}

// ptrdiff_t entries kept at the end of the scratch, in floats
int64_t segment_floats(const Ring& ring) {
  return ring.segments * static_cast<int64_t>(sizeof(ptrdiff_t) / sizeof(float));
}

}  // namespace

int64_t conv_scratch(const ConvArgs& a) {
  const Ring ring(a);
  return round_up(ring.slots * ring.slot, kPanel) + segment_floats(ring);
}

void conv(const GemmKernel& kernel, const ConvArgs& a, int64_t row_begin, int64_t row_end, float* scratch) {
  const Ring ring(a);
  auto* segment = reinterpret_cast<ptrdiff_t*>(scratch + round_up(ring.slots * ring.slot, kPanel));

  GemmArgs product{};
  product.a = scratch;
  product.a_row = static_cast<ptrdiff_t>(a.stride_w) * ring.plane_channels;
  product.segment = segment;
  product.segments = ring.segments;
  product.segment_length = ring.length;
  product.b = a.weight;
  product.b_panel = conv_depth(a.channels, a.kernel_h * a.kernel_w) * kPanel;
  product.bias = a.bias;
  product.c_row = a.y_pixel;
  product.c_panel = a.y_panel;
  product.n = a.out_channels;
  product.act = a.act;
  product.stream = a.stream;

  const int64_t panels = div_up(a.out_channels, kPanel);
  int64_t filled = row_begin * a.stride_h - a.pad_top;
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    const int64_t first = oy * a.stride_h - a.pad_top;
    filled = std::max(filled, first);
    for (; filled < first + ring.slots; ++filled) {
      if (kernel.input == Storage::kFloat32) {
        fill_row(a, ring, filled, scratch + ring.slot_of(filled));
      } else {
        fill_row(a, ring, filled, reinterpret_cast<uint16_t*>(scratch) + ring.slot_of(filled));
      }
    }
    fill_segments(a, ring, first, segment);
    product.c = advance(a.y, kernel.output, oy * a.y_row);
    gemm(kernel, product, 0, a.out_width, 0, panels);
  }
}

void pack_conv(const float* weight, int64_t out_channels, int64_t channels, int kernel_h, int kernel_w, float* packed) {
  const int64_t taps = static_cast<int64_t>(kernel_h) * kernel_w;
  const int64_t k = channels * taps;
  if (conv_is_planar(channels)) return pack_panels(weight, out_channels, k, k, 1, packed);
  const int64_t panels = div_up(out_channels, kPanel);
  std::fill_n(packed, panels * conv_depth(channels, taps) * kPanel, 0.0f);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t columns = std::min<int64_t>(kPanel, out_channels - panel * kPanel);
    for (int64_t ky = 0; ky < kernel_h; ++ky) {
      for (int64_t block = 0; block < div_up(channels, kPanel); ++block) {
        const int64_t depth = std::min<int64_t>(kPanel, channels - block * kPanel);
        for (int64_t kx = 0; kx < kernel_w; ++kx) {
          const float* from = weight + panel * kPanel * k + block * kPanel * taps + ky * kernel_w + kx;
          pack_panels(from, columns, depth, k, taps, packed);
          packed += kPanel * kPanel;
        }
      }
    }
  }
}

}  // namespace mnv4
