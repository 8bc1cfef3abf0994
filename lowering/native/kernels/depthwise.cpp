// Depthwise convolutions: each channel with a kernel of its own, up to 8 rows high.
//
// Four rows of the image are interleaved byte by byte, so that a lane holds one column of one channel's kernel, and one
// instruction adds four products for each of 16 channels. Interleaved columns stay in the L1 cache and serve every
// output that reads them.

#include "dot.h"
#include "epilogue.h"

namespace quant2e {

Epilogue epilogue_of(const Run& run, const Step& step);

namespace {

constexpr int kChannels = 64;
constexpr int kColumns = 48;  // interleaved at a time

struct Columns {
  alignas(64) int8_t bytes[kColumns * 2 * 4 * kChannels];
};

#if defined(__AVX512VNNI__)

// Of 64 channels: [4 blocks of 16 channels][16 channels][4 rows].
ALWAYS_INLINE void interleaved(int8_t* to, const uint8_t* const* rows, int n) {
  const __mmask64 mask = n == 64 ? ~0ull : (1ull << n) - 1;
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i r[4];  // unpacking works within 128 bits: channels are brought there that belong side by side
  for (int i = 0; i < 4; ++i)
    r[i] = rows[i] ? _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(mask, rows[i])) : _mm512_setzero_si512();
  const __m512i low = _mm512_unpacklo_epi8(r[0], r[1]), high = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i low2 = _mm512_unpacklo_epi8(r[2], r[3]), high2 = _mm512_unpackhi_epi8(r[2], r[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(low, low2));
  _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(low, low2));
  _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(high, high2));
  _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(high, high2));
}

#else

ALWAYS_INLINE void interleaved(int8_t* to, const uint8_t* const* rows, int n) {
  for (int c = 0; c < kChannels; ++c)
    for (int i = 0; i < 4; ++i) to[4 * c + i] = rows[i] && c < n ? (int8_t)rows[i][c] : 0;
}

#endif

struct Depthwise {
  const Step& step;
  const View &x, &y, &z, &added;
  Epilogue epilogue;
  const int8_t* weights;
  const int32_t* init;
};

// Sums of one pixel: every column of the kernel with its weights. W: columns of the kernel, 0 where only `kernel_w`
// knows; with constants the weights of a 3 x 3 kernel stay in registers.
template <int G, int W>
ALWAYS_INLINE void sums_of(I (&sums)[4], const int8_t* column, int64_t step, const B* weights, int64_t kernel_w) {
  const int64_t count = W ? W : kernel_w;
#pragma GCC unroll 5
  for (int64_t k = 0; k < count; ++k, column += step)
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        sums[v] = dot_lanes(sums[v], load_weights(column + (4 * g + v) * 64), weights[(k * G + g) * 4 + v]);
}

// Interleaves columns [first, first + count) of the rows that row i of the outputs reads.
template <int G>
ALWAYS_INLINE void fill(const Depthwise& d, int64_t i, int64_t channel, int n, int64_t first, int64_t count, int8_t* to) {
  const Step& s = d.step;
  const int64_t row = s.dilation_h * d.x.row(), c = d.x.c;
  const uint8_t* from = d.x.bytes(i * s.stride_h - s.top, first) + channel;
  const int in_last = (int)s.kernel_h - 4 * (G - 1);
  for (int64_t q = 0; q < count; ++q, from += c)
    for (int g = 0; g < G; ++g, to += 4 * kChannels) {
      const uint8_t* top = from + 4 * g * row;
      const int rows = g + 1 < G ? 4 : in_last;
      const uint8_t* lines[4] = {top, rows > 1 ? top + row : nullptr, rows > 2 ? top + 2 * row : nullptr,
                                 rows > 3 ? top + 3 * row : nullptr};
      interleaved(to, lines, n);
    }
}

// One row of outputs, of up to 64 channels. G: groups of four kernel rows.
template <int G, int W, bool kFast>
void line(const Depthwise& d, int64_t i, int64_t channel, int n, Columns& columns) {
  const Step& s = d.step;
  const int64_t reach = (s.kernel_w - 1) * s.dilation_w + 1, apart = s.dilation_w * G * 4 * kChannels;
  const B* packed = (const B*)(d.weights + channel / kChannels * s.kernel_w * G * 4 * kChannels);
  constexpr int kKept = W == 3 && G == 1 ? 12 : 1;
  B kept[kKept];
  if (kKept > 1)
    for (int k = 0; k < kKept; ++k) kept[k] = load_weights((const int8_t*)(packed + k));
  Epilogue e = d.epilogue;
  const Range range = e.range;
  const int64_t stride = s.stride_w, kernel_w = s.kernel_w, step = d.y.c;
  e.scale += channel, e.bias += channel;
  const float *scale = e.scale, *bias = e.bias;
  const int32_t* init = d.init + channel;
  const View& out = s.y >= 0 ? d.y : d.z;
  const int64_t at_once = std::max<int64_t>(1, (kColumns - reach) / s.stride_w + 1);
  for (int64_t from = 0; from < out.w; from += at_once) {
    const int64_t to = std::min(out.w, from + at_once), count = (to - from - 1) * s.stride_w + reach;
    fill<G>(d, i, channel, n, from * s.stride_w - s.left, count, columns.bytes);
    const int8_t* column = columns.bytes;
    uint8_t* y = s.y >= 0 ? d.y.bytes(i, from) + channel : nullptr;
    for (int64_t j = from; j < to; ++j, column += stride * G * 4 * kChannels, y += step) {
      I sums[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sums[v] = load_int(init + v * kLanes);
      sums_of<G, W>(sums, column, apart, kKept > 1 ? kept : packed, kernel_w);
      if constexpr (kFast) {
        finish_fast<4>(sums, scale, bias, range, y, n);
        continue;
      }
      const Pixel pixel{s.y >= 0 ? y : nullptr, s.z >= 0 ? d.z.floats(i, j) + channel : nullptr,
                        s.other >= 0 ? d.added.at(i, j) + channel * d.added.size : nullptr};
      finish<4>(sums, e, pixel, n);
    }
  }
}

using Line = void (*)(const Depthwise&, int64_t, int64_t, int, Columns&);

template <bool kFast>
Line line_of(const Step& s) {
  if (s.kernel_h > 4) return s.kernel_w == 5 ? line<2, 5, kFast> : line<2, 0, kFast>;
  return s.kernel_w == 3 ? line<1, 3, kFast> : line<1, 0, kFast>;
}

}  // namespace

void depthwise(const Run& run, const Step& step) {
  const View x = run.view(step.x), none{};
  const View y = step.y >= 0 ? run.view(step.y) : none, z = step.z >= 0 ? run.view(step.z) : none;
  const View added = step.other >= 0 ? run.view(step.other) : none, &out = step.y >= 0 ? y : z;
  const Depthwise d{step, x, y, z, added, epilogue_of(run, step), run.constant<int8_t>(step.weight),
                    run.constant<int32_t>(step.init)};
  const int64_t strips = (x.c + kChannels - 1) / kChannels;
  const Line compute = step.fast ? line_of<true>(step) : line_of<false>(step);
  in_parallel(run, out.h * strips, 1, [&](int64_t begin, int64_t end) {
    Columns columns;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t channel = at % strips * kChannels;
      const int n = (int)std::min<int64_t>(kChannels, x.c - channel);
      compute(d, at / strips, channel, n, columns);
    }
  });
}

}  // namespace quant2e
