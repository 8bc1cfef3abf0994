// Elementwise ops: sums and products of two tensors, functions of one, and joining channels.

#include "epilogue.h"

namespace quant2e {
namespace {

enum Op : int64_t { kAdd, kMultiply, kSubtract };

// Values of a tensor as floats.
struct Operand {
  const View& view;
  bool bytes;
  float scale, zero;

  ALWAYS_INLINE F at(int64_t i, int64_t j, int64_t c, int n) const {
    // one row, one column or one channel serve all
    i = view.h == 1 ? 0 : i, j = view.w == 1 ? 0 : j;
    if (bytes) return (load_bytes(view.bytes(i, j) + c, n) - set(zero)) * set(scale);
    return load(view.floats(i, j) + c, n);
  }
};

struct Output {
  const View &y, &z;
  bool has_y, has_z;

  ALWAYS_INLINE void put(const Step& s, int64_t i, int64_t j, int64_t c, F value, int n) const {
    value = activated(value, s.activation, s.a(), s.b());
    if (has_z) store(z.floats(i, j) + c, value, n);
    if (!has_y) return;
    const I integers = rounded(clamped(value * set(s.inverse()), -1e9f, 1e9f));
    store_bytes<1>(y.bytes(i, j) + c, &integers, Range(s.zero, s.low, s.high), n);
  }
};

template <int kOp>
void combine(const Run& run, const Step& s, const Operand& a, const Operand& b, const Output& out, const View& shape) {
  in_parallel(run, shape.pixels(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      for (int64_t c = 0, i = at / shape.w, j = at % shape.w; c < shape.c; c += kLanes) {
        const int n = (int)std::min<int64_t>(kLanes, shape.c - c);
        const F x = a.at(i, j, c, n), y = b.at(i, j, c, n);
        out.put(s, i, j, c, kOp == kAdd ? x + y : kOp == kMultiply ? x * y : x - y, n);
      }
  });
}

}  // namespace

void binary(const Run& run, const Step& s) {
  const View x = run.view(s.x), other = run.view(s.other), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const Operand a{x, run.tensors[s.x].type == kUint8, s.x_scale(), (float)s.x_zero};
  const Operand b{other, run.tensors[s.other].type == kUint8, s.other_scale(), (float)s.other_zero};
  const Output out{y, z, s.y >= 0, s.z >= 0};
  const View& shape = s.y >= 0 ? y : z;
  if (s.mode == kAdd) combine<kAdd>(run, s, a, b, out, shape);
  else if (s.mode == kMultiply) combine<kMultiply>(run, s, a, b, out, shape);
  else combine<kSubtract>(run, s, a, b, out, shape);
}

// A function of floats, or of bytes by a table of 256 (`weight`).
void unary(const Run& run, const Step& s) {
  const View x = run.view(s.x), none{};
  const View y = s.y >= 0 ? run.view(s.y) : none, z = s.z >= 0 ? run.view(s.z) : none;
  const uint8_t* table = run.constant<uint8_t>(s.weight);
  const Operand a{x, run.tensors[s.x].type == kUint8, s.x_scale(), (float)s.x_zero};
  const Output out{y, z, s.y >= 0, s.z >= 0};
  in_parallel(run, x.pixels(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / x.w, j = at % x.w;
      if (table) {
        const uint8_t* from = x.bytes(i, j);
        uint8_t* to = y.bytes(i, j);
        for (int64_t c = 0; c < x.c; ++c) to[c] = table[from[c]];
        continue;
      }
      for (int64_t c = 0; c < x.c; c += kLanes) {
        const int n = (int)std::min<int64_t>(kLanes, x.c - c);
        out.put(s, i, j, c, a.at(i, j, c, n), n);
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
        for (int64_t c = 0; c < x.c; ++c) to[c * x.h * x.w] = from[c];
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
