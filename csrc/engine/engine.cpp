#include "engine/engine.h"

#include <algorithm>

#include "engine/phases.h"
#include "kernels/pointwise/pointwise.h"
#include "kernels/winograd/winograd.h"

namespace mnv4::engine {
namespace {

// Plans kept for one engine; the least recently used goes first.
constexpr size_t kPlans = 16;

// How an array is packed, and the floats it then takes.
struct Packing {
  enum class Layout { kVector, kDepthwise, kConv, kWinograd, kProduct } layout;
  int64_t outputs;
  int64_t inputs;
  int kernel_h;
  int kernel_w;
  Storage type = Storage::kFloat32;
  bool dilated = false;
  int64_t stride = 1;
  // what float32 values are rounded to: products of pairs need values of bfloat16
  Storage rounded = Storage::kFloat32;

  ConvShape conv() const { return {inputs, kernel_h, kernel_w, dilated, type != Storage::kFloat32}; }

  int64_t bytes() const { return floats() * storage_bytes(type); }

  int64_t panels() const { return div_up(outputs, kPanel); }

  int64_t panel_floats() const { return floats() / panels(); }

  int64_t floats() const {
    const int64_t columns = round_up(outputs, kPanel);
    const int64_t taps = static_cast<int64_t>(kernel_h) * kernel_w;
    switch (layout) {
      case Layout::kVector:
        return columns;
      case Layout::kDepthwise:
        return columns * taps;
      case Layout::kConv:
        return columns * conv_depth(conv());
      case Layout::kWinograd:
        return winograd_floats(outputs, inputs, stride);
      case Layout::kProduct:
        return columns * round_up(inputs, kPanel);
    }
    return 0;
  }

  void pack(const Array& from, char* to) const {
    auto* whole = reinterpret_cast<float*>(to);
    if (layout == Layout::kWinograd) return pack_winograd(from.data, outputs, inputs, stride, whole);
    if (layout == Layout::kVector) {
      std::fill_n(whole, floats(), 0.0f);
      std::copy_n(from.data, std::min(from.size, outputs), whole);
      return;
    }
    // what becomes pairs is wide for one panel at a time
    std::vector<float> wide(static_cast<size_t>(type == Storage::kFloat32 ? 0 : panel_floats()));
    for (int64_t panel = 0; panel < panels(); ++panel) {
      char* at = to + panel * panel_floats() * storage_bytes(type);
      pack_panel(from, panel, wide.empty() ? reinterpret_cast<float*>(at) : wide.data());
      if (!wide.empty()) pack_pairs(wide.data(), 1, panel_floats() / kPanel, reinterpret_cast<uint16_t*>(at));
    }
  }

  // The array that pack() was given, rounded as it is stored.
  std::vector<float> unpack(const void* from) const {
    std::vector<float> wide;
    const auto* packed = static_cast<const float*>(from);
    if (type != Storage::kFloat32) {
      wide.resize(static_cast<size_t>(floats()));
      const int64_t panels = std::max<int64_t>(1, div_up(outputs, kPanel));
      unpack_pairs(static_cast<const uint16_t*>(from), panels, floats() / (panels * kPanel), wide.data());
      packed = wide.data();
    }
    const int64_t taps = static_cast<int64_t>(kernel_h) * kernel_w;
    const int64_t depth = layout == Layout::kProduct ? inputs : taps;
    const int64_t stored = layout == Layout::kProduct ? round_up(inputs, kPanel) : taps;
    switch (layout) {
      case Layout::kVector:
        return {packed, packed + outputs};
      case Layout::kConv: {
        std::vector<float> to(static_cast<size_t>(outputs * inputs * taps));
        unpack_conv(packed, outputs, conv(), to.data());
        return to;
      }
      case Layout::kWinograd: {
        std::vector<float> to(static_cast<size_t>(outputs * inputs * taps));
        unpack_winograd(packed, outputs, inputs, stride, to.data());
        return to;
      }
      case Layout::kDepthwise:
      case Layout::kProduct:
        break;
    }
    std::vector<float> to(static_cast<size_t>(outputs * depth));
    for (int64_t o = 0; o < outputs; ++o) {
      const float* panel = packed + o / kPanel * stored * kPanel + o % kPanel;
      for (int64_t i = 0; i < depth; ++i) to[static_cast<size_t>(o * depth + i)] = panel[i * kPanel];
    }
    return to;
  }

  void pack_panel(const Array& from, int64_t panel, float* to) const {
    const int64_t taps = static_cast<int64_t>(kernel_h) * kernel_w;
    const int64_t first = panel * kPanel;
    const int64_t columns = std::min<int64_t>(kPanel, outputs - first);
    const float* weight = from.data + first * inputs * taps;
    if (layout == Layout::kConv) return pack_conv(weight, columns, conv(), to);
    const int64_t depth = inputs * taps;
    pack_panels(weight, columns, depth, depth, 1, to);
    std::fill(to + depth * kPanel, to + panel_floats(), 0.0f);
    if (layout == Layout::kDepthwise) round_to(rounded, to, panel_floats());
  }
};

// The packing of each of a node's arrays; `channels` are the node's input channels, `type` its input's.
std::vector<Packing> packings(const Node& n, int64_t channels, Storage type) {
  using Layout = Packing::Layout;
  const int kh = static_cast<int>(n.kernel_h);
  const int kw = static_cast<int>(n.kernel_w);
  const auto vector = [](int64_t size) { return Packing{Layout::kVector, size, 1, 1, 1}; };
  const auto product = [type](int64_t outputs, int64_t inputs) {
    return Packing{Layout::kProduct, outputs, inputs, 1, 1, type};
  };
  switch (n.what()) {
    case Kind::kConv: {
      Packing conv{Layout::kConv, n.channels, channels, kh, kw, type, n.dilation_w != 1, n.stride_h};
      // a single panel of products does not pay for the terms
      const bool several = n.channels > kPanel;
      if (several && winograd_fits(conv.conv(), n.stride_h, n.stride_w, n.dilation_h)) conv.layout = Layout::kWinograd;
      return {conv, vector(n.channels)};
    }
    case Kind::kDepthwise: {
      Packing taps{Layout::kDepthwise, n.channels, 1, kh, kw};
      taps.rounded = type;
      return {taps, vector(n.channels)};
    }
    case Kind::kPointwise:
    case Kind::kLinear:
      return {product(n.channels, channels), vector(n.channels)};
    case Kind::kAttention: {
      const Packing down{Layout::kDepthwise, kh ? channels : 0, 1, kh, kw};
      const int64_t queries = n.heads * n.key_dim;
      const int64_t mixed = n.heads * n.value_dim;
      return {vector(channels),
              vector(channels),
              product(queries, channels),
              vector(queries),
              down,
              vector(channels),
              product(n.key_dim, channels),
              vector(n.key_dim),
              down,
              vector(channels),
              product(n.value_dim, channels),
              vector(n.value_dim),
              product(n.channels, mixed),
              vector(n.channels)};
    }
    default:
      return {};
  }
}

// Where an array of a node lies in the packed weights.
struct Place {
  size_t node;
  size_t array;
  Packing packing;
  int64_t offset;

  // Of the array among the program's.
  size_t number(const Program& program) const { return static_cast<size_t>(program.nodes[node].weight) + array; }
};

std::vector<Place> places(const Program& program, Storage compute) {
  std::vector<int64_t> channels(program.nodes.size(), 0);
  std::vector<Place> found;
  int64_t offset = 0;
  for (size_t i = 0; i < program.nodes.size(); ++i) {
    const Node& n = program.nodes[i];
    const int64_t inputs = i == 0 ? n.channels : channels[static_cast<size_t>(n.input)];
    const bool keeps = n.what() == Kind::kPool || n.what() == Kind::kOutput;
    channels[i] = keeps ? inputs : n.channels;
    const std::vector<Packing> arrays = packings(n, inputs, compute);
    for (size_t a = 0; a < arrays.size(); ++a) {
      found.push_back({i, a, arrays[a], offset});
      offset += arrays[a].bytes();
    }
  }
  return found;
}

}  // namespace

Engine::Engine(std::vector<Node> nodes, Storage compute) : program_{std::move(nodes), {}}, compute_(compute) {
  weights_ = Memory(static_cast<size_t>(packed_bytes(program_, compute)));
  find(weights_.data());
}

Engine::Engine(std::vector<Node> nodes, Storage compute, char* packed)
    : program_{std::move(nodes), {}}, compute_(compute) {
  find(packed);
}

int64_t Engine::packed_bytes(const Program& program, Storage compute) {
  int64_t bytes = 0;
  for (const Place& place : places(program, compute)) bytes = place.offset + place.packing.bytes();
  // room for a tile's prefetch past the end
  return bytes + kPanel * kPanel * static_cast<int64_t>(sizeof(float));
}

void Engine::pack(const Program& program, Storage compute, char* to, int64_t workers, const ParallelRegion& parallel) {
  const std::vector<Place> all = places(program, compute);
  const int64_t bytes = packed_bytes(program, compute);
  parallel(workers, [&](int64_t begin, int64_t end) {
    for (const Place& place : all) {
      // whoever's part of the bytes it begins in
      const int64_t worker = place.offset * workers / bytes;
      if (worker < begin || worker >= end) continue;
      place.packing.pack(program.arrays[place.number(program)], to + place.offset);
    }
  });
}

void Engine::pack(int64_t number, const Array& array) {
  // by one thread: to wait for a second one several hundred times costs more than it saves, on a busy machine tenfold
  for (const Place& place : places(program_, compute_)) {
    if (place.number(program_) == static_cast<size_t>(number))
      place.packing.pack(array, weights_.data() + place.offset);
  }
}

std::vector<std::vector<float>> Engine::arrays() const {
  std::vector<std::vector<float>> found;
  for (const Place& place : places(program_, compute_)) {
    const size_t array = place.number(program_);
    found.resize(std::max(found.size(), array + 1));
    found[array] = place.packing.unpack(packed_[place.node].arrays[place.array]);
  }
  return found;
}

void Engine::find(char* packed) {
  packed_.resize(program_.nodes.size());
  for (PackedNode& node : packed_) node.pairs = compute_ != Storage::kFloat32;
  for (const Place& place : places(program_, compute_)) {
    packed_[place.node].arrays.push_back(packed + place.offset);
    packed_[place.node].winograd |= place.packing.layout == Packing::Layout::kWinograd;
    const int64_t panels = std::max<int64_t>(1, div_up(place.packing.outputs, kPanel));
    slots_.push_back({place.node, place.array, place.packing.type, place.packing.floats() / (panels * kPanel), panels});
  }
}

const std::vector<PackedNode>& Engine::packed_for(Storage compute) {
  if (compute == compute_) return packed_;
  if (!widened_packed_.empty()) return widened_packed_;
  int64_t floats = kPanel * kPanel;
  for (const Slot& s : slots_) floats += s.type == Storage::kFloat32 ? 0 : s.panels * s.depth * kPanel;
  widened_ = Memory(static_cast<size_t>(floats) * sizeof(float));
  widened_packed_ = packed_;
  auto* to = reinterpret_cast<float*>(widened_.data());
  for (const Slot& s : slots_) {
    if (s.type == Storage::kFloat32) continue;
    unpack_pairs(static_cast<const uint16_t*>(packed_[s.node].arrays[s.array]), s.panels, s.depth, to);
    widened_packed_[s.node].arrays[s.array] = to;
    to += s.panels * s.depth * kPanel;
  }
  return widened_packed_;
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
  const Storage compute = gemm_has_bfloat16() ? compute_ : Storage::kFloat32;
  // the last level is shared with other work, and glibc tells the socket's, not what these cores reach
  const int64_t cache = workers * cpu::cache_sizes().l2;
  auto made = std::make_shared<Plan>(program_, packed_for(compute), shape, workers, tag, compute, cache);
  plans_.push_front({shape, workers, tag, tier, made});
  if (plans_.size() > kPlans) plans_.pop_back();
  return made;
}

std::vector<Shape> Engine::output_shapes(const Shape& shape, int64_t workers, int64_t tag) {
  Shape one = shape;
  one.images = 1;
  std::vector<Shape> shapes = plan(one, workers, tag)->outputs();
  for (Shape& s : shapes) s.images = shape.images;
  return shapes;
}

Engine::Part Engine::part(const Shape& shape, int64_t workers, int64_t tag) {
  Part part{nullptr, shape, 1};
  const int64_t each = std::min(shape.images / workers, kMostImages);
  if (workers > 1 && each > 0) {
    part.teams = workers;
    part.shape.images = each;
  } else {
    part.shape.images = std::min(shape.images, kMostImages);
  }
  part.plan = plan(part.shape, workers / part.teams, tag);
  return part;
}

void Engine::run_part(const Part& part, const Context& context, const ParallelRegion& parallel) {
  Plan& plan = *part.plan;
  Memory memory = plan.borrow(part.teams);
  if (part.teams == 1) {
    Context own = context;
    own.arena = memory.data();
    Team team(plan.workers(), plan.most_jobs());
    parallel(plan.workers(),
             [&](int64_t begin, int64_t end) { plan.run(own, team, begin, end, plan.scratch(memory, 0, begin)); });
  } else {
    parallel(part.teams, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        Context own = context;
        own.arena = plan.arena(memory, t);
        own.first_image += t * part.shape.images;
        if (t > 0) own.step_seconds = nullptr;
        Team team(1, plan.most_jobs());
        plan.run(own, team, 0, 1, plan.scratch(memory, t, 0));
      }
    });
  }
  plan.give_back(std::move(memory));
}

void Engine::run(const Shape& shape, const Input& input, const std::vector<float*>& outputs, bool nhwc, int64_t workers,
                 int64_t tag, const ParallelRegion& parallel) {
  Context context{nullptr, input, 0, outputs.data(), nhwc, nullptr};
  while (context.first_image < shape.images) {
    Shape rest = shape;
    rest.images -= context.first_image;
    const Part next = part(rest, workers, tag);
    run_part(next, context, parallel);
    context.first_image += next.teams * next.shape.images;
  }
}

Engine::Profile Engine::profile(const Shape& shape, const Input& input, int64_t workers, int64_t tag, int64_t repeats,
                                const ParallelRegion& parallel) {
  const Part first = part(shape, workers, tag);
  std::vector<std::vector<float>> results;
  std::vector<float*> outputs;
  for (const Shape& s : first.plan->outputs()) {
    results.emplace_back(static_cast<size_t>(first.teams * s.images * s.channels * s.height * s.width));
    outputs.push_back(results.back().data());
  }
  const std::vector<Step>& steps = first.plan->steps();
  Profile found;
  found.seconds.assign(static_cast<size_t>(repeats) * steps.size(), 0.0);
  for (int64_t r = 0; r < repeats; ++r) {
    double* seconds = found.seconds.data() + static_cast<size_t>(r) * steps.size();
    run_part(first, {nullptr, input, 0, outputs.data(), false, seconds}, parallel);
  }
  const std::string alone = first.teams > 1 ? "each worker has images of its own" : "";
  for (const Step& step : steps) {
    const char* between = step.reason.empty() || alone.empty() ? "" : ", ";
    found.steps.push_back({step.node, step.part, step.reason + between + alone});
  }
  return found;
}

}  // namespace mnv4::engine
