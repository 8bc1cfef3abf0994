// Softmax of one row, in the steps in which attention computes many. Rows have room for whole sixteens.
//
// A step of many rows comes before the next: within a row each waits for the one before.
#pragma once

#include <limits>

#include "math.h"

namespace quant2e {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// x = x * scale + mask, where `kIntegers` of int32 that lie in the place of x. `mask` may be null.
template <bool kIntegers>
ALWAYS_INLINE void scale_row(float* x, int64_t n, float scale, const float* mask) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const F value = kIntegers ? to_float(load_int((const int32_t*)(x + i))) : load(x + i);
    const F added = mask ? load(mask + i, (int)std::min<int64_t>(kLanes, n - i)) : set(0.0f);
    store(x + i, fma(value, set(scale), added), kLanes);
  }
}

// The largest of `n` values. What lies behind them in the last sixteen becomes minus infinity.
ALWAYS_INLINE float largest_of(float* x, int64_t n) {
  for (int64_t i = n; i % kLanes; ++i) x[i] = kLowest;
  F most = set(kLowest);
  for (int64_t i = 0; i < n; i += kLanes) most = maximum(most, load(x + i));
  return largest(most);
}

// x = exp((x - top) * scale), and their sum. Nothing is left of a row whose largest value is minus infinity.
ALWAYS_INLINE float exponentials(float* x, int64_t n, float scale, float top) {
  if (top == kLowest) return std::memset(x, 0, n * 4), 0.0f;
  const F above = set(top), factor = set(scale * 1.44269504f);
  F total = set(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F value = power_of_two((load(x + i) - above) * factor);
    store(x + i, value, kLanes);
    total = total + value;
  }
  return sum(total);
}

}  // namespace quant2e
