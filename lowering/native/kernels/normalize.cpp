// Layer norm, root mean square norm and softmax over the values of each pixel.

#include "epilogue.h"
#include "memory.h"
#include "softmax.h"

namespace quant2e {
namespace {

enum Norm : int64_t { kLayer, kRootMeanSquare };

constexpr int64_t kLeastPixels = 4;  // of a thread

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

struct Output {
  const View &y, &z;
  Range range;
  float inverse;

  template <int V>
  ALWAYS_INLINE void put(int64_t i, int64_t j, int64_t c, const F* values, int n) const {
    I integers[V];
    for (int v = 0; v < V; ++v) {
      if (z.data && n > v * kLanes) store(z.floats(i, j) + c + v * kLanes, values[v], std::min(n - v * kLanes, kLanes));
      integers[v] = rounded(clamped(values[v] * set(inverse), -1e9f, 1e9f));
    }
    if (y.data) store_bytes<V>(y.bytes(i, j) + c, integers, range, n);
  }
};

Output output_of(const Step& s, const View& y, const View& z) {
  return {y, z, Range(s.zero, s.low, s.high), s.inverse()};
}

// (x - mean) * factor * scale + bias; `scale` and `bias` may be null.
struct Affine {
  const float *scale, *bias;
  float mean, factor;

  ALWAYS_INLINE F of(const float* x, int64_t c, int n) const {
    F value = (load(x + c, n) - set(mean)) * set(factor);
    if (scale) value = value * load(scale + c, n);
    return bias ? value + load(bias + c, n) : value;
  }
};

void normalize_pixel(const Affine& affine, const float* x, int64_t n, const Output& out, int64_t i, int64_t j) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) {
    F values[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) values[v] = affine.of(x, c + v * kLanes, kLanes);
    out.put<4>(i, j, c, values, 4 * kLanes);
  }
  for (; c < n; c += kLanes) {
    const int count = (int)std::min<int64_t>(kLanes, n - c);
    const F value = affine.of(x, c, count);
    out.put<1>(i, j, c, &value, count);
  }
}

}  // namespace

// `mode` 0: layer norm, 1: root mean square norm. `extra_number`: what is added to the variance.
void layer_norm(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const Output out = output_of(s, y, z);
  const float n = (float)x.c;
  in_parallel(run, x.pixels(), kLeastPixels, [&](int64_t begin, int64_t end) {
    float* room = (float*)memory.of((x.c + kLanes) * 4);
    Affine affine{run.constant<float>(s.scale), run.constant<float>(s.bias), 0, 0};
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / x.w, j = at % x.w;
      const float* from = floats_of(s, x, i, j, room);
      if (s.mode == kLayer) affine.mean = moment<1>(from, x.c, 0) / n;
      affine.factor = 1 / std::sqrt(moment<2>(from, x.c, affine.mean) / n + s.extra_number());
      normalize_pixel(affine, from, x.c, out, i, j);
    }
  });
}

void softmax(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const Output out = output_of(s, y, z);
  in_parallel(run, x.pixels(), kLeastPixels, [&](int64_t begin, int64_t end) {
    float* room = (float*)memory.of((x.c + kLanes) * 4);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / x.w, j = at % x.w;
      const float* from = floats_of(s, x, i, j, room);
      if (from != room) std::memcpy(room, from, x.c * 4);
      const float total = exponentials(room, x.c, 1, largest_of(room, x.c));
      normalize_pixel({nullptr, nullptr, 0, 1 / total}, room, x.c, out, i, j);
    }
  });
}

}  // namespace quant2e
