// Layer norm, root mean square norm and softmax over the values of each pixel.

#include "epilogue.h"
#include "memory.h"
#include "softmax.h"

#include <type_traits>

namespace quant2e {
namespace {

enum Norm : int64_t { kLayer, kRootMeanSquare };

constexpr int64_t kLeastPixels = 4;  // of a thread
constexpr int kTogether = 8;         // pixels whose sums are computed one behind the other, as each waits for its last

thread_local Memory memory;

// The values of a pixel as floats: where they lie, or in `room`.
const float* floats_of(const Step& s, const View& x, int64_t i, int64_t j, float* room) {
  if (x.size == 4) return x.floats(i, j);
  const F scale = set(s.x_scale()), zero = set((float)s.x_zero);
  for (int64_t c = 0; c < x.c; c += kLanes) {
    const int n = (int)std::min<int64_t>(kLanes, x.c - c);
    store(room + c, (load_bytes(x.bytes(i, j) + c, n) - zero) * scale, kLanes);
  }
  return room;
}

// Sum of (x - center)^`kPower`. Four sums at once, as each waits for the one before.
template <int kPower>
ALWAYS_INLINE float moment(const float* x, int64_t n, float center) {
  F sums[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  const F middle = set(center);
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const F value = load(x + c + k * kLanes) - middle;
      sums[k] = kPower == 1 ? sums[k] + value : fma(value, value, sums[k]);
    }
  float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (c == n) return total;
  F rest = set(0.0f);
  for (; c + kLanes <= n; c += kLanes) {
    const F value = load(x + c) - middle;
    rest = kPower == 1 ? rest + value : fma(value, value, rest);
  }
  total += sum(rest);
  for (; c < n; ++c) total += kPower == 1 ? x[c] - center : (x[c] - center) * (x[c] - center);
  return total;
}

// (x - mean) * factor * scale + bias, which may be null, as integers at y and floats at z, either of which may be null.
struct Affine {
  const float *scale, *bias;
  Range range;
  float inverse;
};

// V * 16 of the values, or `n` of 16.
template <int V>
ALWAYS_INLINE void normalize_some(const float* x, const float* scale, const float* bias, F mean, F factor, F inverse,
                                  const Range& range, uint8_t* y, float* z, int n) {
  I integers[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int at = v * kLanes, count = V == 1 ? n : kLanes;
    F value = (load(x + at, count) - mean) * factor;
    if (scale) value = value * load(scale + at, count);
    if (bias) value = value + load(bias + at, count);
    if (z) store(z + at, value, count);
    integers[v] = rounded(clamped(value * inverse, -1e9f, 1e9f));
  }
  if (y) store_bytes<V>(y, integers, range, n);
}

void normalize_pixel(const Affine& affine, float mean, float factor, const float* x, int64_t n, uint8_t* y, float* z) {
  const Range range = affine.range;
  const F middle = set(mean), by = set(factor), inverse = set(affine.inverse);
  const float *scale = affine.scale, *bias = affine.bias;
  const auto every = [&](auto some, int64_t c, int count) {
    constexpr int V = decltype(some)::value;
    normalize_some<V>(x + c, scale ? scale + c : nullptr, bias ? bias + c : nullptr, middle, by, inverse, range,
                      y ? y + c : nullptr, z ? z + c : nullptr, count);
  };
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) every(std::integral_constant<int, 4>(), c, 4 * kLanes);
  for (; c < n; c += kLanes) every(std::integral_constant<int, 1>(), c, (int)std::min<int64_t>(kLanes, n - c));
}

// Where a pixel is written.
struct Output {
  const View &y, &z;

  uint8_t* bytes(int64_t i, int64_t j) const { return y.data ? y.bytes(i, j) : nullptr; }
  float* floats(int64_t i, int64_t j) const { return z.data ? z.floats(i, j) : nullptr; }
};

}  // namespace

// `mode` 0: layer norm, 1: root mean square norm. `extra_number`: what is added to the variance.
void layer_norm(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const Output out{y, z};
  const Affine affine{run.constant<float>(s.scale), run.constant<float>(s.bias), Range(s.zero, s.low, s.high), s.inverse()};
  const float n = (float)x.c;
  const int64_t row = x.c + kLanes;
  in_parallel(run, x.pixels(), kLeastPixels, x.pixels() * x.c / kPartValues, [&](int64_t begin, int64_t end) {
    float* room = (float*)memory.of(kTogether * row * 4);
    for (int64_t at = begin; at < end; at += kTogether) {
      const int count = (int)std::min<int64_t>(kTogether, end - at);
      const float* from[kTogether];
      float mean[kTogether] = {}, factor[kTogether];
      for (int p = 0; p < count; ++p) from[p] = floats_of(s, x, (at + p) / x.w, (at + p) % x.w, room + p * row);
      for (int p = 0; p < count && s.mode == kLayer; ++p) mean[p] = moment<1>(from[p], x.c, 0) / n;
      for (int p = 0; p < count; ++p)
        factor[p] = 1 / std::sqrt(moment<2>(from[p], x.c, mean[p]) / n + s.extra_number());
      for (int p = 0; p < count; ++p) {
        const int64_t i = (at + p) / x.w, j = (at + p) % x.w;
        normalize_pixel(affine, mean[p], factor[p], from[p], x.c, out.bytes(i, j), out.floats(i, j));
      }
    }
  });
}

void softmax(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const Output out{y, z};
  const Affine affine{nullptr, nullptr, Range(s.zero, s.low, s.high), s.inverse()};
  in_parallel(run, x.pixels(), kLeastPixels, x.pixels() * x.c / kPartValues, [&](int64_t begin, int64_t end) {
    float* room = (float*)memory.of((x.c + kLanes) * 4);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / x.w, j = at % x.w;
      const float* from = floats_of(s, x, i, j, room);
      if (from != room) std::memcpy(room, from, x.c * 4);
      const float total = exponentials(room, x.c, 1, largest_of(room, x.c));
      normalize_pixel(affine, 0, 1 / total, room, x.c, out.bytes(i, j), out.floats(i, j));
    }
  });
}

}  // namespace quant2e
