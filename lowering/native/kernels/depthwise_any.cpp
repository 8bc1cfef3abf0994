// Depthwise convolutions of other sizes: interleaved columns lie in the L1 cache, and 16 channels are computed at a time.

#include "depthwise.h"

namespace quant2e {
namespace {

constexpr int kColumns = 128;  // interleaved at a time, of groups of four rows
#ifdef ADDS_PAIRS
constexpr int kFew = 32;  // columns of each group, where one output needs no more: they stay in the L1 cache
#else
constexpr int kFew = kColumns;
#endif
constexpr int kOutputs = 64;   // that wait for the other channels of their pixel, of all rows

struct Memory {
  alignas(64) Widened columns[(kColumns + 4) * 4];
  alignas(64) int32_t sums[kOutputs * kStrip];
};

// Columns of outputs [j, j + count), and where their sums are: [row][column][V].
struct Piece {
  int64_t j, count;
};

int64_t columns_of(const Step& s, int64_t count) { return (count - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1; }

// Interleaves the columns that a piece reads: [group of four rows][column][V]. Of a kernel of one row, which is packed
// as four, these are that row four times, each time `extra` columns further on.
template <int V>
void fill(const Depthwise& d, const Rows& r, const Piece& p, int64_t groups, Widened* to) {
  const Step& s = d.step;
  const int64_t last = d.x.h + d.x.pad_h - 1, top = r.i * s.stride_h - s.top, left = p.j * s.stride_w - s.left;
  const int64_t columns = columns_of(s, p.count), c = d.x.c;
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* rows[4];  // what is below the image is multiplied by 0, or for rows of outputs that are not there
    for (int k = 0; k < 4; ++k)
      rows[k] = d.x.bytes(std::min(top + (4 * g + k) * s.dilation_h, last), left + k * s.extra) + r.channel;
    for (int64_t q = 0; q < columns; ++q, to += V) {
      interleave_widened<V>(to, rows, r.n);
      for (int k = 0; k < 4; ++k) rows[k] += c;
    }
  }
}

// T rows of J outputs, of 16 channels: all sums stay in registers. W: columns of the kernel, S: the stride, G: groups of
// four rows; `row`: values between the sums of two rows.
template <int V, int G, int T, int W, int S, int J>
ALWAYS_INLINE void square(const Widened* columns, int64_t group, const int8_t* packed, I init, int32_t* out, int64_t row) {
  constexpr int kRead = (J - 1) * S + W;
  I sums[T][J];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums[t][j] = init;
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g) {
    Widened bytes[kRead];
#pragma GCC unroll 16
    for (int q = 0; q < kRead; ++q) bytes[q] = columns[g * group + q * V];
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const B weights = load_weights(packed + 256 * ((k * G + g) * T + t));
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) sums[t][j] = dot_lanes(sums[t][j], bytes[j * S + k], weights);
      }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store_int(out + t * row + j * V * kLanes, sums[t][j]);
}

// 16 channels of a piece, by squares of J columns; what is left over by squares of one.
template <int V, int G, int T, int W, int S, int J>
void sixteen(const Step&, const Widened* columns, int64_t group, const int8_t* packed, I init, int64_t count, int32_t* out) {
  const int64_t row = count * V * kLanes;
  int64_t j = 0;
  for (; j + J <= count; j += J)
    square<V, G, T, W, S, J>(columns + j * S * V, group, packed, init, out + j * V * kLanes, row);
  for (; j < count; ++j) square<V, G, T, W, S, 1>(columns + j * S * V, group, packed, init, out + j * V * kLanes, row);
}

#ifdef ADDS_PAIRS
// The same where registers are few: they hold the weights of eight channels while a row of outputs goes by.
template <int V, int G, int T, int W, int S>
void sixteen_by_rows(const Step&, const Widened* columns, int64_t group, const int8_t* packed, I init, int64_t count, int32_t* out) {
  for (int t = 0; t < T; ++t, out += count * V * kLanes)
    for (int g = 0; g < G; ++g)
      dot_columns<W, V * kLanes, V>(out, columns + g * group, S * V, packed + 256 * (g * T + t), 256 * G * T, init, g == 0, count);
}
#endif

// As `sixteen`, for any kernel, stride and dilation.
template <int V, int G, int T>
void sixteen_of_any(const Step& s, const Widened* columns, int64_t group, const int8_t* packed, I init, int64_t count, int32_t* out) {
  for (int64_t j = 0; j < count; ++j, columns += s.stride_w * V, out += V * kLanes) {
    I sums[T];
    for (int t = 0; t < T; ++t) sums[t] = init;
    for (int64_t k = 0; k < s.kernel_w; ++k)
      for (int g = 0; g < G; ++g) {
        const Widened bytes = columns[g * group + k * s.dilation_w * V];
        for (int t = 0; t < T; ++t)
          sums[t] = dot_lanes(sums[t], bytes, load_weights(packed + 256 * ((k * G + g) * T + t)));
      }
    for (int t = 0; t < T; ++t) store_int(out + t * count * V * kLanes, sums[t]);
  }
}

using Sixteen = void (*)(const Step&, const Widened*, int64_t, const int8_t*, I, int64_t, int32_t*);

// Writes the outputs of a piece, all channels of a pixel together.
template <int V, Ending kHow>
void put(const Depthwise& d, const Rows& r, const Piece& p, const int32_t* sums) {
  Epilogue e = d.epilogue;
  e.scale += r.channel, e.bias += r.channel;
  const Range range = e.range;
  F scale[V], bias[V];  // in registers
  for (int v = 0; v < V; ++v) scale[v] = load(e.scale + v * kLanes), bias[v] = load(e.bias + v * kLanes);
  const int64_t pixel = d.y.pixel;
  for (int64_t t = 0; t < r.rows; ++t) {
    uint8_t* y = d.y.data ? d.y.bytes(r.i + t, p.j) + r.channel : nullptr;
    for (int64_t j = 0; j < p.count; ++j, sums += V * kLanes, y += pixel) {
      if constexpr (kHow == kAny) {
        finish<V>(sums, e, d.pixel(r.i + t, p.j + j, r.channel), r.n);
        continue;
      }
      I values[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) values[v] = load_int(sums + v * kLanes);
      if constexpr (kHow == kBoth) {
        finish_both<V>(values, e, scale, bias, range, d.pixel(r.i + t, p.j + j, r.channel), r.n);
        continue;
      }
      finish_fast<V, kHow>(values, e, scale, bias, range, y, r.n);
    }
  }
}

using Put = void (*)(const Depthwise&, const Rows&, const Piece&, const int32_t*);

template <int V>
Put put_of(Ending how) {
  switch (how) {
    case kFolded: return put<V, kFolded>;
    case kOnlyHardswish: return put<V, kOnlyHardswish>;
    case kBoth: return put<V, kBoth>;
    default: return put<V, kAny>;
  }
}

template <int V, int G, int T, Sixteen kCompute>
void rows_of(const Depthwise& d, const Rows& r) {
  const Step& s = d.step;
  Memory memory;
  const int64_t reach = columns_of(s, 1), columns = std::max<int64_t>(std::min(kFew, kColumns / G), reach);
  const int64_t most = std::min<int64_t>(kOutputs / T, (columns - reach) / s.stride_w + 1);
  const int8_t* packed = d.packed(r.channel, G, T);
  const auto write = put_of<V>(depthwise_ending_of(s));
  for (int64_t j = 0; j < d.out.w; j += most) {
    const Piece p{j, std::min(most, d.out.w - j)};
    fill<V>(d, r, p, G, memory.columns);
    const int64_t group = columns_of(s, p.count) * V;
    for (int v = 0; v * kLanes < r.n; ++v)
      kCompute(s, memory.columns + v, group, packed + 64 * v, load_int(d.init + r.channel + v * kLanes), p.count,
               memory.sums + v * kLanes);
    write(d, r, p, memory.sums);
  }
}

template <int V, int G, int T>
Kernel kernel_of_any() { return {T, rows_of<V, G, T, sixteen_of_any<V, G, T>>}; }

// `inner`: rows of outputs that weights are there for. `kCount`: of registers, which hold squares of sums if they are many.
template <int V, int kCount>
Kernel kernel_of(const Step& s) {
  const bool tall = s.kernel_h > 4;
#ifdef ADDS_PAIRS
  if (s.inner == 1) return {1, rows_of<V, 1, 1, sixteen_by_rows<V, 1, 1, 3, 2>>};
  if (s.inner == 2 && !tall) return {2, rows_of<V, 1, 2, sixteen_by_rows<V, 1, 2, 3, 1>>};
  if (s.inner == 2 && s.kernel_w == 5)
    return {2, s.stride_w == 2 ? rows_of<V, 2, 2, sixteen_by_rows<V, 2, 2, 5, 2>> : rows_of<V, 2, 2, sixteen_by_rows<V, 2, 2, 5, 1>>};
#endif
  if (s.inner < 2) return tall ? kernel_of_any<V, 2, 1>() : kernel_of_any<V, 1, 1>();
  if constexpr (kCount < 32) return tall ? kernel_of_any<V, 2, 2>() : kernel_of_any<V, 1, 2>();
  else if (s.kernel_w == 7) return {2, rows_of<V, 2, 2, sixteen<V, 2, 2, 7, 1, 7>>};
  else if (s.stride_w == 2) return {2, rows_of<V, 2, 2, sixteen<V, 2, 2, 5, 2, 4>>};
  else return {2, rows_of<V, 2, 2, sixteen<V, 2, 2, 5, 1, 7>>};
}

}  // namespace

Kernel any_size(const Step& s, int n) {
  return n <= 16 ? kernel_of<1, kRegisters>(s) : n <= 32 ? kernel_of<2, kRegisters>(s) : kernel_of<4, kRegisters>(s);
}

}  // namespace quant2e
