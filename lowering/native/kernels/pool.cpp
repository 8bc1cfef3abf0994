// Pools: the largest byte of a window, and averages.

#include "bytes.h"
#include "epilogue.h"

namespace quant2e {
namespace {

// The first and the number of places of a window along one axis that lie in the image.
struct Part {
  int64_t first, count;
};

Part part_of(int64_t begin, int64_t kernel, int64_t dilation, int64_t size) {
  if (begin >= 0 && begin + (kernel - 1) * dilation < size) return {0, kernel};
  const int64_t first = begin < 0 ? (-begin + dilation - 1) / dilation : 0;
  const int64_t end = begin >= size ? 0 : std::min(kernel, (size - 1 - begin) / dilation + 1);
  return {first, std::max<int64_t>(0, end - first)};
}

// The part of the window of an output that lies in the image, from channel `c` on.
Window window_of(const Step& s, const View& x, int64_t i, int64_t j, int64_t c) {
  const int64_t h = i * s.stride_h - s.top, w = j * s.stride_w - s.left;
  const Part rows = part_of(h, s.kernel_h, s.dilation_h, x.h), columns = part_of(w, s.kernel_w, s.dilation_w, x.w);
  const char* data = x.at(h + rows.first * s.dilation_h, w + columns.first * s.dilation_w) + c * x.size;
  return {(const uint8_t*)data, rows.count, columns.count, s.dilation_h * x.row() * x.size, s.dilation_w * x.c * x.size};
}

void add_floats(const Window& window, int n, float* totals) {
  for (int v = 0; v * kLanes < n; ++v) {
    const int some = std::min(kLanes, n - v * kLanes);
    F total = set(0.0f);
    for (int64_t p = 0; p < window.rows; ++p) {
      const uint8_t* from = window.data + p * window.row + v * kLanes * sizeof(float);
      for (int64_t q = 0; q < window.columns; ++q, from += window.column) total = total + load((const float*)from, some);
    }
    store(totals + v * kLanes, total, kLanes);
  }
}

// Exact sums of bytes, and the numbers that they stand for.
void add_integers(const Step& s, const Window& window, int n, float* totals) {
  alignas(64) int32_t sums[kStrip];
  sum_of_window(sums, window, n);
  const F zeros = set((float)(window.rows * window.columns * s.x_zero));
  for (int v = 0; v * kLanes < n; ++v)
    store(totals + v * kLanes, (to_float(load_int(sums + v * kLanes)) - zeros) * set(s.x_scale()), kLanes);
}

// Of `n` channels, up to 64, as bytes, as floats or both. `mode` 2: divided by the pixels of the image in the window; 1:
// by all pixels of the window, or by `extra`.
void average_of(const Step& s, bool floats, const Window& window, uint8_t* y, float* z, int n) {
  const float count = (float)(s.mode == 2 ? window.rows * window.columns : s.extra);
  alignas(64) float totals[kStrip];
  if (floats) add_floats(window, n, totals);
  else add_integers(s, window, n, totals);
  for (int v = 0; v * kLanes < n; ++v) {
    const int some = std::min(kLanes, n - v * kLanes);
    const F value = activated(load(totals + v * kLanes) * set(1.0f / count), s.activation, s.a(), s.b());
    if (z) store(z + v * kLanes, value, some);
    if (!y) continue;
    const I integers = rounded(clamped(value * set(s.inverse()), -1e9f, 1e9f));
    store_bytes<1>(y + v * kLanes, &integers, Range(s.zero, s.low, s.high), some);
  }
}

}  // namespace

// `mode` 0: the largest, whose scale is that of x; else averages.
void pool(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none, &out = s.y >= 0 ? y : z;
  const int64_t strips = (x.c + kStrip - 1) / kStrip;
  const int64_t most = out.pixels() * s.kernel_h * s.kernel_w * x.c / (4 * kPartValues);
  in_parallel(run, out.pixels() * strips, 1, most, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / strips / out.w, j = at / strips % out.w, c = at % strips * kStrip;
      const int n = (int)std::min<int64_t>(kStrip, x.c - c);
      const Window window = window_of(s, x, i, j, c);
      if (s.mode == 0) largest_of_window(y.bytes(i, j) + c, window, n);
      else average_of(s, x.size == 4, window, y.data ? y.bytes(i, j) + c : nullptr, z.data ? z.floats(i, j) + c : nullptr, n);
    }
  });
}

}  // namespace quant2e
