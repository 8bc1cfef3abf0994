// Softmax of one row, up to the division by its sum.
#pragma once

#include <limits>

#include "math.h"

namespace quant2e {

// Each of `n` values becomes exp(value * scale + mask - largest of them); returns their sum. `mask` may be null. `x` has
// room for whole sixteens. Where everything is masked by minus infinity, the sum is 0.
ALWAYS_INLINE float exponentials(float* x, int64_t n, float scale, const float* mask) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  F most = set(kLowest);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int count = (int)std::min<int64_t>(kLanes, n - i);
    F value = load(x + i) * set(scale);
    if (mask) value = value + load(mask + i, count);
    store(x + i, value, kLanes);
    if (count < kLanes) {
      for (int64_t rest = n; rest < i + kLanes; ++rest) x[rest] = kLowest;
      value = load(x + i);
    }
    most = maximum(most, value);
  }
  const float top = largest(most);
  if (top == kLowest) return 0;
  const F above = set(top);
  F total = set(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F value = exponential(load(x + i) - above);
    store(x + i, value, kLanes);
    total = total + value;
  }
  return sum(total);
}

}  // namespace quant2e
