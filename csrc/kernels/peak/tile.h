// The loop of every float32 peak kernel, over the tier's Vec.
#pragma once

#include "kernels/peak/peak.h"

namespace mnv4 {
namespace {

// Independent sums: two multiply-adds a cycle with a latency of four or five need ten, the four of an Arm core sixteen,
// and all must be registers.
constexpr int kPeakSums = simd::Vec::kWidth == 4 ? 20 : 12;

float peak_f32(int64_t iterations) {
  using simd::Vec;
  // read at run time: nothing of the loop is a constant
  volatile float factor = 0.5f;
  const Vec a = Vec::broadcast(factor);
  const Vec b = Vec::broadcast(factor);
  Vec sum[kPeakSums];
  for (int i = 0; i < kPeakSums; ++i) sum[i] = Vec::broadcast(factor);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 32
    for (int i = 0; i < kPeakSums; ++i) sum[i] = fma(a, sum[i], b);
  }
  Vec total = sum[0];
  for (int i = 1; i < kPeakSums; ++i) total = total + sum[i];
  return reduce_add(total);
}

constexpr int64_t kPeakOperations = int64_t{2} * kPeakSums * simd::Vec::kWidth;

}  // namespace
}  // namespace mnv4
