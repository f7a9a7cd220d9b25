// Activations on vectors. Include after one of vec_*.h.
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernels/activation.h"
#include "simd/stored.h"

namespace mnv4::simd {
namespace {

// e^x to 2 ulp: x = n ln2 + r, e^r = 1 + r + r^2 q(r) (minimax fit of q on |r| <= ln2 / 2).
MNV4_INLINE Vec exp(Vec x) {
  // beyond these limits the result is 0 or infinity; NaN passes through
  x = min(Vec::broadcast(89.0f), max(Vec::broadcast(-104.0f), x));
  const Vec n = round(x * Vec::broadcast(1.442695041f));
  // ln2 in two parts, the first exact in products with small n
  Vec r = fma(n, Vec::broadcast(-0.693359375f), x);
  r = fma(n, Vec::broadcast(2.12194440e-4f), r);
  Vec q = Vec::broadcast(0.00139411f);
  q = fma(q, r, Vec::broadcast(0.00836318f));
  q = fma(q, r, Vec::broadcast(0.04166637f));
  q = fma(q, r, Vec::broadcast(0.16666576f));
  q = fma(q, r, Vec::broadcast(0.5f));
  // never r^2 alone: of a tiny r it is subnormal, which takes processors a hundred times as long
  const Vec one = Vec::broadcast(1.0f);
  return scale_by_power_of_two(fma(fma(q, r, one), r, one), n);
}

MNV4_INLINE Vec clamp(Vec low, Vec high, Vec x) { return min(high, max(low, x)); }

// The normal distribution, 1/2 + x p(x^2) / q(x^2): a minimax fit on |x| <= 5.5, where it is 0 or 1. Its error
// is 2.5e-7 at most, 3e-8 as the root of the mean square.
MNV4_INLINE Vec normal_cdf(Vec x) {
  const Vec t = clamp(Vec::broadcast(-5.5f), Vec::broadcast(5.5f), x);
  const Vec s = t * t;
  Vec p = Vec::broadcast(2.274943611269009e-08f);
  p = fma(p, s, Vec::broadcast(6.352118816721486e-06f));
  p = fma(p, s, Vec::broadcast(0.00016882544150575995f));
  p = fma(p, s, Vec::broadcast(0.004677258897572756f));
  p = fma(p, s, Vec::broadcast(0.03385262191295624f));
  p = fma(p, s, Vec::broadcast(0.398942232131958f));
  Vec q = Vec::broadcast(1.1975060942859272e-06f);
  q = fma(q, s, Vec::broadcast(7.364743942162022e-05f));
  q = fma(q, s, Vec::broadcast(0.0018844433361664414f));
  q = fma(q, s, Vec::broadcast(0.02864585630595684f));
  q = fma(q, s, Vec::broadcast(0.25152185559272766f));
  q = fma(q, s, Vec::broadcast(1.0f));
  return max(Vec::zero(), Vec::broadcast(0.5f) + t * p / q);
}

// NaN passes through every branch: max and min give their second operand where one is NaN.
MNV4_INLINE Vec activate(Activation act, Vec x) {
  const Vec zero = Vec::zero();
  const Vec one = Vec::broadcast(1.0f);
  switch (act) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return max(zero, x);
    case Activation::kRelu6:
      return clamp(zero, Vec::broadcast(6.0f), x);
    case Activation::kHardSwish:
      return x * clamp(zero, Vec::broadcast(6.0f), x + Vec::broadcast(3.0f)) / Vec::broadcast(6.0f);
    case Activation::kSilu:
      return x / (one + exp(zero - x));
    case Activation::kGelu:
      return x * normal_cdf(x);
    case Activation::kGeluTanh: {
      // 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
      const Vec cubic = fma(x * x * x, Vec::broadcast(0.044715f), x);
      return x / (one + exp(cubic * Vec::broadcast(-1.5957691216f)));
    }
  }
  return x;
}

// f(act as a constant), so that the switch is outside of f's loop.
template <class F>
MNV4_INLINE void with_activation(Activation act, const F& f) {
  switch (act) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu6:
      return f(std::integral_constant<Activation, Activation::kRelu6>{});
    case Activation::kHardSwish:
      return f(std::integral_constant<Activation, Activation::kHardSwish>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
}

// `pixels` vectors in place, one each `pixel` elements, and of each the first `valid` elements. Kernels call it for
// what they have just written: one copy of the activations' code, and of their switch one pass.
template <class T>
__attribute__((noinline)) void activate_pixels(Activation act, T* y, ptrdiff_t pixel, int64_t pixels, int valid) {
  using Column = Stored<T>;
  if (valid < Vec::kWidth) {
    for (int64_t i = 0; i < pixels; ++i, y += pixel) Column::store(y, activate(act, Column::load(y, valid)), valid);
    return;
  }
  with_activation(act, [&](auto constant) {
#pragma GCC unroll 1
    for (int64_t i = 0; i < pixels; ++i, y += pixel) Column::store(y, activate(constant, Column::load(y)));
  });
}

// grad times the activation's derivative at x, with eager's choice where there are two.
MNV4_INLINE Vec derivative(Activation act, Vec grad, Vec x) {
  const Vec zero = Vec::zero();
  const Vec one = Vec::broadcast(1.0f);
  const Vec half = Vec::broadcast(0.5f);
  switch (act) {
    case Activation::kNone:
      return grad;
    case Activation::kRelu:
      return select_less(zero, x, grad, zero);
    case Activation::kRelu6:
      return select_less(zero, x, select_less(x, Vec::broadcast(6.0f), grad, zero), zero);
    case Activation::kHardSwish: {
      const Vec three = Vec::broadcast(3.0f);
      const Vec inside = grad * (x / three + half);
      return select_less(x, zero - three, zero, select_less(three, x, grad, inside));
    }
    case Activation::kSilu: {
      const Vec s = one / (one + exp(zero - x));
      return grad * s * fma(x, one - s, one);
    }
    case Activation::kGelu: {
      const Vec cdf = normal_cdf(x);
      const Vec pdf = exp(x * x * Vec::broadcast(-0.5f)) * Vec::broadcast(0.39894228f);
      return grad * fma(x, pdf, cdf);
    }
    case Activation::kGeluTanh: {
      const Vec square = x * x;
      const Vec cubic = fma(square * x, Vec::broadcast(0.044715f), x);
      const Vec s = one / (one + exp(cubic * Vec::broadcast(-1.5957691216f)));
      const Vec slope = fma(square, Vec::broadcast(3.0f * 0.044715f), one) * Vec::broadcast(1.5957691216f);
      return grad * s * fma(x * slope, one - s, one);
    }
  }
  return grad;
}

}  // namespace
}  // namespace mnv4::simd
