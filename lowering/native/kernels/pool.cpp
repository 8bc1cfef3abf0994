// Pools: the largest byte of a window, and averages.

#include "epilogue.h"

namespace quant2e {
namespace {

constexpr int kStrip = 64;  // channels at a time

struct Window {
  int64_t top, bottom, left, right;
};

// The part of a window that lies in the image.
Window window_of(const Step& s, const View& x, int64_t i, int64_t j) {
  const int64_t h = i * s.stride_h - s.top, w = j * s.stride_w - s.left;
  return {std::max<int64_t>(h, 0), std::min(h + s.kernel_h, x.h), std::max<int64_t>(w, 0), std::min(w + s.kernel_w, x.w)};
}

// Dilated windows: every dilation_h-th row.
void largest_of(const Step& s, const View& x, const View& y, int64_t i, int64_t j) {
  const int64_t h = i * s.stride_h - s.top, w = j * s.stride_w - s.left;
  uint8_t* to = y.bytes(i, j);
  for (int64_t c = 0; c < x.c; c += kStrip) {
    const int64_t n = std::min<int64_t>(kStrip, x.c - c);
    uint8_t best[kStrip] = {};
    for (int64_t p = 0; p < s.kernel_h; ++p)
      for (int64_t q = 0; q < s.kernel_w; ++q) {
        const int64_t row = h + p * s.dilation_h, column = w + q * s.dilation_w;
        if (row < 0 || row >= x.h || column < 0 || column >= x.w) continue;
        const uint8_t* from = x.bytes(row, column) + c;
        take_larger(best, from, (int)n);
      }
    std::memcpy(to + c, best, n);
  }
}

void add_floats(const View& x, const Window& window, int64_t c, int n, float* totals) {
  for (int64_t p = window.top; p < window.bottom; ++p)
    for (int64_t q = window.left; q < window.right; ++q)
      for (int v = 0; v * kLanes < n; ++v) {
        const int some = std::min(kLanes, n - v * kLanes);
        store(totals + v * kLanes, load(totals + v * kLanes) + load(x.floats(p, q) + c + v * kLanes, some), kLanes);
      }
}

// Exact sums of bytes, and the numbers that they stand for.
void add_integers(const Step& s, const View& x, const Window& window, int64_t c, int n, float* totals) {
  int32_t sums[kStrip] = {};
  for (int64_t p = window.top; p < window.bottom; ++p)
    for (int64_t q = window.left; q < window.right; ++q) add_bytes(sums, x.bytes(p, q) + c, n);
  const F zeros = set((float)((window.bottom - window.top) * (window.right - window.left) * s.x_zero));
  for (int v = 0; v < kStrip / kLanes; ++v)
    store(totals + v * kLanes, (to_float(load_int(sums + v * kLanes)) - zeros) * set(s.x_scale()), kLanes);
}

// `mode` 2: divided by the pixels of the image in the window; 1: by all pixels of the window, or by `extra`.
void average_of(const Step& s, const View& x, const View& y, const View& z, int64_t i, int64_t j) {
  const Window window = window_of(s, x, i, j);
  const int64_t inside = (window.bottom - window.top) * (window.right - window.left);
  const float count = (float)(s.mode == 2 ? inside : s.extra);
  for (int64_t c = 0; c < x.c; c += kStrip) {
    const int n = (int)std::min<int64_t>(kStrip, x.c - c);
    float totals[kStrip] = {};
    if (x.size == 4) add_floats(x, window, c, n, totals);
    else add_integers(s, x, window, c, n, totals);
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
