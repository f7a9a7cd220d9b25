// Offsets of buffers in one arena: buffers that are alive at the same time never overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mnv4::engine {

class ArenaLayout {
 public:
  // Offset of `bytes` bytes that are written in step `first` and last read in step `last`, both included.
  int64_t place(int64_t bytes, int64_t first, int64_t last) {
    // whole cache lines, and one apart: neighbours of a power of two in size would share L1 sets
    constexpr int64_t kLine = 64;
    const int64_t size = (bytes + kLine - 1) / kLine * kLine + kLine;
    std::vector<Slot> alive;
    for (const Slot& s : slots_) {
      if (s.first <= last && first <= s.last) alive.push_back(s);
    }
    std::sort(alive.begin(), alive.end(), [](const Slot& a, const Slot& b) { return a.offset < b.offset; });
    int64_t offset = 0;
    for (const Slot& s : alive) {
      if (offset + size <= s.offset) break;
      offset = std::max(offset, s.offset + s.size);
    }
    slots_.push_back({offset, size, first, last});
    total_ = std::max(total_, offset + size);
    return offset;
  }
  int64_t total() const { return total_; }

 private:
  struct Slot {
    int64_t offset, size, first, last;
  };
  std::vector<Slot> slots_;
  int64_t total_ = 0;
};

}  // namespace mnv4::engine
