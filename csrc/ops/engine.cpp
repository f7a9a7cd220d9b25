// mnv4_kernels::engine_create, engine_pack and engine_run: a whole network as one op.
#include "engine/engine.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <map>
#include <mutex>
#include <tuple>

#include "kernels/conv/conv.h"
#include "ops/common.h"
#include "ops/free.h"

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

void parallel_region(int64_t workers, const std::function<void(int64_t, int64_t)>& body) {
  if (workers == 1) return body(0, 1);
  torch::stable::parallel_for(0, workers, 1, body);
}

Tensor dense(const Tensor& array) {
  STD_TORCH_CHECK(storage_of(array, "arrays") == Storage::kFloat32, "`arrays` must be float32");
  return torch::stable::contiguous(array);
}

engine::Array borrow(const Tensor& dense) { return {static_cast<const float*>(dense.const_data_ptr()), dense.numel()}; }

int64_t engine_create(Tensor program, int64_t arrays, bool bfloat16) {
  STD_TORCH_CHECK(program.dim() == 2 && program.size(1) == engine::kFields && program.is_contiguous() &&
                      program.scalar_type() == torch::headeronly::ScalarType::Long,
                  "`program` must be a contiguous int64 tensor of ", engine::kFields, " columns, got ",
                  shape_text(program));
  std::string error;
  std::vector<engine::Node> nodes =
      engine::decode(static_cast<const int64_t*>(program.const_data_ptr()), program.size(0), arrays, &error);
  STD_TORCH_CHECK(error.empty() && !nodes.empty(), error.empty() ? "`program` must have nodes" : error);
  // without the instruction the caller's rounded weights are multiplied in float32
  const Storage compute = bfloat16 && gemm_has_bfloat16() ? Storage::kBfloat16 : Storage::kFloat32;
  return registry().add(std::make_shared<engine::Engine>(std::move(nodes), compute));
}

void engine_pack(int64_t handle, int64_t number, Tensor array) {
  const Tensor kept = dense(array);
  registry().find(handle)->pack(number, borrow(kept));
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

std::vector<Tensor> run(engine::Engine& engine, const Tensor& x, int64_t tag, bool nhwc) {
  const Source source(x, engine);
  const int64_t workers = torch::stable::get_num_threads();
  std::vector<Tensor> results;
  std::vector<float*> outputs;
  for (const engine::Shape& s : engine.output_shapes(source.shape, workers, tag)) {
    const IntList size = s.vector ? IntList{s.images, s.channels} : IntList{s.images, s.channels, s.height, s.width};
    results.push_back(fresh(size, torch::headeronly::ScalarType::Float, nhwc && !s.vector));
    outputs.push_back(floats(results.back()));
  }
  engine.run(source.shape, source.input, outputs, nhwc, workers, tag, parallel_region);
  return results;
}

std::vector<Tensor> engine_run(int64_t handle, Tensor x, int64_t tag) {
  return run(*registry().find(handle), x, tag, is_channels_last(x));
}

// "1 2 3;4 5 6" to nodes: a program as a string is a constant of an exported graph, which a tensor is not.
std::vector<engine::Node> parse(const std::string& program, int64_t arrays) {
  std::vector<int64_t> rows;
  const char* at = program.c_str();
  while (*at) {
    char* end = nullptr;
    rows.push_back(std::strtoll(at, &end, 10));
    STD_TORCH_CHECK(end != at && (*end == ' ' || *end == ';' || !*end), "`program` must be rows of integers, got \"",
                    program.substr(static_cast<size_t>(at - program.c_str()), 20), "\"");
    at = *end ? end + 1 : end;
  }
  const auto count = static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(count > 0 && count % engine::kFields == 0, "`program` must have rows of ", engine::kFields,
                  " integers, got ", count, " in all");
  std::string error;
  std::vector<engine::Node> nodes = engine::decode(rows.data(), count / engine::kFields, arrays, &error);
  STD_TORCH_CHECK(error.empty() && !nodes.empty(), error.empty() ? "`program` must have nodes" : error);
  return nodes;
}

constexpr int64_t kAnyArrays = int64_t{1} << 40;

Storage storage_for(bool bfloat16) { return bfloat16 ? Storage::kBfloat16 : Storage::kFloat32; }

int64_t program_bytes(std::string program, bool bfloat16) {
  return engine::Engine::packed_bytes({parse(program, kAnyArrays), {}}, storage_for(bfloat16));
}

Tensor program_pack(std::string program, std::vector<Tensor> arrays, bool bfloat16) {
  engine::Program built;
  for (Tensor& array : arrays) {
    array = dense(array);
    built.arrays.push_back(borrow(array));
  }
  built.nodes = parse(program, static_cast<int64_t>(arrays.size()));
  const Storage compute = storage_for(bfloat16);
  const int64_t bytes = engine::Engine::packed_bytes(built, compute);
  Tensor packed = fresh(IntList{bytes}, torch::headeronly::ScalarType::Byte);
  auto* to = static_cast<char*>(packed.mutable_data_ptr());
  std::fill_n(to, bytes, char{0});
  engine::Engine::pack(built, compute, to, torch::stable::get_num_threads(), parallel_region);
  return packed;
}

// Engines of programs whose weights are the caller's, by where those lie: what they hold is read anew in each run.
class Programs {
 public:
  std::shared_ptr<engine::Engine> find(const std::string& program, const Tensor& packed, bool bfloat16) {
    auto* weights = static_cast<char*>(packed.mutable_data_ptr());
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->weights != weights || it->bfloat16 != bfloat16 || it->program != program) continue;
      entries_.splice(entries_.begin(), entries_, it);
      return it->engine;
    }
    engine::Program nodes{parse(program, kAnyArrays), {}};
    const Storage compute = storage_for(bfloat16);
    const int64_t bytes = engine::Engine::packed_bytes(nodes, compute);
    STD_TORCH_CHECK(packed.scalar_type() == torch::headeronly::ScalarType::Byte && packed.is_contiguous() &&
                        packed.numel() == bytes,
                    "`packed` must be the ", bytes, " bytes that program_pack gives for `program`, got ",
                    shape_text(packed));
    auto made = std::make_shared<engine::Engine>(std::move(nodes.nodes), compute, weights);
    // bfloat16 weights are widened into a copy where the instruction is missing, which must not outlive a change
    if (bfloat16 && !gemm_has_bfloat16()) return made;
    entries_.push_front({program, weights, bfloat16, made});
    if (entries_.size() > kEngines) entries_.pop_back();
    return made;
  }

 private:
  static constexpr size_t kEngines = 16;
  struct Entry {
    std::string program;
    const char* weights;
    bool bfloat16;
    std::shared_ptr<engine::Engine> engine;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;
};

std::vector<Tensor> program_run(std::string program, Tensor packed, Tensor x, bool bfloat16, int64_t tag) {
  static auto* programs = new Programs();
  // an exported program says once and for all how its maps lie
  return run(*programs->find(program, packed, bfloat16), x, tag, false);
}

// (seconds [repeats, steps] float64, node of each step [steps] int64, "part|reason" of each step joined by ';')
std::tuple<Tensor, Tensor, std::string> engine_profile(int64_t handle, Tensor x, int64_t tag, int64_t repeats) {
  const std::shared_ptr<engine::Engine> engine = registry().find(handle);
  const Source source(x, *engine);
  const int64_t workers = torch::stable::get_num_threads();
  const engine::Engine::Profile profile =
      engine->profile(source.shape, source.input, workers, tag, repeats, parallel_region);
  const auto steps = static_cast<int64_t>(profile.steps.size());
  Tensor seconds = fresh(IntList{repeats, steps}, torch::headeronly::ScalarType::Double);
  Tensor nodes = fresh(IntList{steps}, torch::headeronly::ScalarType::Long);
  std::copy(profile.seconds.begin(), profile.seconds.end(), static_cast<double*>(seconds.mutable_data_ptr()));
  std::string parts;
  for (int64_t i = 0; i < steps; ++i) {
    const engine::Engine::Profile::What& what = profile.steps[static_cast<size_t>(i)];
    static_cast<int64_t*>(nodes.mutable_data_ptr())[i] = what.node;
    parts += (i ? ";" : "") + what.part + "|" + what.reason;
  }
  return {seconds, nodes, parts};
}

std::vector<Tensor> engine_arrays(int64_t handle) {
  std::vector<Tensor> results;
  for (const std::vector<float>& array : registry().find(handle)->arrays()) {
    results.push_back(fresh(IntList{static_cast<int64_t>(array.size())}, torch::headeronly::ScalarType::Float));
    std::copy(array.begin(), array.end(), floats(results.back()));
  }
  return results;
}

}  // namespace

// here and not in Python, where the other schemas are: a C++ program that runs an exported network has only this
STABLE_TORCH_LIBRARY_FRAGMENT(mnv4_kernels, m) {
  m.def("program_bytes(str program, bool bfloat16) -> int");
  m.def("program_pack(str program, Tensor[] arrays, bool bfloat16) -> Tensor");
  m.def("program_run(str program, Tensor packed, Tensor x, bool bfloat16, int tag) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CPU, m) {
  m.impl("engine_create", TORCH_BOX(&engine_create));
  m.impl("engine_pack", TORCH_BOX(&engine_pack));
  m.impl("engine_run", TORCH_BOX(&engine_run));
  m.impl("engine_profile", TORCH_BOX(&engine_profile));
  m.impl("program_pack", TORCH_BOX(&program_pack));
  m.impl("program_run", TORCH_BOX(&program_run));
}

STABLE_TORCH_LIBRARY_IMPL(mnv4_kernels, CompositeExplicitAutograd, m) {
  m.impl("engine_arrays", TORCH_BOX(&engine_arrays));
  m.impl("program_bytes", TORCH_BOX(&program_bytes));
}

}  // namespace mnv4::ops

namespace mnv4 {

void engine_free(int64_t handle) { ops::registry().remove(handle); }

}  // namespace mnv4
