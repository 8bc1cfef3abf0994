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

// The part of the window of an output that lies in the image.
Window window_of(const Step& s, const View& x, int64_t i, int64_t j) {
  const int64_t h = i * s.stride_h - s.top, w = j * s.stride_w - s.left;
  const Part rows = part_of(h, s.kernel_h, s.dilation_h, x.h), columns = part_of(w, s.kernel_w, s.dilation_w, x.w);
  const uint8_t* data = (const uint8_t*)x.at(h + rows.first * s.dilation_h, w + columns.first * s.dilation_w);
  return {data, rows.count, columns.count, s.dilation_h * x.row() * x.size, s.dilation_w * x.c * x.size};
}

void largest_of(const Step& s, const View& x, const View& y, int64_t i, int64_t j) {
  uint8_t* to = y.bytes(i, j);
  Window window = window_of(s, x, i, j);
  for (int64_t c = 0; c < x.c; c += kStrip, window.data += kStrip)
    largest_of_window(to + c, window, (int)std::min<int64_t>(kStrip, x.c - c));
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

// `mode` 2: divided by the pixels of the image in the window; 1: by all pixels of the window, or by `extra`.
void average_of(const Step& s, const View& x, const View& y, const View& z, int64_t i, int64_t j) {
  Window window = window_of(s, x, i, j);
  const int64_t inside = window.rows * window.columns;
  const float count = (float)(s.mode == 2 ? inside : s.extra);
  for (int64_t c = 0; c < x.c; c += kStrip, window.data += kStrip * x.size) {
    const int n = (int)std::min<int64_t>(kStrip, x.c - c);
    alignas(64) float totals[kStrip];
    if (x.size == 4) add_floats(window, n, totals);
    else add_integers(s, window, n, totals);
    for (int v = 0; v * kLanes < n; ++v) {
      const int lanes_here = std::min(kLanes, n - v * kLanes);
      const F value = activated(load(totals + v * kLanes) * set(1.0f / count), s.activation, s.a(), s.b());
      if (s.z >= 0) store(z.floats(i, j) + c + v * kLanes, value, lanes_here);
      if (s.y < 0) continue;
      const I integers = rounded(clamped(value * set(s.inverse()), -1e9f, 1e9f));
      store_bytes<1>(y.bytes(i, j) + c + v * kLanes, &integers, Range(s.zero, s.low, s.high), lanes_here);
    }
  }
}

}  // namespace

// `mode` 0: the largest, whose scale is that of x; else averages.
void pool(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none, &out = s.y >= 0 ? y : z;
  in_parallel(run, out.pixels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      if (s.mode == 0) largest_of(s, x, y, at / out.w, at % out.w);
      else average_of(s, x, y, z, at / out.w, at % out.w);
    }
  });
}

}  // namespace quant2e
