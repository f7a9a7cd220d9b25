// mnv4_kernels::kv_downsample and mnv4_kernels::mqa on the CPU.
#include <algorithm>
#include <tuple>

#include "kernels/attention/attention.h"
#include "kernels/conv/conv.h"
#include "kernels/dwconv/dwconv.h"
#include "ops/common.h"

namespace mnv4::ops {
namespace {

// The packed weights of both paths, one after the other: [down] project, [down] project.
struct PathWeights {
  OptionalTensor down;
  OptionalTensor project;
};

OptionalTensor take(const OptionalTensor& packed, int64_t* offset, const Tensor& weight, Packing packing) {
  if (!packed) return std::nullopt;
  const int64_t size = packed_size(weight, packing);
  STD_TORCH_CHECK(packed->is_contiguous() && *offset + size <= packed->numel(),
                  "`packed` must hold the packed weights of key and value, contiguous, got ", shape_text(*packed));
  Tensor part = viewed(*packed, {size}, *offset);
  *offset += size;
  return part;
}

struct Path {
  OptionalTensor down;
  OptionalTensor scale;
  OptionalTensor shift;
  Tensor project;
  const char* name;
};

// One of key and value: a depthwise pass into `pooled`, then a product.
class KvPath {
 public:
  KvPath(const Path& path, const OptionalTensor& packed, int64_t* offset, int64_t channels)
      : outputs_(path.project.size(0)) {
    MNV4_CHECK_SHAPE(path.project.dim() == 4 && path.project.size(1) == channels, path.project, "project",
                     "have shape [D, C, 1, 1] with C = ", channels, " for ", path.name);
    if (path.down) {
      MNV4_CHECK_SHAPE(path.down->dim() == 4 && path.down->size(0) == channels && path.down->size(1) == 1, *path.down,
                       "down", "have shape [C, 1, kh, kw] with C = ", channels, " for ", path.name);
      down_.emplace(*path.down, path.scale, take(packed, offset, *path.down, Packing::kDepthwise), Packing::kDepthwise);
    }
    project_.emplace(path.project, std::nullopt, take(packed, offset, path.project, Packing::kDense), Packing::kDense);
    shift_.emplace(path.shift, channels, "shift");
    scale_.emplace(path.scale, channels, "scale");
    zeros_.assign(static_cast<size_t>(round_up(outputs_, kPanel)), 0.0f);
  }
  int64_t outputs() const { return outputs_; }
  const float* down() const { return down_->data(); }
  const float* project() const { return project_->data(); }
  const float* shift() const { return shift_->data(); }
  const float* scale() const { return scale_->data(); }
  const float* zeros() const { return zeros_.data(); }

 private:
  int64_t outputs_;
  std::optional<Packed> down_, project_;
  std::optional<Vector> shift_, scale_;
  std::vector<float> zeros_;
};

Tensor narrow_result(const Tensor& x, const Tensor& wide, IntList size) {
  const Storage type = storage_of(x, "x");
  Tensor out = fresh(size, x.scalar_type());
  pointwise_kernels().narrow(floats(wide), type, out.mutable_data_ptr(), wide.numel());
  return out;
}

std::tuple<Tensor, Tensor> kv_downsample(Tensor x, OptionalTensor key_down, OptionalTensor key_scale,
                                         OptionalTensor key_shift, Tensor key_project, OptionalTensor value_down,
                                         OptionalTensor value_scale, OptionalTensor value_shift, Tensor value_project,
                                         IntList stride, IntList padding, IntList dilation, OptionalTensor packed) {
  MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
  STD_TORCH_CHECK(key_down.has_value() == value_down.has_value(),
                  "`key_down` and `value_down` must be given both or neither");
  const int64_t channels = x.size(1);
  int64_t offset = 0;
  const KvPath key({key_down, key_scale, key_shift, key_project, "key"}, packed, &offset, channels);
  const KvPath value({value_down, value_scale, value_shift, value_project, "value"}, packed, &offset, channels);
  const KvPath* paths[] = {&key, &value};
  const Image in = dense_image(x, "x");
  int64_t positions = in.pixels();
  Geometry g{};
  if (key_down) {
    g = geometry(x, *key_down, stride, padding, dilation);
    positions = g.out_height * g.out_width;
  }

  // both paths' depthwise results, [path][N][P][C]
  const int64_t image_floats = positions * channels;
  const int64_t path_floats = in.batch * image_floats;
  const Tensor pooled = scratch(2 * path_floats);
  const int64_t blocks = div_up(channels, kPanel);
  const DwconvKernel& dwconv = dwconv_kernel();
  parallel(in.batch * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / blocks;
      const int64_t first = t % blocks * kPanel;
      const int64_t last = std::min(channels, first + kPanel);
      for (int path = 0; path < 2; ++path) {
        float* y = floats(pooled) + path * path_floats + n * image_floats;
        const float* source = in.data + n * in.n_stride;
        if (!key_down) {
          for (int64_t p = 0; p < positions; ++p) {
            for (int64_t c = first; c < last; ++c) {
              const float value = source[p * in.pixel + c];
              const float scale = (path ? value_scale : key_scale) ? paths[path]->scale()[c] : 1.0f;
              y[p * channels + c] = value * scale + paths[path]->shift()[c];
            }
          }
          continue;
        }
        DwconvArgs args{};
        args.x = source;
        args.x_row = in.row;
        args.x_pixel = in.pixel;
        args.height = in.height;
        args.width = in.width;
        args.y = y;
        args.y_pixel = channels;
        args.y_row = channels * g.out_width;
        args.out_height = g.out_height;
        args.out_width = g.out_width;
        args.weight = paths[path]->down();
        args.bias = paths[path]->shift();
        args.channels = channels;
        args.kernel_h = g.kernel_h;
        args.kernel_w = g.kernel_w;
        args.stride_h = g.stride_h;
        args.stride_w = g.stride_w;
        args.pad_top = g.pad_top;
        args.pad_left = g.pad_left;
        args.dilation_h = g.dilation_h;
        args.dilation_w = g.dilation_w;
        args.act = Activation::kNone;
        dwconv.run(args, 0, g.out_height, first, last);
      }
    }
  });

  const GemmKernel& kernel = gemm_kernel();
  const int64_t rows = in.batch * positions;
  const int64_t chunks = std::max<int64_t>(
      1, std::min<int64_t>(div_up(torch::stable::get_num_threads(), 2), div_up(rows, kernel.max_rows)));
  const Tensor results[] = {scratch(rows * key.outputs()), scratch(rows * value.outputs())};
  const ptrdiff_t whole_row = 0;
  parallel(rows ? 2 * chunks : 0, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t path = t / chunks;
      const int64_t chunk = t % chunks;
      GemmArgs args{};
      args.a = floats(pooled) + path * path_floats;
      args.a_row = channels;
      args.segment = &whole_row;
      args.segments = 1;
      args.segment_length = channels;
      args.b = paths[path]->project();
      args.b_panel = channels * kPanel;
      args.bias = paths[path]->zeros();
      args.c = floats(results[path]);
      args.c_row = paths[path]->outputs();
      args.c_panel = kPanel;
      args.n = paths[path]->outputs();
      args.act = Activation::kNone;
      gemm(kernel, args, rows * chunk / chunks, rows * (chunk + 1) / chunks, 0, div_up(args.n, kPanel));
    }
  });
  if (storage_of(x, "x") == Storage::kFloat32) {
    return {viewed(results[0], {in.batch, positions, key.outputs()}),
            viewed(results[1], {in.batch, positions, value.outputs()})};
  }
  return {narrow_result(x, results[0], {in.batch, positions, key.outputs()}),
          narrow_result(x, results[1], {in.batch, positions, value.outputs()})};
}

// float32 values of a contiguous [N, P, D] tensor
const float* widened(const Tensor& t, const char* name, OptionalTensor* storage) {
  const Storage type = storage_of(t, name);
  if (type == Storage::kFloat32 && t.is_contiguous()) return static_cast<const float*>(t.const_data_ptr());
  *storage = scratch(t.numel());
  Tensor dense = t;
  if (!t.is_contiguous()) {
    dense = torch::stable::contiguous(t);
  }
  pointwise_kernels().widen(dense.const_data_ptr(), type, floats(**storage), t.numel());
  return floats(**storage);
}

Tensor mqa(Tensor query, Tensor key, Tensor value, int64_t heads, double scale) {
  MNV4_CHECK_SHAPE(query.dim() == 4, query, "query", "have four dimensions [N, heads * Dk, H, W]");
  const int64_t batch = query.size(0);
  MNV4_CHECK_SHAPE(key.dim() == 3 && key.size(0) == batch, key, "key", "have shape [N, P, Dk] with N = ", batch);
  const int64_t positions = key.size(1);
  MNV4_CHECK_SHAPE(value.dim() == 3 && value.size(0) == batch && value.size(1) == positions, value, "value",
                   "have shape [N, P, Dv] with N = ", batch, ", P = ", positions);
  const int64_t key_dim = key.size(2);
  const int64_t value_dim = value.size(2);
  STD_TORCH_CHECK(heads > 0, "`heads` must be positive, got ", heads);
  STD_TORCH_CHECK(positions > 0, "`key` must have at least one position, got ", shape_text(key));
  MNV4_CHECK_SHAPE(query.size(1) == heads * key_dim, query, "query", "have heads * Dk = ", heads * key_dim,
                   " channels");

  OptionalTensor key_storage, value_storage, query_storage;
  const float* k = widened(key, "key", &key_storage);
  const float* v = widened(value, "value", &value_storage);
  Image in = dense_image(query, "query");
  if (in.pixel != in.channels) {
    // a slice of more channels: rows of heads must be adjacent
    query_storage = scratch(in.batch * in.pixels() * in.channels);
    float* to = floats(*query_storage);
    for (int64_t i = 0; i < in.batch * in.pixels(); ++i) {
      std::copy_n(in.data + i * in.pixel, in.channels, to + i * in.channels);
    }
    in.data = to;
  }
  Result out(query, batch, heads * value_dim, in.height, in.width, is_channels_last(query));

  const int64_t key_floats = round_up(positions, kPanel) * key_dim;
  const int64_t value_floats = round_up(value_dim, kPanel) * positions;
  const Tensor packed = scratch(batch * (key_floats + value_floats));
  const std::vector<float> zeros(static_cast<size_t>(round_up(std::max(positions, value_dim), kPanel)), 0.0f);
  const GemmKernel& kernel = gemm_kernel();
  const int64_t rows = in.pixels() * heads;
  const int64_t workers = torch::stable::get_num_threads();
  const int64_t chunks =
      std::max<int64_t>(1, std::min(div_up(workers, std::max<int64_t>(1, batch)), div_up(rows, 2 * kernel.max_rows)));

  parallel(batch, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* to = floats(packed) + n * (key_floats + value_floats);
      pack_panels(k + n * positions * key_dim, positions, key_dim, key_dim, 1, to);
      pack_panels(v + n * positions * value_dim, value_dim, positions, 1, value_dim, to + key_floats);
    }
  });
  parallel(rows ? batch * chunks : 0, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch(attention_scratch(kernel, positions));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / chunks;
      const int64_t c = t % chunks;
      AttentionArgs args{};
      args.query = in.data + n * rows * key_dim;
      args.key = floats(packed) + n * (key_floats + value_floats);
      args.value = args.key + key_floats;
      args.zeros = zeros.data();
      args.y = out.data() + n * rows * value_dim;
      args.positions = positions;
      args.key_dim = key_dim;
      args.value_dim = value_dim;
      args.scale = static_cast<float>(scale);
      attention(kernel, kernel, args, rows * c / chunks, rows * (c + 1) / chunks, floats(buffer));
    }
  });
  return out.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("kv_downsample", TORCH_BOX(&kv_downsample));
  m.impl("mqa", TORCH_BOX(&mqa));
}

}  // namespace mnv4::ops
