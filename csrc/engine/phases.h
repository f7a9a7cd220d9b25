// In how many images at a time each part of a network runs.
#pragma once

#include <vector>

#include "engine/layout.h"

namespace mnv4::engine {

// No more images than this go through any part at once: weights read for so many no longer count.
inline constexpr int64_t kMostImages = 32;

// [node] Images that pass through a node at a time, never fewer than through an earlier one: at most `images`, a power
// of two or all of them. Early maps are large, so that few images at a time stay in the cache; late weights are large,
// so that many images should share each reading of them.
std::vector<int64_t> images_at_a_time(const Layout& layout, int64_t images, int64_t cache_bytes);

}  // namespace mnv4::engine
