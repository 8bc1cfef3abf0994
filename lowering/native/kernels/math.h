// Functions of sixteen floats: exp, erf, tanh and the activations made of them.
#pragma once

#include "simd.h"

namespace quant2e {

// Cephes' range reduction and a Taylor polynomial of degree 6: relative error below 2e-7.
ALWAYS_INLINE F exponential(F x) {
  x = clamped(x, -87.0f, 88.0f);
  const F n = whole(x * set(1.44269504f));
  F rest = fma(n, set(-0.693359375f), x);
  rest = fma(n, set(2.12194440e-4f), rest);
  F p = set(1.0f / 720);
  for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, rest, set(term));
  return times_power_of_two(p, n);
}

// Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
ALWAYS_INLINE F error_function(F x) {
  const F z = absolute(x), t = set(1.0f) / fma(z, set(0.3275911f), set(1.0f));
  F p = set(1.061405429f);
  for (float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = fma(p, t, set(term));
  const F y = set(1.0f) - p * t * exponential(set(0.0f) - z * z);
  return with_sign_of(y, x);
}

ALWAYS_INLINE F sigmoid(F x) { return set(1.0f) / (set(1.0f) + exponential(set(0.0f) - x)); }
ALWAYS_INLINE F hyperbolic_tangent(F x) { return fma(sigmoid(x + x), set(2.0f), set(-1.0f)); }

enum Activation : int64_t {
  kNone, kRelu, kClamp, kHardswish, kHardsigmoid, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh, kLeakyRelu,
};

// `a`, `b`: bounds of a clamp; slope of a leaky relu.
ALWAYS_INLINE F activated(F x, int64_t activation, float a, float b) {
  switch (activation) {
    case kRelu: return maximum(x, set(0.0f));
    case kClamp: return clamped(x, a, b);
    case kHardswish: return x * clamped(x + set(3.0f), 0.0f, 6.0f) * set(1.0f / 6);
    case kHardsigmoid: return clamped(x + set(3.0f), 0.0f, 6.0f) * set(1.0f / 6);
    case kGelu: return x * set(0.5f) * (set(1.0f) + error_function(x * set(0.70710678f)));
    case kGeluTanh: {
      const F inner = set(0.79788456f) * fma(x * x * x, set(0.044715f), x);
      return x * set(0.5f) * (set(1.0f) + hyperbolic_tangent(inner));
    }
    case kSilu: return x * sigmoid(x);
    case kSigmoid: return sigmoid(x);
    case kTanh: return hyperbolic_tangent(x);
    case kLeakyRelu: return maximum(x, set(0.0f)) + minimum(x, set(0.0f)) * set(a);
    default: return x;
  }
}

}  // namespace quant2e
