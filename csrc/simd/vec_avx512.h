// 16 floats in one AVX-512 register. Only included by *_avx512*.cpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mnv4::simd {
namespace {

#define MNV4_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;

  static MNV4_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static MNV4_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  // one float as a factor of every lane
  static MNV4_INLINE Vec factor(const float* p) { return broadcast(*p); }
  static MNV4_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static MNV4_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static MNV4_INLINE Vec load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static MNV4_INLINE Vec load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  MNV4_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  MNV4_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  // in bfloat16
  MNV4_INLINE __m256i rounded() const {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    // to nearest even; NaN keeps a set mantissa bit
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  }
  // sum[i] += lane i
  MNV4_INLINE void add_to(double* sum) const {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), low));
    _mm512_storeu_pd(sum + 8, _mm512_add_pd(_mm512_loadu_pd(sum + 8), high));
  }
  MNV4_INLINE void store_bf16(uint16_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded()); }
  // b behind a
  static MNV4_INLINE void store_bf16_pair(uint16_t* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
    a.store_bf16(p);
    b.store_bf16(p + kWidth);
#endif
  }
  // p[3 i + c] is lane i of a, b and c
  static MNV4_INLINE void store_bf16_triples(uint16_t* p, Vec a, Vec b, Vec c) {
    const __m512i ab = _mm512_inserti64x4(_mm512_castsi256_si512(a.rounded()), b.rounded(), 1);
    const __m512i cc = _mm512_castsi256_si512(c.rounded());
    const __m512i first = _mm512_set_epi16(26, 10, 41, 25, 9, 40, 24, 8, 39, 23, 7, 38, 22, 6, 37, 21, 5, 36, 20, 4, 35,
                                           19, 3, 34, 18, 2, 33, 17, 1, 32, 16, 0);
    const __m512i rest = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 47, 31, 15, 46, 30, 14, 45,
                                          29, 13, 44, 28, 12, 43, 27, 11, 42);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(ab, first, cc));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 2 * kWidth),
                        _mm512_castsi512_si256(_mm512_permutex2var_epi16(ab, rest, cc)));
  }
  MNV4_INLINE void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static MNV4_INLINE __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
};

MNV4_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MNV4_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
MNV4_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MNV4_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c
MNV4_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// *a * b + c in one instruction. From `fma` the compiler loads a factor of several products once, which takes another.
MNV4_INLINE Vec fma(const float* a, Vec b, Vec c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c.v) : "v"(b.v), "m"(*a));
  return c;
}
// the second operand wins where either is NaN
MNV4_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
MNV4_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
MNV4_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n, n integral
MNV4_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// a < b ? x : y, lane by lane
MNV4_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
MNV4_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
MNV4_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace
}  // namespace mnv4::simd
