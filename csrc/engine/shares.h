// Who does what of a plan's steps, and when its weights are brought near.
#pragma once

#include <vector>

#include "engine/job.h"

namespace mnv4::engine {

struct Step {
  int64_t node = 0;       // the program's node that it computes, or begins with
  const char* part = "";  // what of it
  std::string reason;     // why so, where the planner had a choice
  std::vector<std::unique_ptr<Job>> jobs;
  // [job][worker]: first unit of each worker's share, one more entry than workers
  std::vector<std::vector<int64_t>> bounds;
  // [worker] what each brings into its cache meanwhile
  struct Ahead {
    std::vector<Stream::Range> ranges;
    double rate = 0.0;
  };
  std::vector<Ahead> ahead;
};

// Whether workers share the rows of a product, and each reads all weights, or its panels, and each reads what the
// others wrote of the map and, by and by, of the result.
bool by_rows(int64_t rows, int64_t depth, int64_t columns, int64_t workers);

// Whether each worker keeps the same rows of a product's map and of the depthwise behind it, instead of panels: only
// where cores compute fast beside what another core's map takes.
bool keeps_rows(int64_t images, int64_t height, int64_t width, int64_t depth, int64_t columns, int64_t workers);

// Each worker's share of a step is a contiguous run of its jobs' units, of equal cost.
void share(std::vector<Step>& steps, int64_t workers);

// Each range of weights that a worker will read is fetched as late as possible before its use.
void fetch_ahead(std::vector<Step>& steps, int64_t workers);

}  // namespace mnv4::engine
