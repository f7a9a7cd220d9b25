// 4 floats in one register of Armv8's Advanced SIMD (NEON). Only included by *_neon.cpp.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace mnv4::simd {
namespace {

#define MNV4_INLINE inline __attribute__((always_inline))

// One float as a factor of every lane: a multiply-add takes a lane of a register, and filling all lanes would take a
// turn of the multipliers.
struct Factor {
  float v;
};

struct Vec {
  static constexpr int kWidth = 4;
  float32x4_t v;

  static MNV4_INLINE Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static MNV4_INLINE Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
  static MNV4_INLINE Factor factor(const float* p) {
    float x = *p;
    // else it may be loaded into every lane after all
    asm("" : "+w"(x));
    return {x};
  }
  static MNV4_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
  static MNV4_INLINE Vec load(const float* p, int n) {
    if (n >= kWidth) return load(p);
    float part[kWidth] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
  }
  static MNV4_INLINE Vec load_bf16(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
  static MNV4_INLINE Vec load_f16(const uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
  MNV4_INLINE void store(float* p) const { vst1q_f32(p, v); }
  MNV4_INLINE void store(float* p, int n) const {
    if (n >= kWidth) return store(p);
    float part[kWidth];
    store(part);
    for (int i = 0; i < n; ++i) p[i] = part[i];
  }
  MNV4_INLINE uint16x4_t rounded_to_bf16() const {
    // round to nearest even; NaN keeps a set mantissa bit
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(v, v);
    return vshrn_n_u32(vbslq_u32(number, rounded, vorrq_u32(bits, vdupq_n_u32(0x400000))), 16);
  }
  // sum[i] += lane i
  MNV4_INLINE void add_to(double* sum) const {
    vst1q_f64(sum, vaddq_f64(vld1q_f64(sum), vcvt_f64_f32(vget_low_f32(v))));
    vst1q_f64(sum + 2, vaddq_f64(vld1q_f64(sum + 2), vcvt_high_f64_f32(v)));
  }
  MNV4_INLINE void store_bf16(uint16_t* p) const { vst1_u16(p, rounded_to_bf16()); }
  // p[3 i + c] is lane i of a, b and c
  static MNV4_INLINE void store_bf16_triples(uint16_t* p, Vec a, Vec b, Vec c) {
    vst3_u16(p, {{a.rounded_to_bf16(), b.rounded_to_bf16(), c.rounded_to_bf16()}});
  }
  MNV4_INLINE void store_f16(uint16_t* p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
};

MNV4_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
MNV4_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
MNV4_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
MNV4_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
// a * b + c
MNV4_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
MNV4_INLINE Vec fma(Factor a, Vec b, Vec c) { return {vfmaq_n_f32(c.v, b.v, a.v)}; }
// NaN where either is NaN: the second operand's at least, which is what callers count on
MNV4_INLINE Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
MNV4_INLINE Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
MNV4_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
// a * 2^n, n integral and within the exponent's range
MNV4_INLINE Vec scale_by_power_of_two(Vec a, Vec n) {
  // two factors, so that results below the normal range round once more instead of wrapping
  const int32x4_t whole = vcvtnq_s32_f32(n.v);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const int32x4_t bias = vdupq_n_s32(127);
  const float32x4_t low = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
  const float32x4_t high = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23));
  return {vmulq_f32(vmulq_f32(a.v, low), high)};
}
// a < b ? x : y, lane by lane
MNV4_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
MNV4_INLINE float reduce_add(Vec a) { return vaddvq_f32(a.v); }
MNV4_INLINE float reduce_max(Vec a) { return vmaxvq_f32(a.v); }

}  // namespace
}  // namespace mnv4::simd
