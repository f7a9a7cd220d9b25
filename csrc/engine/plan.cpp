#include "engine/plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <utility>

#include "engine/arena.h"
#include "engine/layout.h"
#include "engine/phases.h"

namespace mnv4::engine {
namespace {

// Workers may wait this part of a fused step for the one with a panel more.
constexpr double kFusionImbalance = 0.06;

// One node alone, or a pointwise node and what runs on its panels, or a dense convolution and the readers of its rows.
struct Group {
  int64_t head = 0;
  int64_t rider = -1;       // depthwise or pool; behind a dense convolution another one
  int64_t projection = -1;  // pointwise, of a dense convolution's rows
  std::string reason;       // why it runs as it does, where there was a choice

  std::vector<int64_t> members() const {
    std::vector<int64_t> found{head};
    for (int64_t id : {rider, projection}) {
      if (id >= 0) found.push_back(id);
    }
    return found;
  }
};

// The part of a convolution kernel's arguments that a node holds.
template <class Args>
void set_window(Args& args, const Node& n, const Pads& pads) {
  args.kernel_h = static_cast<int>(n.kernel_h);
  args.kernel_w = static_cast<int>(n.kernel_w);
  args.stride_h = static_cast<int>(n.stride_h);
  args.stride_w = static_cast<int>(n.stride_w);
  args.pad_top = pads.top;
  args.pad_left = pads.left;
  args.dilation_h = static_cast<int>(n.dilation_h);
  args.dilation_w = static_cast<int>(n.dilation_w);
  args.act = n.activation();
}

}  // namespace

class Planner {
 public:
  Planner(Plan& plan, const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t tag,
          Storage compute, int64_t cache_bytes)
      : plan_(plan),
        packed_(packed),
        compute_(compute),
        layout_(program, input, tag, compute),
        images_(input.images),
        chunk_(images_at_a_time(layout_, input.images, cache_bytes)),
        place_(program.nodes.size()),
        offsets_(program.nodes.size()),
        output_(program.nodes.size(), 0),
        by_rows_(program.nodes.size(), false) {
    find_outputs();
    group_nodes();
    place_nodes();
    emit_phases();
    share(plan_.steps_, plan_.workers_);
    fetch_ahead(plan_.steps_, plan_.workers_);
    for (const Step& step : plan_.steps_) {
      for (const auto& job : step.jobs) plan_.scratch_floats_ = std::max(plan_.scratch_floats_, job->scratch_floats());
    }
    plan_.scratch_floats_ = round_up(plan_.scratch_floats_, kPanel) + kPanel;
    // a tile of the last map may read behind it
    plan_.arena_bytes_ = arena_.total() + kMatrixRows * kMatrixDepth * storage_bytes(Storage::kBfloat16);
  }

 private:
  const Node& node(int64_t id) const { return layout_.node(id); }
  const void* weight(int64_t id, size_t i) const { return packed_[static_cast<size_t>(id)].arrays[i]; }
  const float* array(int64_t id, size_t i) const { return static_cast<const float*>(weight(id, i)); }
  bool from_input(int64_t id) const { return node(id).what() == Kind::kInput && !layout_.input_needs_planes(); }
  int64_t chunk(const Group& group) const { return chunk_[static_cast<size_t>(group.head)]; }

  // Where a node's planes live, and for how many images: those of one turn of its phase, or of the whole batch where
  // another phase reads them.
  struct Place {
    int64_t offset = 0;
    bool whole = false;
  };

  // The planes of the images that the present turn computes.
  Planes planes(int64_t id) const {
    const Place& place = place_[static_cast<size_t>(id)];
    Planes p = layout_.planes(id, turn_images_, place.whole ? images_ : turn_images_);
    p.offset = place.offset + (place.whole ? first_image_ * p.image() * storage_bytes(p.type) : 0);
    return p;
  }

  void find_outputs() {
    for (int64_t id = 0; id < layout_.count(); ++id) {
      if (node(id).what() != Kind::kOutput || !layout_.needed(id)) continue;
      output_[static_cast<size_t>(id)] = static_cast<int64_t>(plan_.outputs_.size());
      plan_.outputs_.push_back(layout_.shape(id));
    }
  }

  // Panels shared evenly enough that a whole panel can be a unit.
  bool balanced(int64_t units) const {
    const double rounds = static_cast<double>(div_up(units, plan_.workers_) * plan_.workers_);
    return rounds / static_cast<double>(units) <= 1.0 + kFusionImbalance;
  }

  // In bfloat16 what stays unrounded for its rider is too large to leave L1.
  bool in_bands(int64_t id) const {
    const Shape& in = layout_.shape(node(id).input);
    const int64_t images = std::min(chunk_[static_cast<size_t>(id)], images_);
    return compute_ == Storage::kFloat32 &&
           keeps_rows(images, in.height, in.width, in.channels, layout_.shape(id).channels, plan_.workers_);
  }

  void group_nodes() {
    if (layout_.input_needs_planes()) groups_.push_back(Group{});
    std::string alone;  // why the coming node does not ride on the one before
    for (int64_t i = 1; i < layout_.count(); ++i) {
      if (!layout_.needed(i)) continue;
      Group group{i};
      group.reason = std::exchange(alone, "");
      const bool followed = i + 1 < layout_.count() && layout_.needed(i + 1) && node(i + 1).input == i;
      if (node(i).what() == Kind::kConv) {
        // Winograd's products make two rows at a time, which no ring asks for
        if (layout_.feeds_conv(i) && !packed_[static_cast<size_t>(i)].winograd) group.rider = ++i;
        if (layout_.feeds_projection(i)) group.projection = ++i;
        if (group.members().size() > 1) group.reason = "only the next one reads its rows, while they are in L1";
      } else if (followed && node(i).what() == Kind::kPointwise) {
        const Kind next = node(i + 1).what();
        const bool rides = next == Kind::kDepthwise || next == Kind::kPool;
        // a mean rides only on a result that nobody else reads
        const bool kept = next == Kind::kPool && !is_transient({i, i + 1});
        const int64_t panels = chunk(group) * div_up(layout_.shape(i).channels, kPanel);
        if (next == Kind::kDepthwise && in_bands(i)) {
          alone = "alone: each worker keeps its rows of the map";
        } else if (next == Kind::kDepthwise && layout_.outgrows_cache(i)) {
          alone = "alone: the rows before it are multiplied a few at a time, as all of them in terms outgrow L2";
        } else if (rides && !kept && balanced(panels)) {
          group.rider = ++i;
          group.reason = "the rider reads each panel before it leaves the cache";
        } else if (rides) {
          alone = kept ? "alone: others read the map, too"
                       : "alone: " + std::to_string(panels) + " panels can't be shared evenly by " +
                             std::to_string(plan_.workers_) + " workers";
        }
      }
      groups_.push_back(group);
    }
  }

  // A result that only its rider reads never leaves the worker's cache.
  bool is_transient(const Group& group) const { return group.rider >= 0 && layout_.feeds_rider(group.head); }

  // Whether a member's result has planes in the arena.
  bool has_planes(const Group& group, int64_t id) const {
    if (node(id).what() == Kind::kOutput) return false;
    if (node(group.head).what() == Kind::kConv) return id == group.members().back();
    return id != group.head || !is_transient(group);
  }

  // First group behind the phase of group g: groups of a phase take as many images at a time.
  size_t phase_end(size_t g) const {
    size_t end = g + 1;
    while (end < groups_.size() && chunk(groups_[end]) == chunk(groups_[g])) ++end;
    return end;
  }

  void place_nodes() {
    struct Life {
      int64_t phase = 0;  // first group of the phase that writes it
      int64_t born = 0;
      int64_t last = 0;
      bool whole = false;
    };
    std::vector<Life> lives(place_.size());
    size_t end = 0;
    size_t begin = 0;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (g == end) {
        begin = g;
        end = phase_end(g);
      }
      const auto now = static_cast<int64_t>(g);
      const auto phase = static_cast<int64_t>(begin);
      for (int64_t id : groups_[g].members()) {
        lives[static_cast<size_t>(id)] = {phase, now, now, false};
        for (int64_t source : {node(id).input, node(id).residual}) {
          if (source < 0) continue;
          Life& life = lives[static_cast<size_t>(source)];
          life.whole = life.whole || life.phase != phase;
          // a phase takes turns: what crosses its border lives as long as all of them
          life.last = life.phase != phase ? static_cast<int64_t>(end) - 1 : now;
        }
      }
    }
    for (const Group& group : groups_) {
      for (int64_t id : group.members()) {
        if (!has_planes(group, id)) continue;
        const Life& life = lives[static_cast<size_t>(id)];
        const int64_t images = life.whole ? images_ : std::min(chunk(group), images_);
        const int64_t bytes = layout_.planes(id, images, images).bytes();
        const int64_t offset = arena_.place(bytes, life.whole ? life.phase : life.born, life.last);
        place_[static_cast<size_t>(id)] = {offset, life.whole};
      }
    }
  }

  void emit_phases() {
    for (size_t begin = 0; begin < groups_.size(); begin = phase_end(begin)) {
      const int64_t turn = chunk(groups_[begin]);
      for (first_image_ = 0; first_image_ < images_; first_image_ += turn) {
        turn_images_ = std::min(turn, images_ - first_image_);
        for (size_t g = begin; g < phase_end(begin); ++g) {
          reason_ = groups_[g].reason;
          if (turn < images_) {
            reason_ += (reason_.empty() ? "" : ", ") + std::to_string(turn) + " images at a time stay within L2";
          }
          emit(groups_[g], static_cast<int64_t>(g));
        }
      }
    }
  }

  void add(std::unique_ptr<Job> job) { plan_.steps_.back().jobs.push_back(std::move(job)); }
  void step(int64_t id, const char* part) {
    plan_.steps_.emplace_back();
    plan_.steps_.back().node = id;
    plan_.steps_.back().part = part;
    plan_.steps_.back().reason = reason_;
  }

  Depthwise depthwise(int64_t id, const Pads& pads, const Planes& x, const Planes& y, const float* weight,
                      const float* bias) const {
    const Node& n = node(id);
    Depthwise dw;
    dw.args.height = x.height;
    dw.args.width = x.width;
    dw.args.out_height = y.height;
    dw.args.out_width = y.width;
    set_window(dw.args, n, pads);
    dw.weight = weight;
    dw.bias = bias;
    dw.reflect = static_cast<PadMode>(n.pad_mode) == PadMode::kReflect;
    dw.y = y;
    return dw;
  }

  // A product without a rider; tells whether its rows were shared.
  bool add_product(PanelJob::Spec spec) {
    const bool shared = by_rows(spec.x.images * spec.x.rows, spec.depth, spec.y.columns, plan_.workers_);
    spec.parts = shared ? plan_.workers_ : 1;
    for (; spec.part < spec.parts; ++spec.part) add(std::make_unique<PanelJob>(spec));
    return shared;
  }

  void add_product(const Matrix& x, const Matrix& y, const void* weight, const float* bias) {
    PanelJob::Spec spec;
    spec.x = x;
    spec.y = y;
    spec.depth = round_up(x.columns, kPanel);
    spec.weight = weight;
    spec.bias = bias;
    add_product(std::move(spec));
  }

  void emit(const Group& group, int64_t now) {
    const Node& n = node(group.head);
    switch (n.what()) {
      case Kind::kInput:
        step(group.head, "input");
        add(std::make_unique<InputJob>(planes(group.head), first_image_));
        break;
      case Kind::kConv:
        emit_conv(group);
        break;
      case Kind::kDepthwise: {
        step(group.head, "depthwise");
        const Planes x = planes(n.input);
        Depthwise dw = depthwise(group.head, layout_.pads(group.head), x, planes(group.head), array(group.head, 0),
                                 array(group.head, 1));
        // as its input was shared, so that most of what a worker reads it has written
        const int64_t parts = by_rows_[static_cast<size_t>(n.input)] ? plan_.workers_ : 1;
        by_rows_[static_cast<size_t>(group.head)] = parts > 1;
        for (int64_t part = 0; part < parts; ++part) add(std::make_unique<DepthwiseJob>(x, dw, part, parts));
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
        add(std::make_unique<OutputJob>(planes(n.input), output_[static_cast<size_t>(group.head)], first_image_));
        break;
    }
  }

  // Without x, y and their strides.
  ConvArgs conv_args(int64_t id) const {
    const Node& n = node(id);
    const Shape& in = layout_.shape(n.input);
    const Shape& out = layout_.shape(id);
    ConvArgs a{};
    a.channels = in.channels;
    a.height = in.height;
    a.width = in.width;
    a.weight = weight(id, 0);
    a.bias = array(id, 1);
    a.out_channels = out.channels;
    a.out_height = out.height;
    a.out_width = out.width;
    set_window(a, n, layout_.pads(id));
    a.pairs = packed_[static_cast<size_t>(id)].pairs;
    a.winograd = packed_[static_cast<size_t>(id)].winograd;
    return a;
  }

  void emit_conv(const Group& group) {
    ConvJob::Spec spec;
    spec.has_source = group.rider >= 0;
    const int64_t last = spec.has_source ? group.rider : group.head;
    const int64_t x = node(group.head).input;
    spec.args = conv_args(last);
    if (spec.has_source) spec.source = conv_args(group.head);
    spec.from_input = from_input(x);
    if (!spec.from_input) spec.x = planes(x);
    spec.first_image = first_image_;
    spec.y = planes(last);
    if (group.projection >= 0) {
      const Node& n = node(group.projection);
      ConvJob::Projection& p = spec.projection.emplace();
      p.weight = weight(group.projection, 0);
      p.bias = array(group.projection, 1);
      p.act = n.activation();
      p.y = planes(group.projection);
      if (n.residual >= 0) p.residual = planes(n.residual);
    }
    const char* parts[] = {"conv", "conv+conv", "conv+pointwise", "conv+conv+pointwise"};
    step(group.head, parts[(spec.has_source ? 1 : 0) + (spec.projection ? 2 : 0)]);
    by_rows_[static_cast<size_t>(group.members().back())] = true;
    add(std::make_unique<ConvJob>(std::move(spec)));
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
      spec.dw = depthwise(group.rider, layout_.pads(group.rider), planes(group.head), planes(group.rider),
                          array(group.rider, 0), array(group.rider, 1));
    } else if (group.rider >= 0) {
      spec.mean = true;
      spec.mean_y = planes(group.rider);
    }
    const char* rider = group.rider < 0 ? "pointwise" : spec.mean ? "pointwise+pool" : "pointwise+depthwise";
    step(group.head, rider);
    if (group.rider >= 0) {
      add(std::make_unique<PanelJob>(std::move(spec)));
    } else {
      by_rows_[static_cast<size_t>(group.head)] = add_product(std::move(spec));
    }
  }

  void emit_attention(int64_t id, int64_t now) {
    const Node& n = node(id);
    const Planes x = planes(n.input);
    const Matrix rows = Matrix::of(x);
    const int64_t images = x.images;
    const bool downsampled = n.kernel_h > 0;
    // later turns use the first one's buffers
    std::vector<int64_t>& offsets = offsets_[static_cast<size_t>(id)];
    size_t used = 0;
    const auto place = [&](int64_t bytes) {
      if (used == offsets.size()) offsets.push_back(arena_.place(bytes, now, now));
      return offsets[used++];
    };
    // each product's bias is behind its weight
    enum : size_t {
      kScale,
      kShift,
      kQuery,
      kKeyDown = kQuery + 2,
      kKeyShift,
      kKey,
      kValueDown = kKey + 2,
      kValueShift,
      kValue,
      kOut = kValue + 2
    };

    // pairs of K; scores and softmax stay float32, for their rounding is amplified
    const Storage type = n.key_dim % 2 ? Storage::kFloat32 : compute_;
    Matrix query = Matrix::row_major(type, images, x.pixels(), n.heads * n.key_dim);
    query.offset = place(query.bytes());
    step(id, downsampled ? "query, downsample" : "query, key, value");
    add_product(rows, query, weight(id, kQuery), array(id, kQuery + 1));

    Matrix key_source = rows;
    Matrix value_source = rows;
    if (downsampled) {
      Pads pads;
      const Shape small = layout_.downsampled(id, &pads);
      Planes down = x;
      down.height = small.height;
      down.width = small.width;
      if (down.paired()) down.paired_images = images;
      Planes key_down = down, value_down = down;
      key_down.offset = place(down.bytes());
      value_down.offset = place(down.bytes());
      add(std::make_unique<DownsampleJob>(
          x, array(id, kScale), array(id, kShift),
          depthwise(id, pads, x, key_down, array(id, kKeyDown), array(id, kKeyShift)),
          depthwise(id, pads, x, value_down, array(id, kValueDown), array(id, kValueShift))));
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
    add_product(key_source, key, weight(id, kKey), array(id, kKey + 1));
    add_product(value_source, Matrix::of(value), weight(id, kValue), array(id, kValue + 1));

    Matrix key_panels = Matrix::row_major(type, images, round_up(positions, kPanel), n.key_dim);
    key_panels.offset = place(key_panels.bytes());
    step(id, "key panels");
    add(std::make_unique<KeyPanelsJob>(key, key_panels));
    Matrix value_panels = Matrix::of(value);
    if (type != Storage::kFloat32) {
      value_panels = Matrix::row_major(type, images, mixed_positions(type, positions), value.blocks() * kPanel);
      value_panels.offset = place(value_panels.bytes());
      add(std::make_unique<ValuePairsJob>(value, value_panels));
    }

    Matrix mixed = Matrix::row_major(compute_, images, x.pixels(), n.heads * n.value_dim);
    mixed.offset = place(mixed.bytes());
    AttentionArgs args{};
    args.positions = positions;
    args.key_dim = n.key_dim;
    args.value_dim = n.value_dim;
    args.scale = 1.0f / std::sqrt(static_cast<float>(n.key_dim));
    args.zeros = zeros(round_up(std::max(positions, n.value_dim), kPanel));
    step(id, "attention");
    add(std::make_unique<AttentionJob>(args, x.pixels() * n.heads, query, key_panels, value_panels, mixed));

    PanelJob::Spec out;
    out.x = mixed;
    out.y = Matrix::of(planes(id));
    out.depth = round_up(mixed.columns, kPanel);
    out.weight = weight(id, kOut);
    out.bias = array(id, kOut + 1);
    if (n.residual >= 0) {
      out.has_residual = true;
      out.residual = Matrix::of(planes(n.residual));
    }
    step(id, "output projection");
    by_rows_[static_cast<size_t>(id)] = add_product(std::move(out));
  }

  const float* zeros(int64_t floats) { return plan_.zeros_.emplace_back(static_cast<size_t>(floats), 0.0f).data(); }

  Plan& plan_;
  const std::vector<PackedNode>& packed_;
  const Storage compute_;
  const Layout layout_;
  const int64_t images_;
  const std::vector<int64_t> chunk_;
  std::vector<Place> place_;
  std::vector<std::vector<int64_t>> offsets_;  // [attention][buffer]
  std::vector<int64_t> output_;
  // [node] whether workers have shared the rows of its map, else its channels
  std::vector<bool> by_rows_;
  std::vector<Group> groups_;
  ArenaLayout arena_;
  // the turn that is being emitted
  int64_t first_image_ = 0;
  int64_t turn_images_ = 0;
  std::string reason_;
};

Plan::Plan(const Program& program, const std::vector<PackedNode>& packed, const Shape& input, int64_t workers,
           int64_t tag, Storage compute, int64_t cache_bytes)
    : workers_(workers) {
  Planner(*this, program, packed, input, tag, compute, cache_bytes);
}

void Plan::prepare(Team& team, size_t step, int64_t begin, int64_t end) const {
  if (step >= steps_.size()) return;
  for (size_t j = 0; j < steps_[step].jobs.size(); ++j) {
    const std::vector<int64_t>& bounds = steps_[step].bounds[j];
    for (int64_t w = begin; w < end; ++w) {
      team.queue(step, j, w).reset(bounds[static_cast<size_t>(w)], bounds[static_cast<size_t>(w) + 1]);
    }
  }
}

int64_t Plan::most_jobs() const {
  size_t jobs = 0;
  for (const Step& step : steps_) jobs = std::max(jobs, step.jobs.size());
  return static_cast<int64_t>(jobs);
}

void Plan::run(const Context& context, Team& team, int64_t begin, int64_t end, float* scratch) const {
  const bool timed = context.step_seconds && begin == 0;
  auto last_time = std::chrono::steady_clock::now();
  const MatrixSession session;
  prepare(team, 0, begin, end);
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    const Step::Ahead& ahead = step.ahead[static_cast<size_t>(begin)];
    Worker worker{scratch, Stream(ahead.ranges.data(), ahead.ranges.data() + ahead.ranges.size(), ahead.rate)};
    int64_t first = 0;
    int64_t last = 0;
    const auto run_units = [&](const Job& job) {
      // another job's scratch
      if (worker.packed != &job) worker.packed = nullptr;
      job.run(context, first, last, worker);
    };
    for (size_t j = 0; j < step.jobs.size(); ++j) {
      const Job& job = *step.jobs[j];
      // who is alone has nobody to leave units to
      const int64_t grain = team.workers() == 1 ? std::max<int64_t>(1, job.units) : job.grain();
      for (int64_t w = begin; w < end; ++w) {
        while (team.queue(s, j, w).take_front(grain, &first, &last)) run_units(job);
      }
    }
    // a core that other work disturbs, or a slower one, must not hold up the rest
    for (int64_t i = end; i < begin + team.workers(); ++i) {
      for (size_t j = 0; j < step.jobs.size(); ++j) {
        const Job& job = *step.jobs[j];
        Queue& queue = team.queue(s, j, i % team.workers());
        while (queue.take_back(job.grain(), &first, &last)) run_units(job);
      }
    }
    // nobody looks at the next step's queues before the barrier opens
    prepare(team, s + 1, begin, end);
    team.barrier.arrive(end - begin);
    if (timed) {
      const auto now = std::chrono::steady_clock::now();
      context.step_seconds[s] += std::chrono::duration<double>(now - last_time).count();
      last_time = now;
    }
  }
}

Memory Plan::borrow(int64_t teams) {
  const auto bytes = static_cast<size_t>(teams * team_bytes());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty() && free_.back().bytes() >= bytes) {
      Memory memory = std::move(free_.back());
      free_.pop_back();
      return memory;
    }
  }
  return Memory(bytes);
}

void Plan::give_back(Memory memory) {
  // one call's memory per plan is kept; more exists only while calls overlap
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!free_.empty() && free_.back().bytes() < memory.bytes()) free_.clear();
  if (free_.empty()) free_.push_back(std::move(memory));
}

}  // namespace mnv4::engine
