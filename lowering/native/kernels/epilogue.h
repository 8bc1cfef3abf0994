// Epilogue: from 32-bit sums to what a layer writes.
//
//     value = sum * scale + bias  [+ what is added]     then the activation
//     y     = clamp(round(value / y_scale) + y_zero)
//
// Sums of `V` times 16 outputs of one pixel.
#pragma once

#include "math.h"
#include "region.h"

namespace quant2e {

struct Epilogue {
  const float *scale, *bias;  // of the first output
  Range range;
  int64_t activation;
  float a, b, inverse;
  float added_scale, added_zero;
  bool adds_bytes, adds_floats;
};

// Where one pixel is written, and what is added to it.
struct Pixel {
  uint8_t* y;
  float* z;
  const void* added;
};

template <int V>
void finish(const I* sums, const Epilogue& e, const Pixel& pixel, int n) {
  I integers[V];
  for (int v = 0; v < V; ++v) {
    const int at = v * kLanes, count = std::min(n - at, kLanes);
    if (count <= 0) {
      integers[v] = set_int(0);
      continue;
    }
    F value = fma(to_float(sums[v]), load(e.scale + at), load(e.bias + at));
    if (e.adds_bytes)
      value = fma(load_bytes((const uint8_t*)pixel.added + at, count) - set(e.added_zero), set(e.added_scale), value);
    if (e.adds_floats) value = value + load((const float*)pixel.added + at, count);
    value = activated(value, e.activation, e.a, e.b);
    if (pixel.z) store(pixel.z + at, value, count);
    integers[v] = rounded(clamped(value * set(e.inverse), -1e9f, 1e9f));
  }
  if (pixel.y) store_bytes<V>(pixel.y, integers, e.range, n);
}

// Where no more than a clamp is asked for: scale and bias are divided by the scale of y already.
template <int V>
ALWAYS_INLINE void finish_fast(const I* sums, const float* scale, const float* bias, const Range& range, uint8_t* y, int n) {
  I integers[V];
  for (int v = 0; v < V; ++v)
    integers[v] = rounded(fma(to_float(sums[v]), load(scale + v * kLanes), load(bias + v * kLanes)));
  store_bytes<V>(y, integers, range, n);
}

}  // namespace quant2e
