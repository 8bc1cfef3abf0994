// Elementwise ops: sums and products of two tensors, functions of one, and joining channels.

#include "bytes.h"
#include "epilogue.h"

namespace quant2e {
namespace {

enum Op : int64_t { kAdd, kMultiply, kSubtract };

using Values = F[kStrip / kLanes];  // of up to 64 channels

// Values of a tensor as floats.
struct Operand {
  const View& view;
  bool bytes;
  float scale, zero;

  ALWAYS_INLINE void read(Values& to, int64_t i, int64_t j, int64_t c, int n) const {
    // one row, one column or one pixel serve all
    i = view.h == 1 ? 0 : i, j = view.w == 1 ? 0 : j;
    const char* from = view.at(i, j) + c * view.size;
#pragma GCC unroll 4
    for (int v = 0; v < kStrip / kLanes; ++v) {
      const int some = std::max(0, std::min(n - v * kLanes, kLanes));
      if (bytes) to[v] = (load_bytes((const uint8_t*)from + v * kLanes, some) - set(zero)) * set(scale);
      else to[v] = load((const float*)from + v * kLanes, some);
    }
  }
};

struct Output {
  const View &y, &z;
  bool has_y, has_z;
  Range range;
  F inverse;
  int64_t activation;
  float a, b;

  ALWAYS_INLINE void put(int64_t i, int64_t j, int64_t c, Values& values, int n) const {
    if (activation != kNone)
      for (F& value : values) value = activated(value, activation, a, b);
    if (has_z)
      for (int v = 0; v * kLanes < n; ++v)
        store(z.floats(i, j) + c + v * kLanes, values[v], std::min(n - v * kLanes, kLanes));
    if (!has_y) return;
    I integers[kStrip / kLanes];
    for (int v = 0; v < kStrip / kLanes; ++v) integers[v] = rounded(clamped(values[v] * inverse, -1e9f, 1e9f));
    store_bytes<kStrip / kLanes>(y.bytes(i, j) + c, integers, range, n);
  }
};

// Pixels [begin, end), channels [c, c + n).
template <int kOp>
void combine(const Operand& one, const Operand& two, const Output& out, const View& shape, int64_t begin, int64_t end,
             int64_t c, int n) {
  const bool single = two.view.pixels() == 1;
  Values x, y;
  two.read(y, 0, 0, c, n);
  for (int64_t at = begin, i = begin / shape.w, j = begin % shape.w; at < end; ++at) {
    one.read(x, i, j, c, n);
    if (!single) two.read(y, i, j, c, n);
#pragma GCC unroll 4
    for (int v = 0; v < kStrip / kLanes; ++v)
      x[v] = kOp == kAdd ? x[v] + y[v] : kOp == kMultiply ? x[v] * y[v] : x[v] - y[v];
    out.put(i, j, c, x, n);
    if (++j == shape.w) j = 0, ++i;
  }
}

}  // namespace

void binary(const Run& run, const Step& s) {
  const View x = run.view(s.x), other = run.view(s.other), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const Operand a{x, run.tensors[s.x].type == kUint8, s.x_scale(), (float)s.x_zero};
  const Operand b{other, run.tensors[s.other].type == kUint8, s.other_scale(), (float)s.other_zero};
  const Output out{y, z, s.y >= 0, s.z >= 0, Range(s.zero, s.low, s.high), set(s.inverse()), s.activation, s.a(), s.b()};
  const View& shape = s.y >= 0 ? y : z;
  const auto compute = s.mode == kAdd ? combine<kAdd> : s.mode == kMultiply ? combine<kMultiply> : combine<kSubtract>;
  in_parallel(run, shape.pixels(), 4, shape.pixels() * shape.c / kPartValues, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPixels = 64;  // whose other channels are still in the cache
    for (; begin < end; begin += kPixels)
      for (int64_t c = 0; c < shape.c; c += kStrip)
        compute(a, b, out, shape, begin, std::min(end, begin + kPixels), c, (int)std::min<int64_t>(kStrip, shape.c - c));
  });
}

// A function of floats, or of bytes by a table of 256 (`weight`).
void unary(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const uint8_t* table = run.constant<uint8_t>(s.weight);
  const Operand a{x, run.tensors[s.x].type == kUint8, s.x_scale(), (float)s.x_zero};
  const Output out{y, z, s.y >= 0, s.z >= 0, Range(s.zero, s.low, s.high), set(s.inverse()), s.activation, s.a(), s.b()};
  in_parallel(run, x.pixels(), 4, x.pixels() * x.c / kPartValues, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / x.w, j = at % x.w;
      if (table) {
        const uint8_t* from = x.bytes(i, j);
        uint8_t* to = y.bytes(i, j);
        for (int64_t c = 0; c < x.c; ++c) to[c] = table[from[c]];
        continue;
      }
      for (int64_t c = 0; c < x.c; c += kStrip) {
        const int n = (int)std::min<int64_t>(kStrip, x.c - c);
        Values values;
        a.read(values, i, j, c, n);
        out.put(i, j, c, values, n);
      }
    }
  });
}

// Channels of x go to channel `extra` of y on; by a table where the scales differ. `mode` 1: values of a pixel in the
// order in which an image with channels first has them, one row for the whole image.
void concat(const Run& run, const Step& s) {
  const View x = run.view(s.x), y = run.view(s.y);
  const uint8_t* table = run.constant<uint8_t>(s.weight);
  for (int64_t i = 0; i < x.h; ++i) {
    if (s.mode == 0 && !table && x.c == y.c) {
      std::memcpy(y.bytes(i, 0), x.bytes(i, 0), x.w * x.c);
      continue;
    }
    for (int64_t j = 0; j < x.w; ++j) {
      const uint8_t* from = x.bytes(i, j);
      if (s.mode == 1) {
        uint8_t* to = y.bytes(0, 0) + i * x.w + j;
        for (int64_t c = 0; c < x.c; ++c) to[c * x.h * x.w] = table ? table[from[c]] : from[c];
        continue;
      }
      uint8_t* to = y.bytes(i, j) + s.extra;
      if (!table) std::memcpy(to, from, x.c);
      else
        for (int64_t c = 0; c < x.c; ++c) to[c] = table[from[c]];
    }
  }
}

}  // namespace quant2e
