// One float at a time: the reference tier, right on every machine. Only included by *_scalar.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mnv4::simd {
namespace {

#define MNV4_INLINE inline __attribute__((always_inline))

MNV4_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
MNV4_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct Vec {
  static constexpr int kWidth = 1;
  float v;

  static MNV4_INLINE Vec zero() { return {0.0f}; }
  static MNV4_INLINE Vec broadcast(float x) { return {x}; }
  // one float as a factor of every lane
  static MNV4_INLINE Vec factor(const float* p) { return broadcast(*p); }
  static MNV4_INLINE Vec load(const float* p) { return {*p}; }
  static MNV4_INLINE Vec load(const float* p, int n) { return {n > 0 ? *p : 0.0f}; }
  static MNV4_INLINE Vec load_bf16(const uint16_t* p) { return {float_of(static_cast<uint32_t>(*p) << 16)}; }
  static MNV4_INLINE Vec load_f16(const uint16_t* p) {
    const uint32_t sign = static_cast<uint32_t>(*p & 0x8000u) << 16;
    const uint32_t exponent = (*p >> 10) & 0x1fu;
    const uint32_t mantissa = *p & 0x3ffu;
    if (exponent == 0x1f) return {float_of(sign | 0x7f800000u | (mantissa << 13))};
    if (exponent) return {float_of(sign | ((exponent + 112) << 23) | (mantissa << 13))};
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return {sign ? -magnitude : magnitude};
  }
  MNV4_INLINE void store(float* p) const { *p = v; }
  MNV4_INLINE void store(float* p, int n) const {
    if (n > 0) *p = v;
  }
  // sum[i] += lane i
  MNV4_INLINE void add_to(double* sum) const { *sum += static_cast<double>(v); }
  MNV4_INLINE void store_bf16(uint16_t* p) const {
    const uint32_t bits = bits_of(v);
    const bool nan = v != v;
    *p = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  static MNV4_INLINE void store_bf16_triples(uint16_t* p, Vec a, Vec b, Vec c) {
    a.store_bf16(p);
    b.store_bf16(p + 1);
    c.store_bf16(p + 2);
  }
  MNV4_INLINE void store_f16(uint16_t* p) const {
    const uint32_t bits = bits_of(v);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      *p = static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    } else if (magnitude >= 0x477ff000u) {
      *p = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (magnitude < 0x38800000u) {
      // subnormal: adding a power of two aligns the mantissa and rounds to nearest even
      *p = static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    } else {
      const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
      *p = static_cast<uint16_t>(sign | (rounded >> 13));
    }
  }
};

MNV4_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
MNV4_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
MNV4_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
MNV4_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// a * b + c, rounded twice: a fused one would be a library call on a machine without FMA
MNV4_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// the second operand wins where either is NaN
MNV4_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
MNV4_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
MNV4_INLINE Vec round(Vec a) { return {::nearbyintf(a.v)}; }
// a * 2^n, n integral
MNV4_INLINE Vec scale_by_power_of_two(Vec a, Vec n) { return {::ldexpf(a.v, static_cast<int>(n.v))}; }
// a < b ? x : y
MNV4_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) { return {a.v < b.v ? x.v : y.v}; }
MNV4_INLINE float reduce_add(Vec a) { return a.v; }
MNV4_INLINE float reduce_max(Vec a) { return a.v; }

}  // namespace
}  // namespace mnv4::simd
