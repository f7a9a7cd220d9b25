// Vectors in memory as float32 or bfloat16. Include after one of vec_*.h.
#pragma once

#include <cstring>

#include "kernels/storage.h"

namespace mnv4::simd {
namespace {

using Bf16 = uint16_t;

// Loads and stores of all of a vector's elements, or of the first n.
template <class T>
struct Stored;

template <>
struct Stored<float> {
  static constexpr Storage kStorage = Storage::kFloat32;
  static MNV4_INLINE Vec load(const float* p) { return Vec::load(p); }
  static MNV4_INLINE Vec load(const float* p, int n) { return Vec::load(p, n); }
  static MNV4_INLINE void store(float* p, Vec v) { v.store(p); }
  static MNV4_INLINE void store(float* p, Vec v, int n) { v.store(p, n); }
};

template <>
struct Stored<Bf16> {
  static constexpr Storage kStorage = Storage::kBfloat16;
  static MNV4_INLINE Vec load(const Bf16* p) { return Vec::load_bf16(p); }
  static MNV4_INLINE Vec load(const Bf16* p, int n) {
    Bf16 part[Vec::kWidth] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof *p);
    return Vec::load_bf16(part);
  }
  static MNV4_INLINE void store(Bf16* p, Vec v) { v.store_bf16(p); }
  static MNV4_INLINE void store(Bf16* p, Vec v, int n) {
    Bf16 part[Vec::kWidth];
    v.store_bf16(part);
    std::memcpy(p, part, static_cast<size_t>(n) * sizeof *p);
  }
};

}  // namespace
}  // namespace mnv4::simd
