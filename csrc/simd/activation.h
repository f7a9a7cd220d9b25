// Activations on vectors. Include after one of vec_*.h.
#pragma once

#include "kernels/activation.h"

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

// erf x = x p(x^2) / q(x^2): a minimax fit on |x| <= 4, where its rounded value is 1. The error is 3.4e-7 at most, 5e-8
// as the root of the mean square. Half the time of a polynomial below 1 and an exponential above.
MNV4_INLINE Vec erf(Vec x) {
  const Vec t = clamp(Vec::broadcast(-4.0f), Vec::broadcast(4.0f), x);
  const Vec s = t * t;
  Vec p = Vec::broadcast(1.9748101749428315e-06f);
  p = fma(p, s, Vec::broadcast(0.0002880411338992417f));
  p = fma(p, s, Vec::broadcast(0.004003670532256365f));
  p = fma(p, s, Vec::broadcast(0.053467556834220886f));
  p = fma(p, s, Vec::broadcast(0.19624969363212585f));
  p = fma(p, s, Vec::broadcast(1.128378987312317f));
  Vec q = Vec::broadcast(3.748068047570996e-05f);
  q = fma(q, s, Vec::broadcast(0.0012163642095401883f));
  q = fma(q, s, Vec::broadcast(0.01544447336345911f));
  q = fma(q, s, Vec::broadcast(0.11647670716047287f));
  q = fma(q, s, Vec::broadcast(0.5072529315948486f));
  q = fma(q, s, Vec::broadcast(1.0f));
  return clamp(Vec::broadcast(-1.0f), Vec::broadcast(1.0f), t * p / q);
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
      return x * Vec::broadcast(0.5f) * (one + erf(x * Vec::broadcast(0.70710678f)));
    case Activation::kGeluTanh: {
      // 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
      const Vec cubic = fma(x * x * x, Vec::broadcast(0.044715f), x);
      return x / (one + exp(cubic * Vec::broadcast(-1.5957691216f)));
    }
  }
  return x;
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
      const Vec cdf = half * (one + erf(x * Vec::broadcast(0.70710678f)));
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
