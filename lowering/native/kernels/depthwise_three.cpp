// Depthwise 3 x 3: interleaved columns stay in registers, and move on by a pixel with every output.

#include "depthwise.h"

namespace quant2e {
namespace {

// What a piece of work reads and writes: addresses of its first pixel.
struct Lines {
  const uint8_t* from[4];  // rows of the image
  uint8_t* y[2];           // rows of outputs; the second is that of the first where there is one only
  const int8_t* weights;
  const float *scale, *bias;
  const int32_t* init;
};

Lines lines_of(const Depthwise& d, const Rows& r, int64_t together) {
  const Step& s = d.step;
  const int64_t top = r.i * s.stride_h - s.top, last = d.x.h + d.x.pad_h - 1;
  Lines lines{};
  // what is below the image is multiplied by 0, or for a row of outputs that is not there
  for (int k = 0; k < 4; ++k) lines.from[k] = d.x.bytes(std::min(top + k, last), -s.left) + r.channel;
  for (int t = 0; t < 2 && d.y.data; ++t) lines.y[t] = d.y.bytes(r.i + (t < r.rows ? t : 0), 0) + r.channel;
  lines.weights = d.packed(r.channel, 1, together);
  lines.scale = d.epilogue.scale + r.channel, lines.bias = d.epilogue.bias + r.channel;
  lines.init = d.init + r.channel;
  return lines;
}

// Sums of one pixel of V registers, from three columns. T: rows of outputs that have weights; `t`: which of them.
template <int V, int T>
ALWAYS_INLINE void sums_of(I* sums, const B* one, const B* two, const B* three, const Lines& lines, int t) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int8_t* w = lines.weights + 256 * t + 64 * v;
    sums[v] = dot_lanes(load_int(lines.init + v * kLanes), one[v], load_weights(w));
    sums[v] = dot_lanes(sums[v], two[v], load_weights(w + 256 * T));
    sums[v] = dot_lanes(sums[v], three[v], load_weights(w + 512 * T));
  }
}

// `count` pixels from (i, j) on, whose sums lie one behind the other.
template <int V, int P, Ending kHow>
ALWAYS_INLINE void put(const Depthwise& d, const Rows& r, const Lines& lines, const Epilogue& e, const I* sums,
                       const F* scale, const F* bias, const Range& range, int64_t t, int64_t j) {
  const int count = (int)std::min<int64_t>(P, d.out.w - j);
  if constexpr (kHow == kAny) {
    alignas(64) int32_t memory[V * P * kLanes];
    for (int v = 0; v < V * P; ++v) store_int(memory + v * kLanes, sums[v]);
    for (int p = 0; p < count; ++p) finish<V>(memory + p * V * kLanes, e, d.pixel(r.i + t, j + p, r.channel), r.n);
  } else if constexpr (kHow == kBoth) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
      if (p < count) finish_both<V>(sums + p * V, e, scale, bias, range, d.pixel(r.i + t, j + p, r.channel), r.n);
  } else {
    finish_fast<V * P, kHow>(sums, e, scale, bias, range, lines.y[t] + j * d.y.pixel, count * r.n);
  }
}

ALWAYS_INLINE void move(const uint8_t* (&rows)[4], int64_t by) {
  for (int k = 0; k < 4; ++k) rows[k] += by;
}

// Stride 1: two rows of outputs of the same four rows. V registers a pixel, P pixels interleaved at once.
template <int V, int P, Ending kHow>
void one_by_one(const Depthwise& d, const Rows& r) {
  const Lines lines = lines_of(d, r, 2);
  Epilogue e = d.epilogue;
  e.scale = lines.scale, e.bias = lines.bias;
  const Range range = e.range;
  const int64_t c = d.x.c;
  const uint8_t* rows[4] = {lines.from[0], lines.from[1], lines.from[2], lines.from[3]};
  B columns[2 + P][V];
  for (int k = 0; k < 2; ++k, move(rows, c)) interleave<V>(columns[k], rows, r.n);
  F scale[V * P], bias[V * P];  // in registers, as what is stored may lie anywhere
  for (int v = 0; v < V * P; ++v) scale[v] = load(lines.scale + v % V * kLanes), bias[v] = load(lines.bias + v % V * kLanes);
#pragma GCC unroll 3
  for (int64_t j = 0; j < d.out.w; j += P, move(rows, P * c)) {
    interleave<V * P>(&columns[2][0], rows, P > 1 ? 64 : r.n);
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      if (t && r.rows == 1) break;
      I sums[P * V];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums_of<V, 2>(sums + p * V, columns[p], columns[p + 1], columns[p + 2], lines, t);
      put<V, P, kHow>(d, r, lines, e, sums, scale, bias, range, t, j);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[0][v] = columns[P][v], columns[1][v] = columns[P + 1][v];
  }
}

// Stride 2: one row of outputs, every second column.
template <int V, Ending kHow>
void two_by_two(const Depthwise& d, const Rows& r) {
  const Lines lines = lines_of(d, r, 1);
  Epilogue e = d.epilogue;
  e.scale = lines.scale, e.bias = lines.bias;
  const Range range = e.range;
  const int64_t c = d.x.c;
  const uint8_t* rows[4] = {lines.from[0], lines.from[1], lines.from[2], lines.from[3]};
  F scale[V], bias[V];
  for (int v = 0; v < V; ++v) scale[v] = load(lines.scale + v * kLanes), bias[v] = load(lines.bias + v * kLanes);
  B columns[3][V];
  interleave<V>(columns[0], rows, r.n), move(rows, c);
  for (int64_t j = 0; j < d.out.w; ++j) {
    interleave<V>(columns[1], rows, r.n), move(rows, c);
    interleave<V>(columns[2], rows, r.n), move(rows, c);
    I sums[V];
    sums_of<V, 1>(sums, columns[0], columns[1], columns[2], lines, 0);
    put<V, 1, kHow>(d, r, lines, e, sums, scale, bias, range, 0, j);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[0][v] = columns[2][v];
  }
}

template <Ending kHow>
Kernel kernel_of(const Step& s, int n) {
  if (s.stride_w == 2) return {1, n <= 16 ? two_by_two<1, kHow> : n <= 32 ? two_by_two<2, kHow> : two_by_two<4, kHow>};
  const bool whole = n == s.outputs * s.groups && s.every_w == 1;  // all channels: pixels lie one behind the other
  if (whole && n == 16) return {2, one_by_one<1, 4, kHow>};
  if (whole && n == 32) return {2, one_by_one<2, 2, kHow>};
  return {2, n <= 16 ? one_by_one<1, 1, kHow> : n <= 32 ? one_by_one<2, 1, kHow> : one_by_one<4, 1, kHow>};
}

// `kCount`: of registers. Where they are few, columns are better off in the L1 cache.
template <int kCount>
Kernel kernel_with(const Step& s, int n) {
  if constexpr (kCount < 32) return any_size(s, n);
  else switch (depthwise_ending_of(s)) {
      case kFolded: return kernel_of<kFolded>(s, n);
      case kOnlyHardswish: return kernel_of<kOnlyHardswish>(s, n);
      case kBoth: return kernel_of<kBoth>(s, n);
      default: return kernel_of<kAny>(s, n);
    }
}

}  // namespace

Kernel three_by_three(const Step& s, int n) { return kernel_with<kRegisters>(s, n); }

}  // namespace quant2e
