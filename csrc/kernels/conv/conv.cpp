#include "kernels/conv/conv.h"

#include <algorithm>
#include <cstring>

namespace mnv4 {
namespace {

// How the ring of padded rows is laid out.
struct Ring {
  bool planar;
  int64_t slots;     // input rows that one output row spans
  int64_t width;     // padded pixels of a row
  int64_t slot;      // floats of a row
  int64_t segments;  // runs of consecutive K
  int64_t length;

  explicit Ring(const ConvArgs& a) {
    planar = conv_is_planar(a.channels);
    slots = static_cast<int64_t>(a.kernel_h - 1) * a.dilation_h + 1;
    const int64_t reach = (a.out_width - 1) * a.stride_w + static_cast<int64_t>(a.kernel_w - 1) * a.dilation_w + 1;
    width = std::max(reach, a.pad_left + a.width);
    // one panel more than the row: rows whose pitch is a power of two would share L1 sets
    slot = round_up(width * a.channels, kPanel) + kPanel;
    const bool dilated = a.dilation_w != 1;
    const int64_t taps_apart = dilated ? a.kernel_w : 1;
    if (planar) {
      segments = a.channels * a.kernel_h * taps_apart;
      length = dilated ? 1 : a.kernel_w;
    } else {
      segments = a.kernel_h * taps_apart;
      length = dilated ? a.channels : a.kernel_w * a.channels;
    }
  }
};

void fill_row(const ConvArgs& a, const Ring& ring, int64_t iy, float* row) {
  std::memset(row, 0, static_cast<size_t>(ring.slot) * sizeof *row);
  if (iy < 0 || iy >= a.height) return;
  const float* x = a.x + iy * a.x_row;
  if (ring.planar) {
    for (int64_t c = 0; c < a.channels; ++c) {
      float* out = row + c * ring.width + a.pad_left;
      const float* in = x + c * a.x_channel;
      if (a.x_pixel == 1) {
        std::memcpy(out, in, static_cast<size_t>(a.width) * sizeof *out);
      } else {
        for (int64_t i = 0; i < a.width; ++i) out[i] = in[i * a.x_pixel];
      }
    }
    return;
  }
  float* out = row + a.pad_left * a.channels;
  if (a.x_pixel == a.channels) {
    std::memcpy(out, x, static_cast<size_t>(a.width * a.channels) * sizeof *out);
  } else {
    for (int64_t i = 0; i < a.width; ++i) {
      std::memcpy(out + i * a.channels, x + i * a.x_pixel, static_cast<size_t>(a.channels) * sizeof *out);
    }
  }
}

void fill_segments(const ConvArgs& a, const Ring& ring, int64_t iy, ptrdiff_t* segment) {
  const int taps = a.dilation_w != 1 ? a.kernel_w : 1;
  const auto slot_of = [&](int64_t row) {
    const int64_t index = row % ring.slots;
    return (index < 0 ? index + ring.slots : index) * ring.slot;
  };
  const ptrdiff_t step = static_cast<ptrdiff_t>(a.dilation_w) * (ring.planar ? 1 : a.channels);
  const int64_t planes = ring.planar ? a.channels : 1;
  for (int64_t c = 0; c < planes; ++c) {
    for (int ky = 0; ky < a.kernel_h; ++ky) {
      const int64_t start = slot_of(iy + static_cast<int64_t>(ky) * a.dilation_h) + c * ring.width;
      for (int kx = 0; kx < taps; ++kx) *segment++ = start + kx * step;
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
  product.a_row = static_cast<ptrdiff_t>(a.stride_w) * (ring.planar ? 1 : a.channels);
  product.segment = segment;
  product.segments = ring.segments;
  product.segment_length = ring.length;
  product.b = a.weight;
  product.bias = a.bias;
  product.c_row = a.y_pixel;
  product.c_panel = kPanel;
  product.n = a.out_channels;
  product.act = a.act;

  const int64_t panels = div_up(a.out_channels, kPanel);
  int64_t filled = row_begin * a.stride_h - a.pad_top;
  for (int64_t oy = row_begin; oy < row_end; ++oy) {
    const int64_t first = oy * a.stride_h - a.pad_top;
    filled = std::max(filled, first);
    for (; filled < first + ring.slots; ++filled) {
      const int64_t index = filled % ring.slots;
      fill_row(a, ring, filled, scratch + (index < 0 ? index + ring.slots : index) * ring.slot);
    }
    fill_segments(a, ring, first, segment);
    product.c = a.y + oy * a.y_row;
    gemm(kernel, product, 0, a.out_width, 0, panels);
  }
}

void pack_conv(const float* weight, int64_t out_channels, int64_t channels, int64_t taps, float* packed) {
  const int64_t k = channels * taps;
  if (conv_is_planar(channels)) return pack_panels(weight, out_channels, k, k, 1, packed);
  for (int64_t first = 0; first < out_channels; first += kPanel) {
    const int64_t columns = std::min<int64_t>(kPanel, out_channels - first);
    for (int64_t tap = 0; tap < taps; ++tap) {
      pack_panels(weight + first * k + tap, columns, channels, k, taps, packed);
      packed += channels * kPanel;
    }
  }
}

}  // namespace mnv4
