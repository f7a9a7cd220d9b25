// mnv4_kernels::engine_create, engine_run and engine_free: a whole network as one op.
#include "engine/engine.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "kernels/conv/conv.h"
#include "ops/common.h"

namespace mnv4::ops {
namespace {

// Engines by handle. A handle is never reused, so that one kept after its engine's end is an error, not another model.
class Registry {
 public:
  int64_t add(std::shared_ptr<engine::Engine> engine) {
    const std::lock_guard<std::mutex> lock(mutex_);
    engines_[++last_] = std::move(engine);
    return last_;
  }
  std::shared_ptr<engine::Engine> find(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = engines_.find(handle);
    STD_TORCH_CHECK(it != engines_.end(), "`handle` must be that of a living engine, got ", handle);
    return it->second;
  }
  void remove(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    engines_.erase(handle);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<engine::Engine>> engines_;
  int64_t last_ = 0;
};

Registry& registry() {
  static auto* instance = new Registry();
  return *instance;
}

int64_t engine_create(Tensor program, std::vector<Tensor> arrays, bool bfloat16) {
  STD_TORCH_CHECK(program.dim() == 2 && program.size(1) == engine::kFields && program.is_contiguous() &&
                      program.scalar_type() == torch::headeronly::ScalarType::Long,
                  "`program` must be a contiguous int64 tensor of ", engine::kFields, " columns, got ",
                  shape_text(program));
  engine::Program built;
  std::vector<Tensor> kept;
  for (const Tensor& array : arrays) {
    STD_TORCH_CHECK(storage_of(array, "arrays") == Storage::kFloat32, "`arrays` must be float32");
    kept.push_back(torch::stable::contiguous(array));
    built.arrays.push_back({static_cast<const float*>(kept.back().const_data_ptr()), array.numel()});
  }
  std::string error;
  built.nodes = engine::decode(static_cast<const int64_t*>(program.const_data_ptr()), program.size(0),
                               static_cast<int64_t>(arrays.size()), &error);
  STD_TORCH_CHECK(error.empty() && !built.nodes.empty(), error.empty() ? "`program` must have nodes" : error);
  // without the instruction the caller's rounded weights are multiplied in float32
  const Storage compute = bfloat16 && gemm_has_bfloat16() ? Storage::kBfloat16 : Storage::kFloat32;
  return registry().add(std::make_shared<engine::Engine>(built, compute));
}

// The caller's tensor as the engine reads it; a view, but for low precision and many interleaved channels.
struct Source {
  engine::Shape shape;
  engine::Input input;
  OptionalTensor storage;

  Source(const Tensor& x, const engine::Engine& engine) {
    MNV4_CHECK_SHAPE(x.dim() == 4, x, "x", "have four dimensions [N, C, H, W]");
    MNV4_CHECK_SHAPE(x.size(1) == engine.channels(), x, "x", "have ", engine.channels(), " channels [N, C, H, W]");
    shape = {x.size(0), x.size(1), x.size(2), x.size(3)};
    if (storage_of(x, "x") == Storage::kFloat32 && conv_is_planar(x.size(1))) {
      input = {
          static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(1), kPanel, x.stride(2), x.stride(3)};
    } else {
      const Image nhwc = image(x, "x");
      storage = nhwc.storage;
      input = {nhwc.data, nhwc.n_stride, 1, kPanel, nhwc.row, nhwc.pixel};
    }
  }
};

void parallel_region(int64_t workers, const std::function<void(int64_t, int64_t)>& body) {
  if (workers == 1) return body(0, 1);
  torch::stable::parallel_for(0, workers, 1, body);
}

std::vector<Tensor> engine_run(int64_t handle, Tensor x, int64_t tag) {
  const std::shared_ptr<engine::Engine> engine = registry().find(handle);
  const Source source(x, *engine);
  const int64_t workers = torch::stable::get_num_threads();
  std::vector<Tensor> results;
  std::vector<float*> outputs;
  for (const engine::Shape& s : engine->output_shapes(source.shape, workers, tag)) {
    const IntList size = s.vector ? IntList{s.images, s.channels} : IntList{s.images, s.channels, s.height, s.width};
    results.push_back(torch::stable::empty(size, torch::headeronly::ScalarType::Float));
    outputs.push_back(floats(results.back()));
  }
  engine->run(source.shape, source.input, outputs, workers, tag, parallel_region);
  return results;
}

// (seconds [repeats, steps] float64, node of each step [steps] int64, parts of the steps joined by ';')
std::tuple<Tensor, Tensor, std::string> engine_profile(int64_t handle, Tensor x, int64_t tag, int64_t repeats) {
  const std::shared_ptr<engine::Engine> engine = registry().find(handle);
  const Source source(x, *engine);
  const int64_t workers = torch::stable::get_num_threads();
  const engine::Engine::Profile profile =
      engine->profile(source.shape, source.input, workers, tag, repeats, parallel_region);
  const auto steps = static_cast<int64_t>(profile.steps.size());
  Tensor seconds = torch::stable::empty(IntList{repeats, steps}, torch::headeronly::ScalarType::Double);
  Tensor nodes = torch::stable::empty(IntList{steps}, torch::headeronly::ScalarType::Long);
  std::copy(profile.seconds.begin(), profile.seconds.end(), static_cast<double*>(seconds.mutable_data_ptr()));
  std::string parts;
  for (int64_t i = 0; i < steps; ++i) {
    static_cast<int64_t*>(nodes.mutable_data_ptr())[i] = profile.steps[static_cast<size_t>(i)].first;
    parts += (i ? ";" : "") + profile.steps[static_cast<size_t>(i)].second;
  }
  return {seconds, nodes, parts};
}

void engine_free(int64_t handle) { registry().remove(handle); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("engine_create", TORCH_BOX(&engine_create));
  m.impl("engine_run", TORCH_BOX(&engine_run));
  m.impl("engine_profile", TORCH_BOX(&engine_profile));
}

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CompositeExplicitAutograd, m) {
  m.impl("engine_free", TORCH_BOX(&engine_free));
}

}  // namespace mnv4::ops
