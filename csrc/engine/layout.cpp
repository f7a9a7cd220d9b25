#include "engine/layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mnv4::engine {
namespace {

int64_t axis(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation) {
  const int64_t reach = size + before + after - dilation * (kernel - 1) - 1;
  if (reach < 0) {
    throw std::invalid_argument("`x` must be large enough for the network: a kernel of " + std::to_string(kernel) +
                                " does not fit a map of " + std::to_string(size) + " pixels");
  }
  return reach / stride + 1;
}

// TF 'same': the output covers ceil(size / stride) steps, the odd pixel of padding goes behind
int64_t same_pads(int64_t size, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t reach = (div_up(size, stride) - 1) * stride + (kernel - 1) * dilation + 1;
  return std::max<int64_t>(0, reach - size);
}

// The map behind a window of n's kernel, and the pads before it.
Shape windowed(const Node& n, Shape s, Pads* pads) {
  int64_t top = n.pad_top, bottom = n.pad_bottom, left = n.pad_left, right = n.pad_right;
  if (static_cast<PadMode>(n.pad_mode) == PadMode::kSame) {
    const int64_t high = same_pads(s.height, n.kernel_h, n.stride_h, n.dilation_h);
    const int64_t wide = same_pads(s.width, n.kernel_w, n.stride_w, n.dilation_w);
    top = high / 2;
    bottom = high - top;
    left = wide / 2;
    right = wide - left;
  }
  *pads = {static_cast<int>(top), static_cast<int>(left)};
  s.height = axis(s.height, n.kernel_h, n.stride_h, top, bottom, n.dilation_h);
  s.width = axis(s.width, n.kernel_w, n.stride_w, left, right, n.dilation_w);
  return s;
}

}  // namespace

Layout::Layout(const Program& program, const Shape& input, int64_t tag, Storage compute)
    : program_(program),
      compute_(compute),
      shapes_(program.nodes.size()),
      pads_(program.nodes.size()),
      needed_(program.nodes.size(), false) {
  find_needed(tag);
  infer_shapes(input);
}

void Layout::find_needed(int64_t tag) {
  for (size_t i = needed_.size(); i-- > 0;) {
    const Node& n = program_.nodes[i];
    if (n.what() == Kind::kOutput) needed_[i] = n.channels == tag;
    if (!needed_[i]) continue;
    for (int64_t source : {n.input, n.residual}) {
      if (source >= 0) needed_[static_cast<size_t>(source)] = true;
    }
  }
}

void Layout::infer_shapes(const Shape& input) {
  for (size_t i = 0; i < shapes_.size(); ++i) {
    const Node& n = program_.nodes[i];
    Shape s = i == 0 ? input : shape(n.input);
    switch (n.what()) {
      case Kind::kInput:
      case Kind::kOutput:
        break;
      case Kind::kConv:
      case Kind::kDepthwise:
        s = windowed(n, s, &pads_[i]);
        s.channels = n.channels;
        break;
      case Kind::kPointwise:
      case Kind::kLinear:
      case Kind::kAttention:
        s.channels = n.channels;
        break;
      case Kind::kPool:
        s.height = 1;
        s.width = 1;
        s.vector = true;
        break;
    }
    shapes_[i] = s;
  }
}

int64_t Layout::reads_of(int64_t id) const {
  int64_t reads = 0;
  for (size_t i = 1; i < needed_.size(); ++i) {
    const Node& n = program_.nodes[i];
    if (needed_[i]) reads += (n.input == id) + (n.residual == id);
  }
  return reads;
}

bool Layout::is_result(int64_t id) const {
  if (node(id).what() != Kind::kLinear) return false;
  for (size_t i = static_cast<size_t>(id) + 1; i < needed_.size(); ++i) {
    if (program_.nodes[i].input == id && program_.nodes[i].what() != Kind::kOutput) return false;
  }
  return true;
}

bool Layout::feeds_rider(int64_t id) const {
  const int64_t next = id + 1;
  if (node(id).what() != Kind::kPointwise || next >= count() || !needed(next)) return false;
  const Node& rider = node(next);
  const bool stays = node(id).residual < 0 || compute_ == Storage::kFloat32;
  const bool rides = rider.what() == Kind::kDepthwise || (rider.what() == Kind::kPool && stays);
  return rides && rider.input == id && reads_of(id) == 1;
}

bool Layout::outgrows_cache(int64_t id) const {
  const Shape& in = shape(node(id).input);
  const int64_t pixels = in.height * in.width;
  return compute_ == Storage::kFloat32 && gemm_split(gemm_kernel(), pixels, round_up(in.channels, kPanel)) &&
         PackedRows::bytes(compute_, pixels, in.channels) > PackedRows::most_bytes();
}

bool Layout::feeds_conv(int64_t id) const {
  const int64_t next = id + 1;
  if (node(id).what() != Kind::kConv || next >= count() || !needed(next)) return false;
  // a planar reader keeps its rows channel by channel, as no product writes them
  if (conv_is_planar(shape(id).channels)) return false;
  return node(next).what() == Kind::kConv && node(next).input == id && node(next).residual != id && reads_of(id) == 1;
}

bool Layout::feeds_projection(int64_t id) const {
  const int64_t next = id + 1;
  if (node(id).what() != Kind::kConv || next >= count() || !needed(next)) return false;
  return node(next).what() == Kind::kPointwise && node(next).input == id && reads_of(id) == 1;
}

Planes Layout::planes(int64_t id, int64_t images, int64_t stored) const {
  const Shape& s = shape(id);
  // a matrix unit leaves its sums in memory anyway: a depthwise on them need not widen what was rounded before
  const bool rides =
      feeds_rider(id) && (node(id + 1).what() == Kind::kPool || (gemm_has_matrix_unit() && node(id).residual < 0));
  Planes p{0, is_result(id) || rides ? Storage::kFloat32 : compute_, images, s.channels, s.height, s.width};
  if (p.type == Storage::kBfloat16 && gemm_has_matrix_unit() && !s.vector) p.paired_images = stored;
  return p;
}

bool Layout::input_needs_planes() const {
  for (size_t i = 1; i < needed_.size(); ++i) {
    const Node& n = program_.nodes[i];
    const bool reads = n.residual == 0 || (n.input == 0 && n.what() != Kind::kConv);
    if (needed_[i] && reads) return true;
  }
  return false;
}

Shape Layout::downsampled(int64_t id, Pads* pads) const { return windowed(node(id), shape(node(id).input), pads); }

}  // namespace mnv4::engine
