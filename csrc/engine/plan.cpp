#include "engine/plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

#include "engine/arena.h"

namespace mnv4::engine {
namespace {

// Workers may wait this part of a fused step for the one with a panel more.
constexpr double kFusionImbalance = 0.06;

// Weights are fetched this long before they are used, and no faster than this; in bytes that tiles pass through, of
// which a core does about 16 GB/s.
constexpr double kLead = 64 << 10;
constexpr double kFetchRate = 0.5;

// One node alone, or a pointwise node and what runs on its panels.
struct Group {
  int64_t head = 0;
  int64_t rider = -1;  // depthwise or pool
};

}  // namespace

class Planner {
 public:
  Planner(Plan& plan, const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t tag,
          Storage compute)
      : plan_(plan),
        program_(program),
        packed_(packed),
        compute_(compute),
        shapes_(program.nodes.size()),
        offsets_(program.nodes.size(), 0),
        pads_(program.nodes.size()),
        needed_(program.nodes.size(), false) {
    find_needed(tag);
    infer_shapes(input);
    group_nodes();
    place_nodes();
    for (size_t g = 0; g < groups_.size(); ++g) emit(groups_[g], static_cast<int64_t>(g));
    share_steps();
    for (int64_t w = 0; w < plan_.workers_; ++w) fetch_ahead(static_cast<size_t>(w));
    plan_.arena_bytes_ = arena_.total();
  }

 private:
  struct Pads {
    int top = 0, left = 0;
  };

  const Node& node(int64_t id) const { return program_.nodes[static_cast<size_t>(id)]; }
  const Shape& shape(int64_t id) const { return shapes_[static_cast<size_t>(id)]; }
  const void* weight(int64_t id, size_t i) const { return packed_[static_cast<size_t>(id)].arrays[i]; }
  const float* array(int64_t id, size_t i) const { return static_cast<const float*>(weight(id, i)); }
  bool from_input(int64_t id) const { return node(id).what() == Kind::kInput && !input_needs_planes(); }

  Planes planes(int64_t id) const {
    const Shape& s = shape(id);
    Planes p{offsets_[static_cast<size_t>(id)], compute_, s.images, s.channels, s.height, s.width};
    if (is_result(id) || feeds_rider(id)) p.type = Storage::kFloat32;
    return p;
  }

  // Logits and features are handed out as they were summed.
  bool is_result(int64_t id) const {
    if (node(id).what() != Kind::kLinear) return false;
    for (size_t i = static_cast<size_t>(id) + 1; i < needed_.size(); ++i) {
      if (program_.nodes[i].input == id && program_.nodes[i].what() != Kind::kOutput) return false;
    }
    return true;
  }

  // A product that only the depthwise or the pool right behind it reads stays as it was summed, whether they run as one
  // step, which depends on the number of workers, or as two: the same bits either way. Kernels add residuals of their
  // output's type, so beside one in bfloat16 the sum can't stay in float32.
  bool feeds_rider(int64_t id) const {
    const auto next = static_cast<size_t>(id) + 1;
    if (node(id).what() != Kind::kPointwise || next >= needed_.size() || !needed_[next]) return false;
    const Node& rider = program_.nodes[next];
    const bool rides = rider.what() == Kind::kDepthwise || rider.what() == Kind::kPool;
    const bool same_type = compute_ == Storage::kFloat32 || node(id).residual < 0;
    return rides && rider.input == id && reads_of(id) == 1 && same_type;
  }

  static int64_t axis(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation) {
    const int64_t reach = size + before + after - dilation * (kernel - 1) - 1;
    if (reach < 0) {
      throw std::invalid_argument("`x` must be large enough for the network: a kernel of " + std::to_string(kernel) +
                                  " does not fit a map of " + std::to_string(size) + " pixels");
    }
    return reach / stride + 1;
  }

  // TF 'same': the output covers ceil(size / stride) steps, the odd pixel of padding goes behind
  static int64_t same_pads(int64_t size, int64_t kernel, int64_t stride, int64_t dilation) {
    const int64_t reach = (div_up(size, stride) - 1) * stride + (kernel - 1) * dilation + 1;
    return std::max<int64_t>(0, reach - size);
  }

  // What the outputs of `tag` depend on; the rest is not computed.
  void find_needed(int64_t tag) {
    for (size_t i = needed_.size(); i-- > 0;) {
      const Node& n = program_.nodes[i];
      if (n.what() == Kind::kOutput) needed_[i] = n.channels == tag;
      if (!needed_[i]) continue;
      for (int64_t source : {n.input, n.residual}) {
        if (source >= 0) needed_[static_cast<size_t>(source)] = true;
      }
    }
  }
  bool needed(int64_t id) const { return needed_[static_cast<size_t>(id)]; }

  void infer_shapes(const Shape& input) {
    for (size_t i = 0; i < program_.nodes.size(); ++i) {
      const Node& n = program_.nodes[i];
      Shape s = i == 0 ? input : shape(n.input);
      switch (n.what()) {
        case Kind::kInput:
          break;
        case Kind::kConv:
        case Kind::kDepthwise: {
          int64_t top = n.pad_top, bottom = n.pad_bottom, left = n.pad_left, right = n.pad_right;
          if (static_cast<PadMode>(n.pad_mode) == PadMode::kSame) {
            const int64_t high = same_pads(s.height, n.kernel_h, n.stride_h, n.dilation_h);
            const int64_t wide = same_pads(s.width, n.kernel_w, n.stride_w, n.dilation_w);
            top = high / 2;
            bottom = high - top;
            left = wide / 2;
            right = wide - left;
          }
          pads_[i] = {static_cast<int>(top), static_cast<int>(left)};
          s.height = axis(s.height, n.kernel_h, n.stride_h, top, bottom, n.dilation_h);
          s.width = axis(s.width, n.kernel_w, n.stride_w, left, right, n.dilation_w);
          s.channels = n.channels;
          break;
        }
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
        case Kind::kOutput:
          if (needed_[i]) plan_.outputs_.push_back(s);
          break;
      }
      shapes_[i] = s;
    }
  }

  // Panels shared evenly enough that a whole panel can be a unit.
  bool balanced(int64_t units) const {
    const double rounds = static_cast<double>(div_up(units, plan_.workers_) * plan_.workers_);
    return rounds / static_cast<double>(units) <= 1.0 + kFusionImbalance;
  }

  // A leading dense convolution reads the caller's tensor as it lies; anything else wants planes.
  bool input_needs_planes() const {
    for (size_t i = 1; i < needed_.size(); ++i) {
      const Node& n = program_.nodes[i];
      const bool reads = n.residual == 0 || (n.input == 0 && n.what() != Kind::kConv);
      if (needed_[i] && reads) return true;
    }
    return false;
  }

  void group_nodes() {
    const int64_t count = static_cast<int64_t>(program_.nodes.size());
    if (input_needs_planes()) groups_.push_back({0, -1});
    for (int64_t i = 1; i < count; ++i) {
      if (!needed(i)) continue;
      Group group{i, -1};
      const bool candidate =
          node(i).what() == Kind::kPointwise && i + 1 < count && needed(i + 1) && node(i + 1).input == i;
      if (candidate) {
        const Kind next = node(i + 1).what();
        const bool rides = next == Kind::kDepthwise || next == Kind::kPool;
        const Shape& s = shape(i);
        // a mean rides only on a result that nobody else reads
        const bool kept = next == Kind::kPool && !is_transient({i, i + 1});
        if (rides && !kept && balanced(s.images * div_up(s.channels, kPanel))) group.rider = ++i;
      }
      groups_.push_back(group);
    }
  }

  int64_t reads_of(int64_t id) const {
    int64_t reads = 0;
    for (size_t i = 0; i < needed_.size(); ++i) {
      const Node& n = program_.nodes[i];
      if (needed_[i] && i > 0) reads += (n.input == id) + (n.residual == id);
    }
    return reads;
  }

  // A pointwise result that only its rider reads never leaves the worker's cache.
  bool is_transient(const Group& group) const { return group.rider >= 0 && feeds_rider(group.head); }

  void place_nodes() {
    std::vector<int64_t> born(shapes_.size(), 0);
    std::vector<int64_t> last(shapes_.size(), 0);
    for (size_t g = 0; g < groups_.size(); ++g) {
      for (int64_t id : {groups_[g].head, groups_[g].rider}) {
        if (id < 0) continue;
        const int64_t now = static_cast<int64_t>(g);
        born[static_cast<size_t>(id)] = now;
        last[static_cast<size_t>(id)] = now;
        for (int64_t source : {node(id).input, node(id).residual}) {
          if (source >= 0) last[static_cast<size_t>(source)] = now;
        }
      }
    }
    for (const Group& group : groups_) {
      for (int64_t id : {group.head, group.rider}) {
        const bool skip = id < 0 || node(id).what() == Kind::kOutput || (id == group.head && is_transient(group));
        if (skip) continue;
        const auto i = static_cast<size_t>(id);
        offsets_[i] = arena_.place(planes(id).bytes(), born[i], last[i]);
      }
    }
  }

  void add(std::unique_ptr<Job> job) { plan_.steps_.back().jobs.push_back(std::move(job)); }
  void step(int64_t id, const char* part) {
    plan_.steps_.emplace_back();
    plan_.steps_.back().node = id;
    plan_.steps_.back().part = part;
  }

  Depthwise depthwise(int64_t id, const Planes& x, const Planes& y, const float* weight, const float* bias) const {
    const Node& n = node(id);
    Depthwise dw;
    dw.args.height = x.height;
    dw.args.width = x.width;
    dw.args.out_height = y.height;
    dw.args.out_width = y.width;
    dw.args.kernel_h = static_cast<int>(n.kernel_h);
    dw.args.kernel_w = static_cast<int>(n.kernel_w);
    dw.args.stride_h = static_cast<int>(n.stride_h);
    dw.args.stride_w = static_cast<int>(n.stride_w);
    dw.args.pad_top = pads_[static_cast<size_t>(id)].top;
    dw.args.pad_left = pads_[static_cast<size_t>(id)].left;
    dw.args.dilation_h = static_cast<int>(n.dilation_h);
    dw.args.dilation_w = static_cast<int>(n.dilation_w);
    dw.args.act = n.activation();
    dw.weight = weight;
    dw.bias = bias;
    dw.reflect = static_cast<PadMode>(n.pad_mode) == PadMode::kReflect;
    dw.y = y;
    return dw;
  }

  std::unique_ptr<Job> product(const Matrix& x, const Matrix& y, const void* weight, const float* bias) const {
    PanelJob::Spec spec;
    spec.x = x;
    spec.y = y;
    spec.depth = round_up(x.columns, kPanel);
    spec.weight = weight;
    spec.bias = bias;
    return std::make_unique<PanelJob>(std::move(spec));
  }

  void emit(const Group& group, int64_t now) {
    const Node& n = node(group.head);
    switch (n.what()) {
      case Kind::kInput:
        step(group.head, "input");
        add(std::make_unique<InputJob>(planes(group.head)));
        break;
      case Kind::kConv:
        emit_conv(group.head);
        break;
      case Kind::kDepthwise: {
        step(group.head, "depthwise");
        const Planes x = planes(n.input);
        Depthwise dw = depthwise(group.head, x, planes(group.head), array(group.head, 0), array(group.head, 1));
        add(std::make_unique<DepthwiseJob>(x, std::move(dw)));
        break;
      }
      case Kind::kPointwise:
        emit_pointwise(group);
        break;
      case Kind::kAttention:
        emit_attention(group.head, now);
        break;
      case Kind::kPool:
        step(group.head, "pool");
        add(std::make_unique<MeanJob>(planes(n.input), planes(group.head)));
        break;
      case Kind::kLinear:
        step(group.head, "linear");
        add(std::make_unique<LinearJob>(planes(n.input), planes(group.head), weight(group.head, 0),
                                        array(group.head, 1), n.activation()));
        break;
      case Kind::kOutput:
        step(group.head, "output");
        add(std::make_unique<OutputJob>(planes(n.input), outputs_done_++));
        break;
    }
  }

  void emit_conv(int64_t id) {
    const Node& n = node(id);
    const Planes y = planes(id);
    const Shape& in = shape(n.input);
    ConvArgs a{};
    a.channels = in.channels;
    a.height = in.height;
    a.width = in.width;
    a.weight = weight(id, 0);
    a.bias = array(id, 1);
    a.out_channels = y.channels;
    a.out_height = y.height;
    a.out_width = y.width;
    a.kernel_h = static_cast<int>(n.kernel_h);
    a.kernel_w = static_cast<int>(n.kernel_w);
    a.stride_h = static_cast<int>(n.stride_h);
    a.stride_w = static_cast<int>(n.stride_w);
    a.pad_top = pads_[static_cast<size_t>(id)].top;
    a.pad_left = pads_[static_cast<size_t>(id)].left;
    a.dilation_h = static_cast<int>(n.dilation_h);
    a.dilation_w = static_cast<int>(n.dilation_w);
    a.act = n.activation();
    step(id, "conv");
    const bool external = from_input(n.input);
    add(std::make_unique<ConvJob>(a, y, external, external ? Planes{} : planes(n.input)));
  }

  void emit_pointwise(const Group& group) {
    const Node& n = node(group.head);
    PanelJob::Spec spec;
    spec.x = Matrix::of(planes(n.input));
    spec.y = Matrix::of(planes(group.head));
    spec.keep_y = !is_transient(group);
    spec.depth = round_up(spec.x.columns, kPanel);
    spec.weight = weight(group.head, 0);
    spec.bias = array(group.head, 1);
    spec.act = n.activation();
    if (n.residual >= 0) {
      spec.has_residual = true;
      spec.residual = Matrix::of(planes(n.residual));
    }
    if (group.rider >= 0 && node(group.rider).what() == Kind::kDepthwise) {
      spec.dw = std::make_unique<Depthwise>(depthwise(group.rider, planes(group.head), planes(group.rider),
                                                      array(group.rider, 0), array(group.rider, 1)));
    } else if (group.rider >= 0) {
      spec.mean = true;
      spec.mean_y = planes(group.rider);
    }
    const char* rider = group.rider < 0 ? "pointwise" : spec.mean ? "pointwise+pool" : "pointwise+depthwise";
    step(group.head, rider);
    add(std::make_unique<PanelJob>(std::move(spec)));
  }

  void emit_attention(int64_t id, int64_t now) {
    const Node& n = node(id);
    const Planes x = planes(n.input);
    const Matrix rows = Matrix::of(x);
    const int64_t images = x.images;
    const bool downsampled = n.kernel_h > 0;
    const auto place = [&](int64_t bytes) { return arena_.place(bytes, now, now); };
    enum : size_t {
      kScale,
      kShift,
      kQuery,
      kQueryBias,
      kKeyDown,
      kKeyShift,
      kKey,
      kKeyBias,
      kValueDown,
      kValueShift,
      kValue,
      kValueBias,
      kOut,
      kOutBias
    };

    // scores, softmax and mix are float32: they are few and their rounding is amplified
    Matrix query = Matrix::row_major(Storage::kFloat32, images, x.pixels(), n.heads * n.key_dim);
    query.offset = place(query.bytes());
    step(id, downsampled ? "query, downsample" : "query, key, value");
    add(product(rows, query, weight(id, kQuery), array(id, kQueryBias)));

    Matrix key_source = rows;
    Matrix value_source = rows;
    if (downsampled) {
      Planes down = x;
      Pads& pads = pads_[static_cast<size_t>(id)];
      if (static_cast<PadMode>(n.pad_mode) == PadMode::kSame) {
        down.height = div_up(x.height, n.stride_h);
        down.width = div_up(x.width, n.stride_w);
        pads.top = static_cast<int>(same_pads(x.height, n.kernel_h, n.stride_h, n.dilation_h) / 2);
        pads.left = static_cast<int>(same_pads(x.width, n.kernel_w, n.stride_w, n.dilation_w) / 2);
      } else {
        down.height = axis(x.height, n.kernel_h, n.stride_h, n.pad_top, n.pad_bottom, n.dilation_h);
        down.width = axis(x.width, n.kernel_w, n.stride_w, n.pad_left, n.pad_right, n.dilation_w);
        pads = {static_cast<int>(n.pad_top), static_cast<int>(n.pad_left)};
      }
      Planes key_down = down, value_down = down;
      key_down.offset = place(down.bytes());
      value_down.offset = place(down.bytes());
      add(std::make_unique<DownsampleJob>(x, array(id, kScale), array(id, kShift),
                                          depthwise(id, x, key_down, array(id, kKeyDown), array(id, kKeyShift)),
                                          depthwise(id, x, value_down, array(id, kValueDown), array(id, kValueShift))));
      key_source = Matrix::of(key_down);
      value_source = Matrix::of(value_down);
      step(id, "key, value");
    }
    const int64_t positions = key_source.rows;
    Matrix key = Matrix::row_major(Storage::kFloat32, images, positions, n.key_dim);
    key.offset = place(key.bytes());
    // value planes are what attention's second product reads as packed panels
    Planes value{0, Storage::kFloat32, images, n.value_dim, positions, 1};
    value.offset = place(value.bytes());
    add(product(key_source, key, weight(id, kKey), array(id, kKeyBias)));
    add(product(value_source, Matrix::of(value), weight(id, kValue), array(id, kValueBias)));

    const int64_t key_panels =
        place(images * round_up(positions, kPanel) * n.key_dim * static_cast<int64_t>(sizeof(float)));
    step(id, "key panels");
    add(std::make_unique<KeyPanelsJob>(key, n.key_dim, key_panels));

    Matrix mixed = Matrix::row_major(compute_, images, x.pixels(), n.heads * n.value_dim);
    mixed.offset = place(mixed.bytes());
    AttentionArgs args{};
    args.positions = positions;
    args.key_dim = n.key_dim;
    args.value_dim = n.value_dim;
    args.scale = 1.0f / std::sqrt(static_cast<float>(n.key_dim));
    args.zeros = zeros(round_up(std::max(positions, n.value_dim), kPanel));
    step(id, "attention");
    add(std::make_unique<AttentionJob>(args, images, x.pixels() * n.heads, query, key_panels, value, mixed));

    PanelJob::Spec out;
    out.x = mixed;
    out.y = Matrix::of(planes(id));
    out.depth = round_up(mixed.columns, kPanel);
    out.weight = weight(id, kOut);
    out.bias = array(id, kOutBias);
    if (n.residual >= 0) {
      out.has_residual = true;
      out.residual = Matrix::of(planes(n.residual));
    }
    step(id, "output projection");
    add(std::make_unique<PanelJob>(std::move(out)));
  }

  const float* zeros(int64_t floats) { return plan_.zeros_.emplace_back(static_cast<size_t>(floats), 0.0f).data(); }

  // Each worker's share of a step is a contiguous run of its jobs' units, of equal cost.
  void share_steps() {
    for (Step& step : plan_.steps_) {
      double total = 0.0;
      for (const auto& job : step.jobs) total += static_cast<double>(job->units) * job->unit_cost;
      double before = 0.0;
      for (const auto& job : step.jobs) {
        std::vector<int64_t> bounds;
        for (int64_t w = 0; w <= plan_.workers_; ++w) {
          const double target = total * static_cast<double>(w) / static_cast<double>(plan_.workers_) - before;
          const auto unit = static_cast<int64_t>(std::llround(target / job->unit_cost));
          bounds.push_back(std::clamp<int64_t>(unit, 0, job->units));
        }
        bounds.front() = 0;
        bounds.back() = job->units;
        step.bounds.push_back(std::move(bounds));
        before += static_cast<double>(job->units) * job->unit_cost;
        plan_.scratch_floats_ = std::max(plan_.scratch_floats_, job->scratch_floats());
      }
    }
    plan_.scratch_floats_ = round_up(plan_.scratch_floats_, kPanel) + kPanel;
  }

  // When each range of weights that worker w will read is fetched: as late as possible, kLead before its use, no
  // faster than kFetchRate. Time is counted in bytes of weights that tiles pass through.
  void fetch_ahead(size_t w) {
    struct Use {
      Stream::Range range;
      double time;
    };
    std::vector<Use> uses;
    std::vector<double> starts;
    double now = 0.0;
    for (Step& step : plan_.steps_) {
      step.ahead.resize(static_cast<size_t>(plan_.workers_));
      starts.push_back(now);
      for (size_t j = 0; j < step.jobs.size(); ++j) {
        const int64_t begin = step.bounds[j][w];
        const int64_t end = step.bounds[j][w + 1];
        const std::vector<Stream::Range> ranges = step.jobs[j]->weights(begin, end);
        const auto passes = static_cast<double>(step.jobs[j]->passes(begin, end));
        for (size_t r = 0; r < ranges.size(); ++r) {
          uses.push_back({ranges[r], now + passes * static_cast<double>(r) / static_cast<double>(ranges.size())});
        }
        now += passes;
      }
    }
    starts.push_back(now);
    double limit = now;
    size_t s = plan_.steps_.size();
    for (size_t i = uses.size(); i-- > 0;) {
      limit = std::min(limit, uses[i].time - kLead) - static_cast<double>(uses[i].range.bytes) / kFetchRate;
      if (limit < 0.0) break;
      while (s > 0 && (s == plan_.steps_.size() || starts[s] > limit)) --s;
      plan_.steps_[s].ahead[w].ranges.push_back(uses[i].range);
    }
    for (size_t i = 0; i < plan_.steps_.size(); ++i) {
      Step::Ahead& ahead = plan_.steps_[i].ahead[w];
      std::reverse(ahead.ranges.begin(), ahead.ranges.end());
      double bytes = 0.0;
      for (const Stream::Range& r : ahead.ranges) bytes += static_cast<double>(r.bytes);
      ahead.rate = std::min(1.0, bytes / std::max(1.0, starts[i + 1] - starts[i]));
    }
  }

  Plan& plan_;
  const Program& program_;
  const std::vector<PackedNode>& packed_;
  const Storage compute_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> offsets_;
  std::vector<Pads> pads_;
  std::vector<bool> needed_;
  std::vector<Group> groups_;
  ArenaLayout arena_;
  int64_t outputs_done_ = 0;
};

Plan::Plan(const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t workers,
           int64_t tag, Storage compute)
    : workers_(workers) {
  Planner(*this, program, packed, input, tag, compute);
}

void Plan::run(const Context& context, Barrier& barrier, int64_t begin, int64_t end, float* scratch) const {
  const bool timed = context.step_seconds && begin == 0;
  auto last_time = std::chrono::steady_clock::now();
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    const Step::Ahead& ahead = step.ahead[static_cast<size_t>(begin)];
    Worker worker{scratch, Stream(ahead.ranges.data(), ahead.ranges.data() + ahead.ranges.size(), ahead.rate)};
    for (size_t j = 0; j < step.jobs.size(); ++j) {
      const std::vector<int64_t>& bounds = step.bounds[j];
      const int64_t first = bounds[static_cast<size_t>(begin)];
      const int64_t last = bounds[static_cast<size_t>(end)];
      if (first < last) step.jobs[j]->run(context, first, last, worker);
    }
    barrier.arrive(end - begin);
    if (timed) {
      const auto now = std::chrono::steady_clock::now();
      context.step_seconds[s] += std::chrono::duration<double>(now - last_time).count();
      last_time = now;
    }
  }
}

Memory Plan::borrow() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      Memory memory = std::move(free_.back());
      free_.pop_back();
      return memory;
    }
  }
  const int64_t scratch_bytes = workers_ * scratch_floats_ * static_cast<int64_t>(sizeof(float));
  return Memory(static_cast<size_t>(arena_bytes_ + scratch_bytes));
}

void Plan::give_back(Memory memory) {
  // one arena per plan is kept; more exist only while calls overlap
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) free_.push_back(std::move(memory));
}

}  // namespace mnv4::engine
