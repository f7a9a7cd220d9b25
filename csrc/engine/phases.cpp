#include "engine/phases.h"

#include <algorithm>

namespace mnv4::engine {

std::vector<int64_t> images_at_a_time(const Layout& layout, int64_t images, int64_t cache_bytes) {
  std::vector<int64_t> chunk(static_cast<size_t>(layout.count()), images);
  int64_t least = std::min(images, kMostImages);
  for (int64_t id = layout.count() - 1; id >= 0; --id) {
    if (layout.needed(id)) {
      const Node& n = layout.node(id);
      // what is consumed at once stays with the worker: its source counts instead
      const auto passes = [&](int64_t node) {
        return layout.feeds_rider(node) || layout.feeds_conv(node) || layout.feeds_projection(node);
      };
      int64_t bytes = passes(id) ? 0 : layout.image_bytes(id);
      for (int64_t source : {n.input, n.residual}) {
        while (source > 0 && passes(source)) source = layout.node(source).input;
        if (source > 0) bytes += layout.image_bytes(source);
      }
      int64_t fit = 1;
      while (fit < least && 2 * fit * bytes <= cache_bytes) fit *= 2;
      least = std::min(least, fit);
    }
    chunk[static_cast<size_t>(id)] = least;
  }
  return chunk;
}

}  // namespace mnv4::engine
