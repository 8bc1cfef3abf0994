// Sums of products of unsigned and signed bytes: what is exact, and how, on each machine.
//
// VNNI multiplies four unsigned by four signed bytes and adds them to 32 bits, exactly. AVX2 adds two products in 16
// saturating bits first; arithmetic.py proves for each layer which of its ways never saturates. A plan names that way
// wherever it was made: every machine may run it, as VNNI and plain C++ take none of them.
#pragma once

#include "simd.h"

namespace quant2e {

enum Arithmetic : int64_t {
  kExact = 0,    // any bytes
  kBounded = 1,  // no sum of two products exceeds 16 bits
  kSeven = 2,    // no sum of four products does, so that two instructions' sums are added in 16 bits
  kSigned = 3,   // activations minus 128: |a| times w with the sign of a; no weight is -128
};

// Whether sums need another way than kExact to be fast.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
#define ADDS_PAIRS 1
constexpr bool kShifts = true;  // activations by 128, for kSigned: sums begin with other numbers then
#else
constexpr bool kShifts = false;
#endif

// sums[i] += activations[4i] * weights[4i] + ... + activations[4i + 3] * weights[4i + 3]

#if defined(__AVX512VNNI__)

template <int kHow>
ALWAYS_INLINE I dot(I sums, B weights, int32_t four) {
  return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(four), weights);
}
// As `dot`, where each lane has activations of its own.
ALWAYS_INLINE I dot_lanes(I sums, B activations, B weights) { return _mm512_dpbusd_epi32(sums, activations, weights); }

#elif defined(__AVXVNNI__)

template <int kHow>
ALWAYS_INLINE I dot(I sums, B weights, int32_t four) {
  const __m256i u = _mm256_set1_epi32(four);
  return {_mm256_dpbusd_avx_epi32(sums.a, u, weights.a), _mm256_dpbusd_avx_epi32(sums.b, u, weights.b)};
}
ALWAYS_INLINE I dot_lanes(I sums, B u, B s) {
  return {_mm256_dpbusd_avx_epi32(sums.a, u.a, s.a), _mm256_dpbusd_avx_epi32(sums.b, u.b, s.b)};
}

#elif defined(ADDS_PAIRS)

// Bytes as 16-bit numbers: those with an even index, and those with an odd one.
struct Wide { __m256i even, odd; };
// The same of all sixteen lanes: what is widened once costs a third of what it costs in each product.
struct Widened { Wide half[2]; };
ALWAYS_INLINE Wide wide_unsigned(__m256i x) {
  return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
}
ALWAYS_INLINE Wide wide_signed(__m256i x) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
ALWAYS_INLINE __m256i add_wide(__m256i sums, Wide u, Wide s) {
  const __m256i more = _mm256_add_epi32(_mm256_madd_epi16(u.even, s.even), _mm256_madd_epi16(u.odd, s.odd));
  return _mm256_add_epi32(sums, more);
}
ALWAYS_INLINE __m256i add_pairs(__m256i sums, __m256i pairs) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int kHow>
ALWAYS_INLINE I dot(I sums, B weights, int32_t four) {
  const __m256i u = _mm256_set1_epi32(four);
  if constexpr (kHow == kExact) {
    const Wide wide = wide_unsigned(u);
    return {add_wide(sums.a, wide, wide_signed(weights.a)), add_wide(sums.b, wide, wide_signed(weights.b))};
  } else if constexpr (kHow == kSigned) {
    const __m256i x = _mm256_xor_si256(u, _mm256_set1_epi8((char)0x80)), size = _mm256_abs_epi8(x);
    return {add_pairs(sums.a, _mm256_maddubs_epi16(size, _mm256_sign_epi8(weights.a, x))),
            add_pairs(sums.b, _mm256_maddubs_epi16(size, _mm256_sign_epi8(weights.b, x)))};
  } else {
    return {add_pairs(sums.a, _mm256_maddubs_epi16(u, weights.a)), add_pairs(sums.b, _mm256_maddubs_epi16(u, weights.b))};
  }
}

ALWAYS_INLINE I dot_lanes(I sums, B u, B s) {
  return {add_wide(sums.a, wide_unsigned(u.a), wide_signed(s.a)), add_wide(sums.b, wide_unsigned(u.b), wide_signed(s.b))};
}

ALWAYS_INLINE I dot_lanes(I sums, const Widened& u, B s) {
  return {add_wide(sums.a, u.half[0], wide_signed(s.a)), add_wide(sums.b, u.half[1], wide_signed(s.b))};
}

// Adds W columns' products to each of `count` sums, which lie kStep lanes apart; of the next sum the columns lie `next`
// further. The weights of eight lanes stay in registers. `first`: sums begin with `init`, and with what is there if not.
template <int W, int kStep, int kBetween>
ALWAYS_INLINE void dot_columns(int32_t* sums, const Widened* columns, int64_t next, const int8_t* weights, int64_t apart,
                               I init, bool first, int64_t count) {
  for (int half = 0; half < 2; ++half, sums += 8) {
    Wide w[W];
#pragma GCC unroll 8
    for (int k = 0; k < W; ++k) w[k] = wide_signed(_mm256_loadu_si256((const __m256i*)(weights + k * apart) + half));
    const __m256i begin = half ? init.b : init.a;
    for (int64_t j = 0; j < count; ++j) {
      __m256i* to = (__m256i*)(sums + j * kStep);
      __m256i sum = first ? begin : _mm256_loadu_si256(to);
#pragma GCC unroll 8
      for (int k = 0; k < W; ++k) sum = add_wide(sum, columns[j * next + k * kBetween].half[half], w[k]);
      _mm256_storeu_si256(to, sum);
    }
  }
}

#else

// Sums may leave 32 bits and come back, as in registers.
ALWAYS_INLINE int32_t four_products(int32_t sum, const uint8_t* u, const int8_t* s) {
  return (int32_t)((uint32_t)sum + (uint32_t)(u[0] * s[0] + u[1] * s[1] + u[2] * s[2] + u[3] * s[3]));
}
template <int kHow>
ALWAYS_INLINE I dot(I sums, B weights, int32_t four) {
  uint8_t u[4];
  std::memcpy(u, &four, 4);
  for (int i = 0; i < kLanes; ++i) sums.v[i] = four_products(sums.v[i], u, weights.v + 4 * i);
  return sums;
}
ALWAYS_INLINE I dot_lanes(I sums, B u, B s) {
  for (int i = 0; i < kLanes; ++i) sums.v[i] = four_products(sums.v[i], (const uint8_t*)u.v + 4 * i, s.v + 4 * i);
  return sums;
}

#endif

#ifndef ADDS_PAIRS
typedef B Widened;
#endif

// Two `dot`s; by way of kSeven where there is one.
ALWAYS_INLINE I dot_two(I sums, B w, B w2, int32_t four, int32_t four2) {
#ifdef ADDS_PAIRS
  const __m256i u = _mm256_set1_epi32(four), u2 = _mm256_set1_epi32(four2);
  return {add_pairs(sums.a, _mm256_add_epi16(_mm256_maddubs_epi16(u, w.a), _mm256_maddubs_epi16(u2, w2.a))),
          add_pairs(sums.b, _mm256_add_epi16(_mm256_maddubs_epi16(u, w.b), _mm256_maddubs_epi16(u2, w2.b)))};
#else
  return dot<kExact>(dot<kExact>(sums, w, four), w2, four2);
#endif
}

}  // namespace quant2e
