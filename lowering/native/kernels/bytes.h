// Bytes before they are numbers: brought side by side, compared and counted. With simd.h and dot.h the only file with
// intrinsics.
#pragma once

#include "dot.h"

namespace quant2e {

constexpr int kStrip = 64;  // channels at a time

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// 16 channels of four rows, those from v * 16 on; the first `n` bytes of a row may be read, with V of 1 or 2 also more.
template <int V>
ALWAYS_INLINE void load_rows(__m128i (&r)[4], const uint8_t* const (&rows)[4], int v, int n) {
  for (int i = 0; i < 4; ++i) {
    uint8_t some[kLanes] = {};
    const uint8_t* from = rows[i] + v * kLanes;
    const int left = n - v * kLanes;
    if (V > 2 && left < kLanes) std::memcpy(some, from, std::max(left, 0)), from = some;
    r[i] = _mm_loadu_si128((const __m128i*)from);
  }
}
#endif

// Interleaves four rows of up to V * 16 channels, byte by byte: [V][16 channels][4 rows]. The first `n` bytes of each
// row are read; with V of 1 or 2 also those up to V * 16, which no one uses.
template <int V>
ALWAYS_INLINE void interleave(B* to, const uint8_t* const (&rows)[4], int n) {
#if defined(__AVX512VNNI__)
  // unpacking works within 128 bits: channels are brought there that belong side by side
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i r[4];
  for (int i = 0; i < 4; ++i) {
    if (V == 1) r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)rows[i]));
    else if (V == 2) r[i] = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)rows[i]));
    else r[i] = n == 64 ? _mm512_loadu_si512(rows[i]) : _mm512_maskz_loadu_epi8(bits(n), rows[i]);
    r[i] = _mm512_permutexvar_epi32(order, r[i]);
  }
  const __m512i low = _mm512_unpacklo_epi8(r[0], r[1]), low2 = _mm512_unpacklo_epi8(r[2], r[3]);
  to[0] = _mm512_unpacklo_epi16(low, low2);
  if (V > 1) to[V > 1] = _mm512_unpackhi_epi16(low, low2);
  if (V < 4) return;
  const __m512i high = _mm512_unpackhi_epi8(r[0], r[1]), high2 = _mm512_unpackhi_epi8(r[2], r[3]);
  to[V > 2 ? 2 : 0] = _mm512_unpacklo_epi16(high, high2);
  to[V > 2 ? 3 : 0] = _mm512_unpackhi_epi16(high, high2);
#elif defined(__AVX2__)
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    __m128i r[4];
    load_rows<V>(r, rows, v, n);
    const __m128i low = _mm_unpacklo_epi8(r[0], r[1]), low2 = _mm_unpacklo_epi8(r[2], r[3]);
    const __m128i high = _mm_unpackhi_epi8(r[0], r[1]), high2 = _mm_unpackhi_epi8(r[2], r[3]);
    to[v] = {_mm256_set_m128i(_mm_unpackhi_epi16(low, low2), _mm_unpacklo_epi16(low, low2)),
             _mm256_set_m128i(_mm_unpackhi_epi16(high, high2), _mm_unpacklo_epi16(high, high2))};
  }
#else
  for (int v = 0; v < V; ++v) {
    int8_t mixed[4 * kLanes];
    for (int c = 0; c < kLanes; ++c)
      for (int i = 0; i < 4; ++i) mixed[4 * c + i] = v * kLanes + c < n ? (int8_t)rows[i][v * kLanes + c] : 0;
    to[v] = load_weights(mixed);
  }
#endif
}

// As `interleave`, of bytes that are operands of many products.
template <int V>
ALWAYS_INLINE void interleave_widened(Widened* to, const uint8_t* const (&rows)[4], int n) {
#ifdef ADDS_PAIRS
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    __m128i r[4];
    load_rows<V>(r, rows, v, n);
    const __m128i even[2] = {_mm_unpacklo_epi8(r[0], r[2]), _mm_unpackhi_epi8(r[0], r[2])};
    const __m128i odd[2] = {_mm_unpacklo_epi8(r[1], r[3]), _mm_unpackhi_epi8(r[1], r[3])};
    for (int h = 0; h < 2; ++h) to[v].half[h] = {_mm256_cvtepu8_epi16(even[h]), _mm256_cvtepu8_epi16(odd[h])};
  }
#else
  interleave<V>(to, rows, n);
#endif
}

// Writes `n` of 16 pixels whose C channels are a register each.
template <int C>
ALWAYS_INLINE void store_pixels(uint8_t* to, const I* planes, const Range& range, int n) {
#if defined(__AVX512VNNI__)
  constexpr int kTwo = C > 1 ? 1 : 0, kThree = C > 2 ? 2 : 0, kFour = C > 3 ? 3 : kThree;
  const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(planes[0], planes[kTwo]), range.zero);
  const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(planes[kThree], planes[kFour]), range.zero);
  __m512i y = _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(a, b), range.low), range.high);
  alignas(64) uint8_t within[64], across[64] = {};  // four pixels of 128 bits side by side, then all of them
  for (int i = 0; i < 64; ++i) within[i] = (uint8_t)(i % 16 / C + i % 16 % C * 4);
  for (int i = 0; i < 4 * C; ++i) across[4 * i] = (uint8_t)(i / C * 4 + i % C);
  y = _mm512_permutexvar_epi32(_mm512_load_si512(across), _mm512_shuffle_epi8(y, _mm512_load_si512(within)));
  _mm512_mask_storeu_epi8(to, bits(n * C), y);
#else
  uint8_t bytes[C][kLanes], mixed[kLanes * C];
  for (int c = 0; c < C; ++c) store_bytes<1>(bytes[c], planes + c, range, kLanes);
  for (int i = 0; i < kLanes; ++i)
    for (int c = 0; c < C; ++c) mixed[i * C + c] = bytes[c][i];
  std::memcpy(to, mixed, n * C);
#endif
}

// A window of bytes: rows and columns of it, and how far apart they are.
struct Window {
  const uint8_t* data;
  int64_t rows, columns, row, column;
};

// The largest of each of `n` channels in a window, up to 64.
ALWAYS_INLINE void largest_of_window(uint8_t* __restrict__ to, const Window& w, int n) {
#if defined(__AVX512VNNI__)
  const __mmask64 mask = bits(n);
  __m512i best = _mm512_setzero_si512();
  for (int64_t p = 0; p < w.rows; ++p) {
    const uint8_t* from = w.data + p * w.row;
    for (int64_t q = 0; q < w.columns; ++q, from += w.column)
      best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(mask, from));
  }
  _mm512_mask_storeu_epi8(to, mask, best);
#else
  for (int i = 0; i < n; ++i) to[i] = 0;
  for (int64_t p = 0; p < w.rows; ++p)
    for (int64_t q = 0; q < w.columns; ++q) {
      const uint8_t* from = w.data + p * w.row + q * w.column;
      for (int i = 0; i < n; ++i) to[i] = from[i] > to[i] ? from[i] : to[i];
    }
#endif
}

constexpr int64_t kMostBytes = 257;  // whose sum is a number of 16 bits, whatever they are

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Of V * 16 channels; of the last 16 there are `n`.
template <int V>
ALWAYS_INLINE void add_window(int32_t* sums, const uint8_t* data, const Window& w, int n) {
  __m256i words[V];
  const auto hand_over = [&] {
#pragma GCC unroll 8
    for (int half = 0; half < 2 * V; ++half) {
      __m256i* to = (__m256i*)sums + half;
      const __m128i eight = half % 2 ? _mm256_extracti128_si256(words[half / 2], 1) : _mm256_castsi256_si128(words[half / 2]);
      _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_cvtepu16_epi32(eight)));
    }
    for (int v = 0; v < V; ++v) words[v] = _mm256_setzero_si256();
  };
  std::memset(sums, 0, V * kLanes * sizeof(int32_t));
  for (int v = 0; v < V; ++v) words[v] = _mm256_setzero_si256();
  int64_t left = kMostBytes;
  for (int64_t p = 0; p < w.rows; ++p) {
    const uint8_t* from = data + p * w.row;
    for (int64_t q = 0; q < w.columns; ++q, from += w.column) {
      uint8_t some[kLanes] = {};
      if (V == 1 && n < kLanes) std::memcpy(some, from, n);
      const uint8_t* bytes = V == 1 && n < kLanes ? some : from;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        words[v] = _mm256_add_epi16(words[v], _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + kLanes * v))));
      if (--left == 0) hand_over(), left = kMostBytes;
    }
  }
  hand_over();
}
#endif

// The sum of each of `n` channels in a window, up to 64; what is behind them in `sums` may be overwritten.
ALWAYS_INLINE void sum_of_window(int32_t* __restrict__ sums, const Window& w, int n) {
#if defined(__AVX512VNNI__)
  const __mmask64 mask = bits(n);
  __m512i total[4], words[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int v = 0; v < 4; ++v) total[v] = _mm512_setzero_si512();
  const auto hand_over = [&] {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i half = v % 2 ? _mm512_extracti64x4_epi64(words[v / 2], 1) : _mm512_castsi512_si256(words[v / 2]);
      total[v] = _mm512_add_epi32(total[v], _mm512_cvtepu16_epi32(half));
    }
    for (int v = 0; v < 2; ++v) words[v] = _mm512_setzero_si512();
  };
  int64_t left = kMostBytes;
  for (int64_t p = 0; p < w.rows; ++p) {
    const uint8_t* from = w.data + p * w.row;
    for (int64_t q = 0; q < w.columns; ++q, from += w.column) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i bytes = _mm256_maskz_loadu_epi8((__mmask32)(mask >> 32 * v), from + 32 * v);
        words[v] = _mm512_add_epi16(words[v], _mm512_cvtepu8_epi16(bytes));
      }
      if (--left == 0) hand_over(), left = kMostBytes;
    }
  }
  hand_over();
  for (int v = 0; v < 4; ++v) _mm512_storeu_si512(sums + kLanes * v, total[v]);
#elif defined(__AVX2__)
  if (n == kStrip) return add_window<4>(sums, w.data, w, kLanes);
  for (int c = 0; c < n; c += kLanes) add_window<1>(sums + c, w.data + c, w, std::min(kLanes, n - c));
#else
  for (int i = 0; i < n; ++i) sums[i] = 0;
  for (int64_t p = 0; p < w.rows; ++p)
    for (int64_t q = 0; q < w.columns; ++q) {
      const uint8_t* from = w.data + p * w.row + q * w.column;
      for (int i = 0; i < n; ++i) sums[i] += from[i];
    }
#endif
}

}  // namespace quant2e
