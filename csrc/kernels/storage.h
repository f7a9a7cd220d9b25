// How numbers are stored; sums are float32 whatever the storage.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnv4 {

enum class Storage { kFloat32, kBfloat16, kFloat16 };

inline constexpr int64_t storage_bytes(Storage type) { return type == Storage::kFloat32 ? 4 : 2; }

// p + n elements of `type`
inline const void* advance(const void* p, Storage type, int64_t n) {
  return static_cast<const char*>(p) + n * storage_bytes(type);
}
inline void* advance(void* p, Storage type, int64_t n) { return static_cast<char*>(p) + n * storage_bytes(type); }

}  // namespace mnv4
