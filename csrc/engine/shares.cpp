#include "engine/shares.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/features.h"

namespace mnv4::engine {
namespace {

// Weights are fetched this long before they are used, and no faster than this, in bytes that tiles pass through (a core
// does about 16 GB/s of them).
constexpr double kLead = 64 << 10;
constexpr double kFetchRate = 0.5;

// What another core's part of a map costs beside as many weights, which are fetched ahead, where a core does two
// multiply-adds of 512 bits a cycle, as those with a matrix unit do. For others the larger operand decides.
constexpr double kFarMap = 3.3;

// Rows of a map for each worker from which it pays to read the neighbours' at its edges.
constexpr int64_t kLeastBand = 4;

// Bytes that are fetched for products that memory bounds, which are the last ones: where a fetch takes the time of a
// multiply-add only what L2 keeps until then, else all, which at least arrives in the last level.
double most_late() {
  return gemm_kernel().fetches ? std::numeric_limits<double>::infinity()
                               : static_cast<double>(cpu::cache_sizes().l2) / 2.0;
}

void fetch_ahead_of(std::vector<Step>& steps, size_t worker) {
  struct Use {
    Stream::Range range;
    double time;
  };
  std::vector<Use> uses;
  std::vector<double> starts;
  double now = 0.0;
  // what is used in no time, by products that memory bounds, is fetched from the last such product to the first
  size_t timeless = 0;
  for (Step& step : steps) {
    starts.push_back(now);
    for (size_t j = 0; j < step.jobs.size(); ++j) {
      const int64_t begin = step.bounds[j][worker];
      const int64_t end = step.bounds[j][worker + 1];
      const std::vector<Stream::Range> ranges = step.jobs[j]->weights(begin, end);
      const auto passes = static_cast<double>(step.jobs[j]->passes(begin, end));
      for (size_t r = 0; r < ranges.size(); ++r) {
        const double time = now + passes * static_cast<double>(r) / static_cast<double>(ranges.size());
        const size_t place = passes > 0.0 ? uses.size() : timeless + r;
        uses.insert(uses.begin() + static_cast<ptrdiff_t>(place), {ranges[r], time});
      }
      if (passes > 0.0) timeless = uses.size();
      now += passes;
    }
  }
  starts.push_back(now);

  double limit = now;
  double late = 0.0;
  size_t s = steps.size();
  for (size_t i = uses.size(); i-- > 0;) {
    if (i >= timeless && (late += static_cast<double>(uses[i].range.bytes)) > most_late()) continue;
    limit = std::min(limit, uses[i].time - kLead) - static_cast<double>(uses[i].range.bytes) / kFetchRate;
    if (limit < 0.0) break;
    while (s > 0 && (s == steps.size() || starts[s] > limit)) --s;
    steps[s].ahead[worker].ranges.push_back(uses[i].range);
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    Step::Ahead& ahead = steps[i].ahead[worker];
    std::reverse(ahead.ranges.begin(), ahead.ranges.end());
    double bytes = 0.0;
    for (const Stream::Range& r : ahead.ranges) bytes += static_cast<double>(r.bytes);
    ahead.rate = std::min(1.0, bytes / std::max(1.0, starts[i + 1] - starts[i]));
  }
}

}  // namespace

bool by_rows(int64_t rows, int64_t depth, int64_t columns, int64_t workers) {
  if (!gemm_has_matrix_unit()) return rows > columns;
  const auto maps = static_cast<double>(rows * depth + rows * columns / workers);
  return kFarMap * maps > static_cast<double>(depth * columns);
}

bool keeps_rows(int64_t images, int64_t height, int64_t width, int64_t depth, int64_t columns, int64_t workers) {
  return gemm_has_matrix_unit() && workers > 1 && height >= workers * kLeastBand &&
         by_rows(images * height * width, depth, columns, workers);
}

void share(std::vector<Step>& steps, int64_t workers) {
  for (Step& step : steps) {
    double total = 0.0;
    for (const auto& job : step.jobs) total += static_cast<double>(job->units) * job->unit_cost;
    double before = 0.0;
    for (const auto& job : step.jobs) {
      std::vector<int64_t> bounds;
      for (int64_t w = 0; w <= workers; ++w) {
        const double target = total * static_cast<double>(w) / static_cast<double>(workers) - before;
        const auto unit = static_cast<int64_t>(std::llround(target / job->unit_cost));
        bounds.push_back(std::clamp<int64_t>(unit, 0, job->units));
      }
      bounds.front() = 0;
      bounds.back() = job->units;
      step.bounds.push_back(std::move(bounds));
      before += static_cast<double>(job->units) * job->unit_cost;
    }
  }
}

void fetch_ahead(std::vector<Step>& steps, int64_t workers) {
  for (Step& step : steps) step.ahead.resize(static_cast<size_t>(workers));
  // beside tiles' loads these fetches only take the buffers that lines arrive in
  if (gemm_has_matrix_unit()) return;
  for (int64_t w = 0; w < workers; ++w) fetch_ahead_of(steps, static_cast<size_t>(w));
}

}  // namespace mnv4::engine
