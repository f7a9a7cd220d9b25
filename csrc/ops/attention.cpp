// mnv4_kernels::kv_downsample, mnv4_kernels::mqa and its backward on the CPU.
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

// `wide` in x's type, shaped `size`.
Tensor narrow_result(const Tensor& x, const Tensor& wide, IntList size) {
  const Storage type = storage_of(x, "x");
  if (type == Storage::kFloat32) return viewed(wide, size);
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
        args.weight = paths[path]->down();
        args.bias = paths[path]->shift();
        args.channels = channels;
        set_window(args, g);
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

// Sizes of a call of mqa, checked.
struct AttentionSizes {
  int64_t batch, positions, key_dim, value_dim;
};
AttentionSizes attention_sizes(const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads) {
  MNV4_CHECK_SHAPE(query.dim() == 4, query, "query", "have four dimensions [N, heads * Dk, H, W]");
  const int64_t batch = query.size(0);
  MNV4_CHECK_SHAPE(key.dim() == 3 && key.size(0) == batch, key, "key", "have shape [N, P, Dk] with N = ", batch);
  const int64_t positions = key.size(1);
  MNV4_CHECK_SHAPE(value.dim() == 3 && value.size(0) == batch && value.size(1) == positions, value, "value",
                   "have shape [N, P, Dv] with N = ", batch, ", P = ", positions);
  const int64_t key_dim = key.size(2);
  STD_TORCH_CHECK(heads > 0, "`heads` must be positive, got ", heads);
  STD_TORCH_CHECK(positions > 0, "`key` must have at least one position, got ", shape_text(key));
  MNV4_CHECK_SHAPE(query.size(1) == heads * key_dim, query, "query", "have heads * Dk = ", heads * key_dim,
                   " channels");
  return {batch, positions, key_dim, value.size(2)};
}

// Rows of heads, which are adjacent: a slice of more channels is copied.
Image adjacent_rows(const Tensor& x, const char* name) {
  Image in = dense_image(x, name);
  if (in.pixel == in.channels) return in;
  const Tensor rows = scratch(in.batch * in.pixels() * in.channels);
  for (int64_t i = 0; i < in.batch * in.pixels(); ++i) {
    std::copy_n(in.data + i * in.pixel, in.channels, floats(rows) + i * in.channels);
  }
  in.data = floats(rows);
  in.storage = rows;
  return in;
}

Tensor mqa(Tensor query, Tensor key, Tensor value, int64_t heads, double scale) {
  const auto [batch, positions, key_dim, value_dim] = attention_sizes(query, key, value, heads);
  OptionalTensor key_storage, value_storage;
  const float* k = widened(key, "key", &key_storage);
  const float* v = widened(value, "value", &value_storage);
  const Image in = adjacent_rows(query, "query");
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
      const float* keys = floats(packed) + n * (key_floats + value_floats);
      args.key = keys;
      args.value = keys + key_floats;
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

// Query rows of an image that one worker goes back through; their sums over rows are joined in order.
constexpr int64_t kGradientRows = 512;

// Tiles [parts][ceil(P / 16)][ceil(D / 16)][16][16], summed in order, to [P][D].
void join_tiles(const float* tiles, int64_t parts, int64_t positions, int64_t depth, float* out) {
  const int64_t size = attention_tiles(positions, depth);
  const int64_t panels = div_up(depth, kPanel);
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t d = 0; d < depth; ++d) {
      const float* tile = tiles + ((p / kPanel * panels + d / kPanel) * kPanel + p % kPanel) * kPanel + d % kPanel;
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part) sum += tile[part * size];
      out[p * depth + d] = sum;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> mqa_backward(Tensor grad, Tensor query, Tensor key, Tensor value, int64_t heads,
                                                double scale) {
  const auto [batch, positions, key_dim, value_dim] = attention_sizes(query, key, value, heads);
  MNV4_CHECK_SHAPE(grad.dim() == 4 && grad.size(0) == batch && grad.size(1) == heads * value_dim &&
                       grad.size(2) == query.size(2) && grad.size(3) == query.size(3),
                   grad, "grad", "have the result's shape [", batch, ", ", heads * value_dim, ", ", query.size(2), ", ",
                   query.size(3), "]");
  OptionalTensor key_storage, value_storage;
  const float* k = widened(key, "key", &key_storage);
  const float* v = widened(value, "value", &value_storage);
  const Image in = adjacent_rows(query, "query");
  const Image dy = adjacent_rows(grad, "grad");
  Result dquery(query, batch, heads * key_dim, in.height, in.width, is_channels_last(query));
  const Tensor dkey = scratch(batch * positions * key_dim);
  const Tensor dvalue = scratch(batch * positions * value_dim);

  // key and value by position for scores and their gradient, key by depth for the queries'
  const int64_t padded = round_up(positions, kPanel);
  const int64_t key_floats = padded * key_dim;
  const int64_t value_floats = padded * value_dim;
  const int64_t packed_floats = key_floats + value_floats + round_up(key_dim, kPanel) * positions;
  const Tensor packed = scratch(batch * packed_floats);
  const std::vector<float> zeros(static_cast<size_t>(round_up(std::max(positions, key_dim), kPanel)), 0.0f);
  const GemmKernel& kernel = gemm_kernel();
  const int64_t rows = in.pixels() * heads;
  const int64_t parts = div_up(rows, kGradientRows);
  const int64_t key_tiles = attention_tiles(positions, key_dim);
  const int64_t value_tiles = attention_tiles(positions, value_dim);
  const Tensor tiles = scratch(batch * parts * (key_tiles + value_tiles));

  parallel(batch, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* to = floats(packed) + n * packed_floats;
      const float* keys = k + n * positions * key_dim;
      pack_panels(keys, positions, key_dim, key_dim, 1, to);
      pack_panels(v + n * positions * value_dim, positions, value_dim, value_dim, 1, to + key_floats);
      pack_panels(keys, key_dim, positions, 1, key_dim, to + key_floats + value_floats);
    }
  });
  parallel(batch * parts, [&](int64_t begin, int64_t end) {
    const Tensor buffer = scratch(attention_gradient_scratch(kernel, positions, key_dim, value_dim));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / parts;
      const int64_t part = t % parts;
      AttentionGradientArgs args{};
      args.query = in.data + n * rows * key_dim;
      args.grad = dy.data + n * rows * value_dim;
      args.key = floats(packed) + n * packed_floats;
      args.value = args.key + key_floats;
      args.key_by_depth = args.value + value_floats;
      args.zeros = zeros.data();
      args.dquery = dquery.data() + n * rows * key_dim;
      // all parts of an image's keys, then all of its values
      args.key_tiles = floats(tiles) + n * parts * (key_tiles + value_tiles) + part * key_tiles;
      args.value_tiles = floats(tiles) + n * parts * (key_tiles + value_tiles) + parts * key_tiles + part * value_tiles;
      args.positions = positions;
      args.key_dim = key_dim;
      args.value_dim = value_dim;
      args.scale = static_cast<float>(scale);
      attention_gradient(kernel, args, rows * part / parts, rows * (part + 1) / parts, floats(buffer));
    }
  });
  parallel(batch, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* from = floats(tiles) + n * parts * (key_tiles + value_tiles);
      join_tiles(from, parts, positions, key_dim, floats(dkey) + n * positions * key_dim);
      join_tiles(from + parts * key_tiles, parts, positions, value_dim, floats(dvalue) + n * positions * value_dim);
    }
  });
  return {dquery.finish(), narrow_result(key, dkey, {batch, positions, key_dim}),
          narrow_result(value, dvalue, {batch, positions, value_dim})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("kv_downsample", TORCH_BOX(&kv_downsample));
  m.impl("mqa", TORCH_BOX(&mqa));
  m.impl("mqa_backward", TORCH_BOX(&mqa_backward));
}

}  // namespace mnv4::ops
