// 8 floats in one AVX2 register, with FMA and F16C. Only included by *_avx2.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mnv4::simd {
namespace {

#define MNV4_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;

  static MNV4_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static MNV4_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  // one float as a factor of every lane
  static MNV4_INLINE Vec factor(const float* p) { return broadcast(*p); }
  static MNV4_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static MNV4_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  static MNV4_INLINE Vec load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static MNV4_INLINE Vec load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  MNV4_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  // a Zen 3 takes many times as long for a masked store
  MNV4_INLINE void store(float* p, int n) const { n == kWidth ? store(p) : _mm256_maskstore_ps(p, mask(n), v); }
  // sum[i] += lane i
  MNV4_INLINE void add_to(double* sum) const {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), low));
    _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), high));
  }
  MNV4_INLINE void store_bf16(uint16_t* p) const {
    // round to nearest even; NaN keeps a set mantissa bit
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  // p[3 i + c] is lane i of a, b and c
  static MNV4_INLINE void store_bf16_triples(uint16_t* p, Vec a, Vec b, Vec c) {
    uint16_t rounded[3][kWidth];
    a.store_bf16(rounded[0]);
    b.store_bf16(rounded[1]);
    c.store_bf16(rounded[2]);
    for (int i = 0; i < 3 * kWidth; ++i) p[i] = rounded[i % 3][i / 3];
  }
  MNV4_INLINE void store_f16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static MNV4_INLINE __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

MNV4_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
MNV4_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
MNV4_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
MNV4_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// a * b + c
MNV4_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// sum[i] += *x * w[i]
MNV4_INLINE void multiply_add(const float* x, const Vec (&w)[2], Vec (&sum)[2]) {
  __m256 factor;
  asm("vbroadcastss %[x], %[factor]\n\tvfmadd231ps %[factor], %[w0], %[sum0]\n\tvfmadd231ps %[factor], %[w1], %[sum1]"
      : [factor] "=&x"(factor), [sum0] "+x"(sum[0].v), [sum1] "+x"(sum[1].v)
      : [x] "m"(*x), [w0] "x"(w[0].v), [w1] "x"(w[1].v));
}
// sum[r] += x[r] * w of 8 values, for 1 to 3 rows
MNV4_INLINE void multiply_add(Vec x, const float* w, Vec& sum) {
  __m256 weights;
  asm("vmovups %[w], %[weights]\n\tvfmadd231ps %[weights], %[x], %[sum]"
      : [weights] "=&x"(weights), [sum] "+x"(sum.v)
      : [w] "m"(*reinterpret_cast<const __m256_u*>(w)), [x] "x"(x.v));
}
MNV4_INLINE void multiply_add(Vec x0, Vec x1, const float* w, Vec& sum0, Vec& sum1) {
  __m256 weights;
  asm("vmovups %[w], %[weights]\n\tvfmadd231ps %[weights], %[x0], %[sum0]\n\tvfmadd231ps %[weights], %[x1], %[sum1]"
      : [weights] "=&x"(weights), [sum0] "+x"(sum0.v), [sum1] "+x"(sum1.v)
      : [w] "m"(*reinterpret_cast<const __m256_u*>(w)), [x0] "x"(x0.v), [x1] "x"(x1.v));
}
MNV4_INLINE void multiply_add(Vec x0, Vec x1, Vec x2, const float* w, Vec& sum0, Vec& sum1, Vec& sum2) {
  __m256 weights;
  asm("vmovups %[w], %[weights]\n\tvfmadd231ps %[weights], %[x0], %[sum0]\n\tvfmadd231ps %[weights], %[x1], %[sum1]\n\t"
      "vfmadd231ps %[weights], %[x2], %[sum2]"
      : [weights] "=&x"(weights), [sum0] "+x"(sum0.v), [sum1] "+x"(sum1.v), [sum2] "+x"(sum2.v)
      : [w] "m"(*reinterpret_cast<const __m256_u*>(w)), [x0] "x"(x0.v), [x1] "x"(x1.v), [x2] "x"(x2.v));
}
// the second operand wins where either is NaN
MNV4_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
MNV4_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
MNV4_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n, n integral and within the exponent's range
MNV4_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  // two factors, so that results below the normal range round once more instead of wrapping
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, low), high)};
}
// a < b ? x : y, lane by lane
MNV4_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
MNV4_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
MNV4_INLINE float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

}  // namespace
}  // namespace mnv4::simd
