// How register tiles read their operands, over whichever Vec the including file chose.
#pragma once

#include "kernels/gemm/gemm.h"
#include "simd/stored.h"

namespace mnv4 {
namespace {

using simd::Vec;

// kGroup values of K at a time.
template <class T>
struct Operand;
template <>
struct Operand<float> {
  static constexpr Storage kStorage = Storage::kFloat32;
  static constexpr int kGroup = 1;
  using Packed = Vec;
  static MNV4_INLINE auto broadcast(const float* p) { return Vec::factor(p); }
  static MNV4_INLINE Packed load(const float* p) { return Vec::load(p); }
  template <class Factor>
  static MNV4_INLINE Vec multiply_add(Factor x, Packed w, Vec sum) {
    return fma(x, w, sum);
  }
};

}  // namespace
}  // namespace mnv4
