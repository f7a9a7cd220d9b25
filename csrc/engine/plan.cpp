#include "engine/plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "engine/arena.h"

namespace mnv4::engine {
namespace {

// Workers may wait this part of a fused step for the one with a panel more.
constexpr double kFusionImbalance = 0.06;

// One node alone, or a pointwise node and what runs on its panels.
struct Group {
  int64_t head = 0;
  int64_t rider = -1;  // depthwise or pool
};

Planes planes_like(const Shape& s) { return {0, s.images, s.channels, s.height, s.width}; }

}  // namespace

class Planner {
 public:
  Planner(Plan& plan, const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t tag)
      : plan_(plan),
        program_(program),
        packed_(packed),
        gemm_(gemm_kernel()),
        dwconv_(dwconv_kernel()),
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
    plan_.arena_floats_ = arena_.total();
  }

 private:
  struct Pads {
    int top = 0, left = 0;
  };

  const Node& node(int64_t id) const { return program_.nodes[static_cast<size_t>(id)]; }
  const Shape& shape(int64_t id) const { return shapes_[static_cast<size_t>(id)]; }
  const float* array(int64_t id, size_t i) const { return packed_[static_cast<size_t>(id)].arrays[i]; }
  bool from_input(int64_t id) const { return node(id).what() == Kind::kInput && !input_needs_planes(); }

  Planes planes(int64_t id) const {
    Planes p = planes_like(shape(id));
    p.offset = offsets_[static_cast<size_t>(id)];
    return p;
  }

  static int64_t axis(int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after, int64_t dilation) {
    return (size + before + after - dilation * (kernel - 1) - 1) / stride + 1;
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
        if (rides && balanced(s.images * div_up(s.channels, kPanel))) group.rider = ++i;
      }
      groups_.push_back(group);
    }
  }

  // A pointwise result that only its rider reads never leaves the worker's cache.
  bool is_transient(const Group& group) const {
    if (group.rider < 0) return false;
    for (int64_t i = group.rider; i < static_cast<int64_t>(program_.nodes.size()); ++i) {
      if (!needed(i)) continue;
      if (i > group.rider && node(i).input == group.head) return false;
      if (node(i).residual == group.head) return false;
    }
    return true;
  }

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
        offsets_[i] = arena_.place(planes_like(shapes_[i]).floats(), born[i], last[i]);
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

  std::unique_ptr<Job> product(const Matrix& x, const Matrix& y, const float* weight, const float* bias,
                               Activation act) const {
    PanelJob::Spec spec;
    spec.x = x;
    spec.y = y;
    spec.depth = round_up(x.columns, kPanel);
    spec.weight = weight;
    spec.bias = bias;
    spec.act = act;
    return std::make_unique<PanelJob>(gemm_, std::move(spec));
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
        add(std::make_unique<DepthwiseJob>(dwconv_, x, std::move(dw)));
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
        add(std::make_unique<MeanJob>(planes(n.input), Matrix::of(planes(group.head))));
        break;
      case Kind::kLinear:
        step(group.head, "linear");
        add(std::make_unique<LinearJob>(gemm_, Matrix::of(planes(n.input)), Matrix::of(planes(group.head)),
                                        array(group.head, 0), round_up(shape(n.input).channels, kPanel),
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
    a.weight = array(id, 0);
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
    add(std::make_unique<ConvJob>(gemm_, a, y, external, external ? Planes{} : planes(n.input)));
  }

  void emit_pointwise(const Group& group) {
    const Node& n = node(group.head);
    PanelJob::Spec spec;
    spec.x = Matrix::of(planes(n.input));
    spec.y = Matrix::of(planes(group.head));
    spec.keep_y = !is_transient(group);
    spec.depth = round_up(spec.x.columns, kPanel);
    spec.weight = array(group.head, 0);
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
      spec.mean_y = Matrix::of(planes(group.rider));
    }
    const char* rider = group.rider < 0 ? "pointwise" : spec.mean ? "pointwise+pool" : "pointwise+depthwise";
    step(group.head, rider);
    add(std::make_unique<PanelJob>(gemm_, std::move(spec)));
  }

  void emit_attention(int64_t id, int64_t now) {
    const Node& n = node(id);
    const Planes x = planes(n.input);
    const Matrix rows = Matrix::of(x);
    const int64_t images = x.images;
    const bool downsampled = n.kernel_h > 0;
    const auto place = [&](int64_t floats) { return arena_.place(floats, now, now); };
    enum : size_t { kScale, kShift, kQuery, kQueryBias, kKeyDown, kKeyShift, kKey, kKeyBias, kValueDown, kValueShift,
                    kValue, kValueBias, kOut, kOutBias };

    Matrix query = Matrix::row_major(images, x.pixels(), n.heads * n.key_dim);
    query.offset = place(query.floats());
    step(id, downsampled ? "query, downsample" : "query, key, value");
    add(product(rows, query, array(id, kQuery), array(id, kQueryBias), Activation::kNone));

    Matrix key_source = rows;
    Matrix value_source = rows;
    if (downsampled) {
      Planes down = x;
      down.height = axis(x.height, n.kernel_h, n.stride_h, n.pad_top, n.pad_bottom, n.dilation_h);
      down.width = axis(x.width, n.kernel_w, n.stride_w, n.pad_left, n.pad_right, n.dilation_w);
      pads_[static_cast<size_t>(id)] = {static_cast<int>(n.pad_top), static_cast<int>(n.pad_left)};
      if (static_cast<PadMode>(n.pad_mode) == PadMode::kSame) {
        down.height = div_up(x.height, n.stride_h);
        down.width = div_up(x.width, n.stride_w);
        pads_[static_cast<size_t>(id)] = {
            static_cast<int>(same_pads(x.height, n.kernel_h, n.stride_h, n.dilation_h) / 2),
            static_cast<int>(same_pads(x.width, n.kernel_w, n.stride_w, n.dilation_w) / 2)};
      }
      Planes key_down = down, value_down = down;
      key_down.offset = place(down.floats());
      value_down.offset = place(down.floats());
      add(std::make_unique<DownsampleJob>(
          dwconv_, x, array(id, kScale), array(id, kShift),
          depthwise(id, x, key_down, array(id, kKeyDown), array(id, kKeyShift)),
          depthwise(id, x, value_down, array(id, kValueDown), array(id, kValueShift))));
      key_source = Matrix::of(key_down);
      value_source = Matrix::of(value_down);
      step(id, "key, value");
    }
    const int64_t positions = key_source.rows;
    Matrix key = Matrix::row_major(images, positions, n.key_dim);
    key.offset = place(key.floats());
    // value planes are what attention's second product reads as packed panels
    Planes value{0, images, n.value_dim, positions, 1};
    value.offset = place(value.floats());
    add(product(key_source, key, array(id, kKey), array(id, kKeyBias), Activation::kNone));
    add(product(value_source, Matrix::of(value), array(id, kValue), array(id, kValueBias), Activation::kNone));

    const int64_t key_panels = place(images * round_up(positions, kPanel) * n.key_dim);
    step(id, "key panels");
    add(std::make_unique<KeyPanelsJob>(key, n.key_dim, key_panels));

    Matrix mixed = Matrix::row_major(images, x.pixels(), n.heads * n.value_dim);
    mixed.offset = place(mixed.floats());
    AttentionArgs args{};
    args.positions = positions;
    args.key_dim = n.key_dim;
    args.value_dim = n.value_dim;
    args.scale = 1.0f / std::sqrt(static_cast<float>(n.key_dim));
    args.zeros = zeros();
    step(id, "attention");
    add(std::make_unique<AttentionJob>(gemm_, args, images, x.pixels() * n.heads, query.offset, key_panels,
                                       value.offset, mixed.offset));

    PanelJob::Spec out;
    out.x = mixed;
    out.y = Matrix::of(planes(id));
    out.depth = round_up(mixed.columns, kPanel);
    out.weight = array(id, kOut);
    out.bias = array(id, kOutBias);
    if (n.residual >= 0) {
      out.has_residual = true;
      out.residual = Matrix::of(planes(n.residual));
    }
    step(id, "output projection");
    add(std::make_unique<PanelJob>(gemm_, std::move(out)));
  }

  const float* zeros() {
    // reserved once for the largest: earlier pointers must stay
    if (plan_.zeros_.empty()) {
      int64_t most = kPanel;
      for (size_t i = 0; i < shapes_.size(); ++i) {
        const Node& n = program_.nodes[i];
        most = std::max({most, n.value_dim, shapes_[i].height * shapes_[i].width});
      }
      plan_.zeros_.assign(static_cast<size_t>(round_up(most, kPanel)), 0.0f);
    }
    return plan_.zeros_.data();
  }

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

  Plan& plan_;
  const Program& program_;
  const std::vector<PackedNode>& packed_;
  const GemmKernel& gemm_;
  const DwconvKernel& dwconv_;
  std::vector<Shape> shapes_;
  std::vector<int64_t> offsets_;
  std::vector<Pads> pads_;
  std::vector<bool> needed_;
  std::vector<Group> groups_;
  ArenaLayout arena_;
  int64_t outputs_done_ = 0;
};

Plan::Plan(const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t workers,
           int64_t tag)
    : workers_(workers) {
  Planner(*this, program, packed, input, tag);
}

void Plan::run(const Context& context, Barrier& barrier, int64_t begin, int64_t end, float* scratch) const {
  const bool timed = context.step_seconds && begin == 0;
  auto last_time = std::chrono::steady_clock::now();
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    for (size_t j = 0; j < step.jobs.size(); ++j) {
      const std::vector<int64_t>& bounds = step.bounds[j];
      const int64_t first = bounds[static_cast<size_t>(begin)];
      const int64_t last = bounds[static_cast<size_t>(end)];
      if (first < last) step.jobs[j]->run(context, first, last, scratch);
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
  const int64_t floats = arena_floats_ + workers_ * scratch_floats_;
  return Memory(static_cast<size_t>(floats) * sizeof(float));
}

void Plan::give_back(Memory memory) {
  // one arena per plan is kept; more exist only while calls overlap
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) free_.push_back(std::move(memory));
}

}  // namespace mnv4::engine
