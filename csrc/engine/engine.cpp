#include "engine/engine.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/conv/conv.h"

namespace mnv4::engine {
namespace {

// Plans kept for one engine; the least recently used goes first.
constexpr size_t kPlans = 16;

// Part of the last-level cache that the activations of the images in flight may take.
constexpr double kCacheShare = 0.6;

// How an array is packed, and the floats it then takes.
struct Packing {
  enum class Layout { kVector, kDepthwise, kConv, kProduct } layout;
  int64_t outputs;
  int64_t inputs;
  int kernel_h;
  int kernel_w;

  int64_t floats() const {
    const int64_t columns = round_up(outputs, kPanel);
    const int64_t taps = static_cast<int64_t>(kernel_h) * kernel_w;
    switch (layout) {
      case Layout::kVector:
        return columns;
      case Layout::kDepthwise:
        return columns * taps;
      case Layout::kConv:
        return columns * conv_depth(inputs, taps);
      case Layout::kProduct:
        return columns * round_up(inputs, kPanel);
    }
    return 0;
  }

  void pack(const Array& from, float* to) const {
    const int taps = kernel_h * kernel_w;
    std::fill_n(to, floats(), 0.0f);
    switch (layout) {
      case Layout::kVector:
        std::copy_n(from.data, std::min(from.size, outputs), to);
        break;
      case Layout::kDepthwise:
        pack_panels(from.data, outputs, taps, taps, 1, to);
        break;
      case Layout::kConv:
        pack_conv(from.data, outputs, inputs, kernel_h, kernel_w, to);
        break;
      case Layout::kProduct:
        for (int64_t first = 0; first < outputs; first += kPanel) {
          pack_panels(from.data + first * inputs, std::min<int64_t>(kPanel, outputs - first), inputs, inputs, 1, to);
          to += round_up(inputs, kPanel) * kPanel;
        }
        break;
    }
  }
};

// The packing of each of a node's arrays; `channels` are the node's input channels.
std::vector<Packing> packings(const Node& n, int64_t channels) {
  using Layout = Packing::Layout;
  const int kh = static_cast<int>(n.kernel_h);
  const int kw = static_cast<int>(n.kernel_w);
  const auto vector = [](int64_t size) { return Packing{Layout::kVector, size, 1, 1, 1}; };
  const auto product = [](int64_t outputs, int64_t inputs) {
    return Packing{Layout::kProduct, outputs, inputs, 1, 1};
  };
  switch (n.what()) {
    case Kind::kConv:
      return {{Layout::kConv, n.channels, channels, kh, kw}, vector(n.channels)};
    case Kind::kDepthwise:
      return {{Layout::kDepthwise, n.channels, 1, kh, kw}, vector(n.channels)};
    case Kind::kPointwise:
    case Kind::kLinear:
      return {product(n.channels, channels), vector(n.channels)};
    case Kind::kAttention: {
      const Packing down{Layout::kDepthwise, kh ? channels : 0, 1, kh, kw};
      const int64_t queries = n.heads * n.key_dim;
      const int64_t mixed = n.heads * n.value_dim;
      return {vector(channels), vector(channels),
              product(queries, channels), vector(queries),
              down, vector(channels), product(n.key_dim, channels), vector(n.key_dim),
              down, vector(channels), product(n.value_dim, channels), vector(n.value_dim),
              product(n.channels, mixed), vector(n.channels)};
    }
    default:
      return {};
  }
}

}  // namespace

Engine::Engine(const Program& program) : program_(program) {
  const size_t count = program_.nodes.size();
  std::vector<int64_t> channels(count, 0);
  std::vector<std::vector<Packing>> layouts(count);
  int64_t floats = 0;
  for (size_t i = 0; i < count; ++i) {
    const Node& n = program_.nodes[i];
    const int64_t inputs = i == 0 ? n.channels : channels[static_cast<size_t>(n.input)];
    const bool keeps = n.what() == Kind::kPool || n.what() == Kind::kOutput;
    channels[i] = keeps ? inputs : n.channels;
    layouts[i] = packings(n, inputs);
    for (const Packing& p : layouts[i]) floats += p.floats();
  }
  // a tile's prefetch runs one panel's worth past the end
  weights_ = Memory(static_cast<size_t>(floats + kPanel * kPanel) * sizeof(float));
  float* to = weights_.floats();
  packed_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    for (size_t a = 0; a < layouts[i].size(); ++a) {
      layouts[i][a].pack(program_.arrays[static_cast<size_t>(program_.nodes[i].weight) + a], to);
      packed_[i].arrays.push_back(to);
      to += layouts[i][a].floats();
    }
  }
  // the caller's arrays are only borrowed
  program_.arrays.clear();
}

std::shared_ptr<Plan> Engine::plan(const Shape& shape, int64_t workers, int64_t tag) {
  const cpu::Tier tier = cpu::active_tier();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = plans_.begin(); it != plans_.end(); ++it) {
    const Shape& s = it->shape;
    const bool same = s.images == shape.images && s.channels == shape.channels && s.height == shape.height &&
                      s.width == shape.width && it->workers == workers && it->tag == tag && it->tier == tier;
    if (!same) continue;
    plans_.splice(plans_.begin(), plans_, it);
    return it->plan;
  }
  auto made = std::make_shared<Plan>(program_, packed_, shape, workers, tag);
  plans_.push_front({shape, workers, tag, tier, made});
  if (plans_.size() > kPlans) plans_.pop_back();
  return made;
}

int64_t Engine::images_at_a_time(const Shape& shape, int64_t workers, int64_t tag) {
  if (shape.images <= 1) return shape.images;
  Shape one = shape;
  one.images = 1;
  const double bytes = static_cast<double>(plan(one, workers, tag)->arena_floats()) * sizeof(float);
  const double budget = kCacheShare * static_cast<double>(cpu::cache_sizes().l3);
  return std::clamp<int64_t>(static_cast<int64_t>(budget / bytes), 1, shape.images);
}

std::vector<Shape> Engine::output_shapes(const Shape& shape, int64_t workers, int64_t tag) {
  Shape one = shape;
  one.images = 1;
  std::vector<Shape> shapes = plan(one, workers, tag)->outputs();
  for (Shape& s : shapes) s.images = shape.images;
  return shapes;
}

void Engine::run(const Shape& shape, const Input& input, const std::vector<float*>& outputs, int64_t workers, int64_t tag,
                 const ParallelRegion& parallel) {
  const int64_t at_a_time = images_at_a_time(shape, workers, tag);
  std::vector<float*> out = outputs;
  Input in = input;
  for (int64_t first = 0; first < shape.images; first += at_a_time) {
    Shape part = shape;
    part.images = std::min(at_a_time, shape.images - first);
    const std::shared_ptr<Plan> chosen = plan(part, workers, tag);
    Memory memory = chosen->borrow();
    const Context context{memory.floats(), in, out.data(), nullptr};
    Barrier barrier(workers);
    parallel(workers, [&](int64_t begin, int64_t end) {
      float* scratch = memory.floats() + chosen->arena_floats() + begin * chosen->scratch_floats();
      chosen->run(context, barrier, begin, end, scratch);
    });
    for (size_t i = 0; i < out.size(); ++i) {
      const Shape& s = chosen->outputs()[i];
      out[i] += part.images * s.channels * s.height * s.width;
    }
    in.data += part.images * in.image;
    chosen->give_back(std::move(memory));
  }
}

Engine::Profile Engine::profile(const Shape& shape, const Input& input, int64_t workers, int64_t tag, int64_t repeats,
                                const ParallelRegion& parallel) {
  Shape part = shape;
  part.images = images_at_a_time(shape, workers, tag);
  const std::shared_ptr<Plan> chosen = plan(part, workers, tag);
  std::vector<std::vector<float>> results;
  std::vector<float*> outputs;
  for (const Shape& s : chosen->outputs()) {
    results.emplace_back(static_cast<size_t>(s.images * s.channels * s.height * s.width));
    outputs.push_back(results.back().data());
  }
  Memory memory = chosen->borrow();
  const size_t steps = chosen->steps().size();
  Profile found;
  found.seconds.assign(static_cast<size_t>(repeats) * steps, 0.0);
  for (int64_t r = 0; r < repeats; ++r) {
    const Context context{memory.floats(), input, outputs.data(), found.seconds.data() + static_cast<size_t>(r) * steps};
    Barrier barrier(workers);
    parallel(workers, [&](int64_t begin, int64_t end) {
      float* scratch = memory.floats() + chosen->arena_floats() + begin * chosen->scratch_floats();
      chosen->run(context, barrier, begin, end, scratch);
    });
  }
  chosen->give_back(std::move(memory));
  for (const Step& step : chosen->steps()) found.steps.emplace_back(step.node, step.part);
  return found;
}

}  // namespace mnv4::engine
