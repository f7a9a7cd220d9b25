#include <immintrin.h>

#include "kernels/peak/peak.h"

namespace mnv4 {
namespace {

// as in tile.h
constexpr int kPeakSums = 12;

// vdpbf16ps: 32 bfloat16 multiply-adds into 16 float32 sums
float peak_bf16(int64_t iterations) {
  volatile float factor = 0.5f;
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  __m512 sum[kPeakSums];
  for (int i = 0; i < kPeakSums; ++i) sum[i] = _mm512_set1_ps(factor);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kPeakSums; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
  }
  __m512 total = sum[0];
  for (int i = 1; i < kPeakSums; ++i) total = _mm512_add_ps(total, sum[i]);
  return _mm512_reduce_add_ps(total);
}

}  // namespace

extern const PeakKernel peak_bf16_avx512bf16 = {"peak_bf16_avx512bf16", int64_t{2} * 32 * kPeakSums, peak_bf16};

}  // namespace mnv4
