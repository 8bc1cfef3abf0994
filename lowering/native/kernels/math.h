// Functions of sixteen floats: powers, and activations.
#pragma once

#include "simd.h"

namespace quant2e {

// The sum of terms[k] * x^k. Coefficients of this file are minimax fits, in single precision.
template <int N>
ALWAYS_INLINE F polynomial(const float (&terms)[N], F x) {
  F p = set(terms[N - 1]);
#pragma GCC unroll 16
  for (int k = N - 2; k >= 0; --k) p = fma(p, x, set(terms[k]));
  return p;
}

// 2^x for x >= -126, with a relative error below 1e-7; what is less counts as -126.
ALWAYS_INLINE F power_of_two(F x) {
  constexpr float kTerms[] = {1.0f, 0.693147182f, 0.240226462f, 0.0555032864f, 0.00961848907f, 0.00133999321f, 0.000153458081f};
  x = maximum(x, set(-126.0f));
  const F n = whole(x);
  return times_power_of_two(polynomial(kTerms, x - n), n);
}

// Cephes' range reduction: relative error below 2e-7.
ALWAYS_INLINE F exponential(F x) {
  constexpr float kTerms[] = {1.00000012f, 0.999999702f, 0.499988914f, 0.166675791f, 0.0419158787f, 0.00829758123f};
  x = clamped(x, -87.0f, 88.0f);
  const F n = whole(x * set(1.44269504f));
  const F rest = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  return times_power_of_two(polynomial(kTerms, rest), n);
}

// x times the part of a normal distribution below x: absolute error below 1e-6 where |x| <= 10, relative 1e-7 above. The
// part below x, less a half, is odd, and constant beyond kEdge.
constexpr float kEdge = 5.2f;

#if defined(__AVX512VNNI__)

// That part as 32 cubics of the distance from the nearest multiple of kEdge / 31, each through four points of its interval
// that lie as Chebyshev's do.
struct Normal {
  float terms[4][kTable];

  Normal() {
    for (int i = 0; i < kTable; ++i) {
      double at[4], f[4], p[4] = {};
      for (int j = 0; j < 4; ++j) at[j] = 0.5 * std::cos((2 * j + 1) * 0.39269908169872414);
      for (int j = 0; j < 4; ++j) f[j] = 0.5 * std::erf((i + at[j]) * ((double)kEdge / (kTable - 1)) * 0.7071067811865476);
      for (int k = 1; k < 4; ++k)  // divided differences, then the powers they stand for
        for (int j = 3; j >= k; --j) f[j] = (f[j] - f[j - 1]) / (at[j] - at[j - k]);
      for (int k = 3; k >= 0; --k) {
        for (int j = 3; j > 0; --j) p[j] = p[j - 1] - at[k] * p[j];
        p[0] = f[k] - at[k] * p[0];
      }
      for (int k = 0; k < 4; ++k) terms[k][i] = (float)p[k];
    }
  }
};

inline const Normal normal;

ALWAYS_INLINE F gelu(F x) {
  constexpr float kStep = (kTable - 1) / kEdge, kMagic = 12582912.0f;  // whose last bits are an integer that is added
  x = maximum(x, set(-kEdge));
  const F size = absolute(x), inside = minimum(size, set(kEdge));
  const F index = fma(inside, set(kStep), set(kMagic));
  const F rest = fma(inside, set(kStep), set(kMagic) - index);
  F part = looked_up(normal.terms[3], index);
#pragma GCC unroll 3
  for (int k = 2; k >= 0; --k) part = fma(part, rest, looked_up(normal.terms[k], index));
  return fma(size, part, x * set(0.5f));
}

#else

ALWAYS_INLINE F gelu(F x) {
  constexpr float kTerms[] = {0.135949999f,   -0.0677436665f,  0.0500245132f,  -0.039929796f,   0.0319901034f,
                              -0.024723893f,  0.0179540496f,   -0.0125039686f, 0.0085616475f,   -0.00479142275f,
                              0.00179838401f, -0.00121918356f, 0.00126917753f, -0.000482121861f};
  x = maximum(x, set(-kEdge));
  const F inside = minimum(x, set(kEdge));
  const F part = polynomial(kTerms, fma(inside * inside, set(2 / (kEdge * kEdge)), set(-1.0f)));
  return fma(x, inside * part, x * set(0.5f));
}

#endif

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
    case kGelu: return gelu(x);
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
