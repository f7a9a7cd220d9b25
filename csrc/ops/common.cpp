#include "ops/common.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <sstream>

#include "kernels/conv/conv.h"
#include "ops/fresh.h"

namespace mnv4::ops {
namespace {

using torch::headeronly::ScalarType;

// Pixels that one task of a layout conversion moves: a tile of 16 by 16 floats fits L1 many times over.
constexpr int64_t kTile = 16;
constexpr int64_t kTilesPerTask = 64;

// y[p][c] = x[c][p] for one image, pixels [begin, end)
void to_nhwc(const float* x, int64_t channels, int64_t pixels, float* y, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; p0 += kTile) {
    const int64_t p1 = std::min(end, p0 + kTile);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = p0; p < p1; ++p) y[p * channels + c] = x[c * pixels + p];
    }
  }
}

// y[c][p] = x[p][c] for one image, pixels [begin, end)
void to_nchw(const float* x, int64_t channels, int64_t pixels, float* y, int64_t begin, int64_t end) {
  for (int64_t p0 = begin; p0 < end; p0 += kTile) {
    const int64_t p1 = std::min(end, p0 + kTile);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = p0; p < p1; ++p) y[c * pixels + p] = x[p * channels + c];
    }
  }
}

// f(image, first pixel, last pixel) over all pixels of a batch, in parallel
template <class F>
void each_pixels(int64_t batch, int64_t pixels, const F& f) {
  const int64_t step = kTile * kTilesPerTask;
  const int64_t chunks = div_up(pixels, step);
  parallel(batch * chunks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % chunks * step;
      f(t / chunks, first, std::min(pixels, first + step));
    }
  });
}

void widen_all(const Tensor& x, Storage type, float* y, int64_t n) {
  constexpr int64_t kStep = 16384;
  const auto* bytes = static_cast<const char*>(x.const_data_ptr());
  parallel(div_up(n, kStep), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kStep;
    const int64_t last = std::min(n, end * kStep);
    pointwise_kernels().widen(bytes + first * storage_bytes(type), type, y + first, last - first);
  });
}

// A large block is given back to the system when it is freed, and comes anew in pages of 4 KiB that fault one by one.
// Advice, which a kernel without huge pages ignores.
void advise_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(t.numel()) * t.element_size()) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

std::atomic<bool> fresh_memory_is_filled{false};

// Strides of a tensor whose channels are adjacent, sizes of one taken as dense.
Image view(const Tensor& x) {
  Image v{};
  v.batch = x.size(0);
  v.channels = x.size(1);
  v.height = x.size(2);
  v.width = x.size(3);
  v.pixel = v.width == 1 ? v.channels : x.stride(3);
  v.row = v.height == 1 ? v.pixel * v.width : x.stride(2);
  v.n_stride = v.batch == 1 ? v.row * v.height : x.stride(0);
  return v;
}

}  // namespace

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

Storage storage_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), "`", name, "` must be on the CPU like the other arguments");
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::BFloat16:
      return Storage::kBfloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      STD_TORCH_CHECK(false, "`", name, "` must be float32, bfloat16 or float16, got scalar type ",
                      static_cast<int>(t.scalar_type()));
  }
}

Activation activation_of(const std::string& name) {
  Activation act;
  if (parse_activation(name.c_str(), &act)) return act;
  std::string known;
  for (const char* candidate : kActivationNames) known += (known.empty() ? "" : ", ") + std::string(candidate);
  STD_TORCH_CHECK(false, "`act` must be one of ", known, ", got '", name, "'");
}

// Straight from the allocator: torch::stable::empty looks its op up by name and goes through the dispatcher.
Tensor fresh(const IntList& size, ScalarType type, bool channels_last) {
  constexpr size_t kInnermostFirst[] = {1, 3, 2, 0};
  int64_t strides[4];
  const size_t dims = size.size();
  STD_TORCH_CHECK(dims <= 4 && (dims == 4 || !channels_last), "a tensor of ", dims, " dimensions is none of the ops'");
  int64_t stride = 1;
  for (size_t i = 0; i < dims; ++i) {
    const size_t axis = channels_last ? kInnermostFirst[i] : dims - 1 - i;
    strides[axis] = stride;
    // as torch.empty has it for sizes of zero
    stride *= channels_last ? size[axis] : std::max<int64_t>(size[axis], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), size.data(), strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  advise_huge_pages(t);
  // every byte 0xff: NaN in each floating-point type
  if (fresh_memory_is_filled)
    std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(t.numel()) * t.element_size());
  return t;
}

// as torch::stable::view and narrow, without their way through the dispatcher
Tensor viewed(const Tensor& t, const IntList& size, int64_t offset) {
  IntList strides(size.size());
  int64_t stride = 1;
  for (size_t i = size.size(); i-- > 0; stride *= std::max<int64_t>(size[i], 1)) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(size.size()), size.data(),
                                                               strides.data(), offset, &handle));
  return Tensor(handle);
}

Tensor scratch(int64_t n) { return fresh({n}, ScalarType::Float); }

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && x.stride(1) == 1; }

Image image(const Tensor& x, const char* name) {
  const Storage type = storage_of(x, name);
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  Image v = view(x);
  const bool adjacent = x.stride(1) == 1 || v.channels == 1;
  if (type == Storage::kFloat32 && adjacent) {
    v.data = static_cast<const float*>(x.const_data_ptr());
    return v;
  }
  const int64_t pixels = v.pixels();
  const int64_t n = v.batch * v.channels * pixels;
  const bool dense = adjacent && v.pixel == v.channels && v.row == v.pixel * v.width && v.n_stride == v.row * v.height;
  Tensor source = dense || x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (type != Storage::kFloat32) {
    Tensor wide = scratch(n);
    widen_all(source, type, floats(wide), n);
    source = wide;
  }
  if (!dense && pixels > 1) {
    Tensor nhwc = scratch(n);
    const auto* from = static_cast<const float*>(source.const_data_ptr());
    float* to = floats(nhwc);
    each_pixels(v.batch, pixels, [&](int64_t image, int64_t begin, int64_t end) {
      const int64_t offset = image * v.channels * pixels;
      to_nhwc(from + offset, v.channels, pixels, to + offset, begin, end);
    });
    source = nhwc;
  }
  v.data = static_cast<const float*>(source.const_data_ptr());
  v.storage = source;
  v.pixel = v.channels;
  v.row = v.pixel * v.width;
  v.n_stride = v.row * v.height;
  return v;
}

Image dense_image(const Tensor& x, const char* name) {
  Image v = image(x, name);
  if (v.row == v.pixel * v.width && v.n_stride == v.row * v.height) return v;
  Tensor dense = scratch(v.batch * v.pixels() * v.channels);
  float* to = floats(dense);
  parallel(v.batch * v.height, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* from = v.data + t / v.height * v.n_stride + t % v.height * v.row;
      for (int64_t i = 0; i < v.width; ++i) {
        std::memcpy(to + (t * v.width + i) * v.channels, from + i * v.pixel,
                    static_cast<size_t>(v.channels) * sizeof(float));
      }
    }
  });
  v.data = to;
  v.storage = dense;
  v.pixel = v.channels;
  v.row = v.pixel * v.width;
  v.n_stride = v.row * v.height;
  return v;
}

Result::Result(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last)
    : out_(fresh({batch, channels, height, width}, like.scalar_type(), channels_last)),
      type_(storage_of(like, "x")),
      channels_last_(channels_last || height * width == 1 || channels == 1),
      batch_(batch),
      channels_(channels),
      pixels_(height * width) {
  if (type_ == Storage::kFloat32 && channels_last_) {
    data_ = floats(out_);
  } else {
    staged_ = scratch(batch * channels * pixels_);
    data_ = floats(*staged_);
  }
}

Tensor Result::finish() {
  if (!staged_) return out_;
  const int64_t n = batch_ * channels_ * pixels_;
  const float* from = data_;
  OptionalTensor planar;
  if (!channels_last_) {
    if (type_ != Storage::kFloat32) planar = scratch(n);
    float* to = planar ? floats(*planar) : floats(out_);
    each_pixels(batch_, pixels_, [&](int64_t image, int64_t begin, int64_t end) {
      const int64_t offset = image * channels_ * pixels_;
      to_nchw(from + offset, channels_, pixels_, to + offset, begin, end);
    });
    from = to;
  }
  if (type_ != Storage::kFloat32) {
    constexpr int64_t kStep = 16384;
    auto* to = static_cast<char*>(out_.mutable_data_ptr());
    parallel(div_up(n, kStep), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kStep;
      const int64_t last = std::min(n, end * kStep);
      pointwise_kernels().narrow(from + first, type_, to + first * storage_bytes(type_), last - first);
    });
  }
  return out_;
}

Vector::Vector(const OptionalTensor& values, int64_t n, const char* name) {
  const int64_t padded = round_up(n, kPanel);
  if (values) {
    const Storage type = storage_of(*values, name);
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == n, "`", name, "` must have shape [", n, "], got ",
                    shape_text(*values));
    if (type == Storage::kFloat32 && n == padded && values->is_contiguous()) {
      source_ = values;
      data_ = static_cast<const float*>(values->const_data_ptr());
      return;
    }
    copy_.assign(static_cast<size_t>(padded), 0.0f);
    source_ = values->is_contiguous() ? *values : torch::stable::contiguous(*values);
    pointwise_kernels().widen(source_->const_data_ptr(), type, copy_.data(), n);
  } else {
    copy_.assign(static_cast<size_t>(padded), 0.0f);
  }
  data_ = copy_.data();
}

std::vector<float> scaled_weight(const Tensor& weight, const OptionalTensor& scale, const char* name) {
  const Storage type = storage_of(weight, name);
  const Tensor source = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  std::vector<float> values(static_cast<size_t>(weight.numel()));
  pointwise_kernels().widen(source.const_data_ptr(), type, values.data(), weight.numel());
  if (scale && weight.numel() > 0) {
    const Vector factor(scale, weight.size(0), "scale");
    const int64_t fan = weight.numel() / weight.size(0);
    for (int64_t i = 0; i < weight.numel(); ++i) values[static_cast<size_t>(i)] *= factor.data()[i / fan];
  }
  return values;
}

int64_t packed_size(const Tensor& weight, Packing packing) {
  if (weight.numel() == 0) return 0;
  const int64_t taps = weight.dim() == 4 ? weight.size(2) * weight.size(3) : 1;
  const int64_t depth = packing == Packing::kDepthwise ? taps : weight.size(1) * taps;
  return round_up(weight.size(0), kPanel) * depth;
}

void pack_into(const float* values, const Tensor& weight, Packing packing, float* packed) {
  const int kernel_h = weight.dim() == 4 ? static_cast<int>(weight.size(2)) : 1;
  const int kernel_w = weight.dim() == 4 ? static_cast<int>(weight.size(3)) : 1;
  if (packing == Packing::kDepthwise) {
    const int64_t taps = static_cast<int64_t>(kernel_h) * kernel_w;
    pack_panels(values, weight.size(0), taps, taps, 1, packed);
  } else {
    // only pairs need more for dilated taps, and the ops multiply float32
    const ConvShape shape{weight.size(1), kernel_h, kernel_w, false, false};
    pack_conv(values, weight.size(0), shape, packed);
  }
}

Packed::Packed(const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& packed, Packing packing) {
  if (packed) {
    const bool fits = storage_of(*packed, "packed") == Storage::kFloat32 && packed->is_contiguous() &&
                      packed->numel() == packed_size(weight, packing);
    STD_TORCH_CHECK(fits, "`packed` must be what mnv4_kernels::prepack gives for a weight of shape ",
                    shape_text(weight), ": ", packed_size(weight, packing), " contiguous float32 values, got ",
                    shape_text(*packed));
    given_ = packed;
    data_ = static_cast<const float*>(packed->const_data_ptr());
    return;
  }
  own_.resize(static_cast<size_t>(packed_size(weight, packing)));
  const std::vector<float> values = scaled_weight(weight, scale, "weight");
  pack_into(values.data(), weight, packing, own_.data());
  data_ = own_.data();
}

Geometry geometry(const Tensor& x, const Tensor& weight, const IntList& stride, const IntList& padding,
                  const IntList& dilation) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  MNV4_CHECK_SHAPE(weight.dim() == 4, weight, "weight", "have four dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "`stride` must be two positive integers");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0,
                  "`dilation` must be two positive integers");
  STD_TORCH_CHECK(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0,
                  "`padding` must be four non-negative integers (top, bottom, left, right)");
  Geometry g{};
  g.kernel_h = static_cast<int>(weight.size(2));
  g.kernel_w = static_cast<int>(weight.size(3));
  g.stride_h = static_cast<int>(stride[0]);
  g.stride_w = static_cast<int>(stride[1]);
  g.pad_top = static_cast<int>(padding[0]);
  g.pad_left = static_cast<int>(padding[2]);
  g.dilation_h = static_cast<int>(dilation[0]);
  g.dilation_w = static_cast<int>(dilation[1]);
  const int64_t reach_h = x.size(2) + padding[0] + padding[1] - dilation[0] * (weight.size(2) - 1) - 1;
  const int64_t reach_w = x.size(3) + padding[2] + padding[3] - dilation[1] * (weight.size(3) - 1) - 1;
  STD_TORCH_CHECK(reach_h >= 0 && reach_w >= 0, "`weight` must fit the padded `x`: a kernel of ", weight.size(2), " x ",
                  weight.size(3), " does not fit ", shape_text(x));
  g.out_height = reach_h / stride[0] + 1;
  g.out_width = reach_w / stride[1] + 1;
  return g;
}

}  // namespace mnv4::ops

namespace mnv4 {

void fill_fresh_memory(bool on) { ops::fresh_memory_is_filled = on; }

}  // namespace mnv4
