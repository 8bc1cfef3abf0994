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

Epilogue epilogue_of(const Run& run, const Step& step);

// Where one pixel is written, and what is added to it.
struct Pixel {
  uint8_t* y;
  float* z;
  const void* added;
};

// The activation of V registers: one that is common without asking for each.
template <int V>
ALWAYS_INLINE void activate(F (&x)[V], const Epilogue& e) {
  if (e.activation == kNone) return;
  if (e.activation == kRelu)
    for (int v = 0; v < V; ++v) x[v] = maximum(x[v], set(0.0f));
  else if (e.activation == kHardswish)
    for (int v = 0; v < V; ++v) x[v] = activated(x[v], kHardswish, 0, 0);
  else
    for (int v = 0; v < V; ++v) x[v] = activated(x[v], e.activation, e.a, e.b);
}

// Any layer's ending. The first `n` outputs are written; scale, bias and bytes that are added are read up to V * 16.
template <int V>
__attribute__((noinline)) void finish(const int32_t* sums, const Epilogue& e, const Pixel& pixel, int n) {
  F x[V];
  for (int v = 0; v < V; ++v) x[v] = fma(to_float(load_int(sums + v * kLanes)), load(e.scale + v * kLanes), load(e.bias + v * kLanes));
  if (e.adds_bytes)
    for (int v = 0; v < V; ++v) {
      const F added = load_bytes((const uint8_t*)pixel.added + v * kLanes, kLanes) - set(e.added_zero);
      x[v] = fma(added, set(e.added_scale), x[v]);
    }
  if (e.adds_floats)
    for (int v = 0; v * kLanes < n; ++v)
      x[v] = x[v] + load((const float*)pixel.added + v * kLanes, std::min(n - v * kLanes, kLanes));
  activate<V>(x, e);
  if (pixel.z)
    for (int v = 0; v * kLanes < n; ++v) store(pixel.z + v * kLanes, x[v], std::min(n - v * kLanes, kLanes));
  if (!pixel.y) return;
  I integers[V];
  for (int v = 0; v < V; ++v) integers[v] = rounded(clamped(x[v] * set(e.inverse), -1e9f, 1e9f));
  store_bytes<V>(pixel.y, integers, e.range, n);
}

// What is done to sums that stay in registers: endings that layers often have.
enum Ending { kAny, kFolded, kFoldedAdded, kOnlyHardswish, kOnlyGelu, kFloats, kFloatsAdded, kBoth };

ALWAYS_INLINE Ending ending_of(const Step& s) {
  if (s.fast) return s.other >= 0 ? kFoldedAdded : kFolded;
  return s.activation == kHardswish && s.y >= 0 && s.z < 0 && s.other < 0 ? kOnlyHardswish : kAny;
}

// The same, and of depthwise layers whose result is read as bytes and as floats, as in front of squeeze-excite.
ALWAYS_INLINE Ending depthwise_ending_of(const Step& s) {
  return s.y >= 0 && s.z >= 0 && s.other < 0 ? kBoth : ending_of(s);
}

// The same, and endings of linear layers in transformers.
ALWAYS_INLINE Ending linear_ending_of(const Run& run, const Step& s) {
  if (s.activation == kGelu && s.y >= 0 && s.z < 0 && s.other < 0) return kOnlyGelu;
  if (s.y >= 0 || s.activation != kNone) return ending_of(s);
  if (s.other < 0) return kFloats;
  return run.tensors[s.other].type == kFloat ? kFloatsAdded : kAny;
}

// kFolded: no more than a clamp is asked for, and scale, bias and that of what is added are divided by the scale of y.
// Integers of a register's sums; `added`: bytes.
template <Ending kHow>
ALWAYS_INLINE I integers_of(I sums, const Epilogue& e, F scale, F bias, const uint8_t* added) {
  F x = fma(to_float(sums), scale, bias);
  if (kHow == kFoldedAdded) x = fma(load_bytes(added, kLanes), set(e.added_scale), x);
  if (kHow == kOnlyHardswish) x = minimum(activated(x, kHardswish, 0, 0) * set(e.inverse), set(1e9f));
  if (kHow == kOnlyGelu) x = minimum(gelu(x) * set(e.inverse), set(1e9f));
  return rounded(x);
}

template <int V, Ending kHow>
ALWAYS_INLINE void finish_fast(const I* sums, const Epilogue& e, const F* scale, const F* bias, const Range& range,
                               uint8_t* y, int n) {
  I integers[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) integers[v] = integers_of<kHow>(sums[v], e, scale[v], bias[v], nullptr);
  store_bytes<V>(y, integers, range, n);
}

// kBoth: bytes and floats of one pixel, whatever the activation.
template <int V>
ALWAYS_INLINE void finish_both(const I* sums, const Epilogue& e, const F* scale, const F* bias, const Range& range,
                               const Pixel& pixel, int n) {
  F x[V];
  I integers[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) x[v] = fma(to_float(sums[v]), scale[v], bias[v]);
  activate<V>(x, e);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if (v * kLanes < n) store(pixel.z + v * kLanes, x[v], std::min(n - v * kLanes, kLanes));
    integers[v] = rounded(clamped(x[v] * set(e.inverse), -1e9f, 1e9f));
  }
  store_bytes<V>(pixel.y, integers, range, n);
}

// kFloats: scaled sums as they are, perhaps added to floats.
template <int V, Ending kHow>
ALWAYS_INLINE void finish_floats(const I* sums, const float* scale, const float* bias, float* z, const float* added, int n) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int some = std::min(n - v * kLanes, kLanes);
    if (some <= 0) return;
    const F x = fma(to_float(sums[v]), load(scale + v * kLanes), load(bias + v * kLanes));
    store(z + v * kLanes, kHow == kFloatsAdded ? x + load(added + v * kLanes, some) : x, some);
  }
}

}  // namespace quant2e
