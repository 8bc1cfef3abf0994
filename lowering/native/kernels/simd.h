// Sixteen lanes, whatever the machine. Intrinsics are here, in dot.h and in bytes.h, nowhere else.
//
// F: 16 floats. I: 16 int32. B: 16 groups of 4 bytes, as weights are packed. AVX-512 has them in one register, AVX2 in
// two, plain C++ in arrays. `n` is the number of lanes that memory holds: the others are neither read nor written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace quant2e {

constexpr int kLanes = 16;

#if defined(__AVX512VNNI__)

typedef __m512 F;
typedef __m512i I;
typedef __m512i B;
constexpr int kRegisters = 32;

ALWAYS_INLINE __mmask16 lanes(int n) { return (__mmask16)((1u << n) - 1); }
ALWAYS_INLINE F set(float x) { return _mm512_set1_ps(x); }
ALWAYS_INLINE I set_int(int32_t x) { return _mm512_set1_epi32(x); }
ALWAYS_INLINE F load(const float* from) { return _mm512_loadu_ps(from); }
ALWAYS_INLINE F load(const float* from, int n) { return _mm512_maskz_loadu_ps(lanes(n), from); }
ALWAYS_INLINE I load_int(const int32_t* from) { return _mm512_loadu_si512(from); }
ALWAYS_INLINE B load_weights(const int8_t* from) { return _mm512_loadu_si512(from); }
ALWAYS_INLINE F load_bytes(const uint8_t* from, int n) {
  const __m128i raw = n == kLanes ? _mm_loadu_si128((const __m128i*)from) : _mm_maskz_loadu_epi8(lanes(n), from);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(raw));
}
ALWAYS_INLINE void store(float* to, F x, int n) { _mm512_mask_storeu_ps(to, lanes(n), x); }
ALWAYS_INLINE void store_int(int32_t* to, I x) { _mm512_storeu_si512(to, x); }
ALWAYS_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
ALWAYS_INLINE I rounded(F x) { return _mm512_cvtps_epi32(x); }
ALWAYS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE F minimum(F a, F b) { return _mm512_min_ps(a, b); }
ALWAYS_INLINE F maximum(F a, F b) { return _mm512_max_ps(a, b); }
ALWAYS_INLINE F absolute(F x) { return _mm512_abs_ps(x); }
ALWAYS_INLINE F whole(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ALWAYS_INLINE F times_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }
ALWAYS_INLINE F with_sign_of(F x, F sign) {
  const __m512i bit = _mm512_set1_epi32((int32_t)0x80000000);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(x), 0xca));
}
// Values of a table, by the last five bits of each lane.
constexpr int kTable = 32;
ALWAYS_INLINE F looked_up(const float (&table)[kTable], F bits) {
  return _mm512_permutex2var_ps(load(table), _mm512_castps_si512(bits), load(table + kLanes));
}
ALWAYS_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
ALWAYS_INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }

ALWAYS_INLINE B repeated(int32_t four) { return _mm512_set1_epi32(four); }

// Rows become columns.
ALWAYS_INLINE void transpose(F (&x)[kLanes]) {
  F t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    t[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), t[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // x[4 * i + k]: of each 128 bits the column k, of four rows
    const __m512d a = _mm512_castps_pd(t[i / 2 * 4 + i % 2]), b = _mm512_castps_pd(t[i / 2 * 4 + i % 2 + 2]);
    x[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), x[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const F low = _mm512_shuffle_f32x4(x[k], x[4 + k], 0x88), high = _mm512_shuffle_f32x4(x[k], x[4 + k], 0xdd);
    const F low2 = _mm512_shuffle_f32x4(x[8 + k], x[12 + k], 0x88), high2 = _mm512_shuffle_f32x4(x[8 + k], x[12 + k], 0xdd);
    t[k] = _mm512_shuffle_f32x4(low, low2, 0x88), t[8 + k] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    t[4 + k] = _mm512_shuffle_f32x4(high, high2, 0x88), t[12 + k] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = t[i];
}

// What integers become bytes with: a zero point, and the bounds. Kept in registers, as stores of bytes may write to any
// memory that the compiler knows of.
struct Range {
  __m512i zero, low, high, order;

  ALWAYS_INLINE Range(int64_t z, int64_t l, int64_t h)
      : zero(_mm512_set1_epi16((short)z)), low(_mm512_set1_epi8((char)l)), high(_mm512_set1_epi8((char)h)),
        order(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)) {}
};

// Fewer than 16 bytes: plain stores where they do, which take less time than masked ones.
ALWAYS_INLINE void store_tail(uint8_t* to, __m128i y, int n) {
  if (n == 8) _mm_storel_epi64((__m128i*)to, y);
  else if (n) _mm_mask_storeu_epi8(to, lanes(n), y);
}

ALWAYS_INLINE uint64_t bits(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

// Bytes of V * 16 integers: plus the zero point, between the bounds; the first `n` of them are written.
template <int V>
ALWAYS_INLINE void store_bytes(uint8_t* to, const I* x, const Range& range, int n) {
  if constexpr (V == 4) {
    const __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(x[0], x[1]), range.zero);
    const __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(x[2], x[3]), range.zero);
    __m512i y = _mm512_permutexvar_epi32(range.order, _mm512_packus_epi16(a, b));
    y = _mm512_min_epu8(_mm512_max_epu8(y, range.low), range.high);
    if (n == 64) _mm512_storeu_si512(to, y);
    else _mm512_mask_storeu_epi8(to, bits(n), y);
  } else if constexpr (V == 2) {
    const __m512i words = _mm512_adds_epi16(_mm512_packs_epi32(x[0], x[1]), range.zero);
    const __m512i pairs = _mm512_permutexvar_epi32(range.order, _mm512_packus_epi16(words, words));
    __m256i y = _mm512_castsi512_si256(pairs);
    y = _mm256_min_epu8(_mm256_max_epu8(y, _mm512_castsi512_si256(range.low)), _mm512_castsi512_si256(range.high));
    if (n == 32) {
      _mm256_storeu_si256((__m256i*)to, y);
      return;
    }
    if (n >= 16) _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(y)), to += 16, n -= 16;
    else y = _mm256_permute4x64_epi64(y, 0x44);
    store_tail(to, _mm256_extracti128_si256(y, 1), n);
  } else {
    const __m256i words = _mm256_adds_epi16(_mm512_cvtsepi32_epi16(x[0]), _mm512_castsi512_si256(range.zero));
    __m128i y = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    y = _mm_min_epu8(_mm_max_epu8(y, _mm512_castsi512_si128(range.low)), _mm512_castsi512_si128(range.high));
    if (n == 16) _mm_storeu_si128((__m128i*)to, y);
    else store_tail(to, y, n);
  }
}

#else

#if defined(__AVX2__)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
typedef I B;
constexpr int kRegisters = 16;

#define EACH_F(CALL) F{CALL(a), CALL(b)}
ALWAYS_INLINE F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ALWAYS_INLINE I set_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
ALWAYS_INLINE F load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
ALWAYS_INLINE I load_int(const int32_t* from) {
  return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 8))};
}
ALWAYS_INLINE B load_weights(const int8_t* from) { return load_int((const int32_t*)from); }
ALWAYS_INLINE F floats_of(__m128i raw) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(raw)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8)))};
}
ALWAYS_INLINE void store_all(float* to, F x) { _mm256_storeu_ps(to, x.a), _mm256_storeu_ps(to + 8, x.b); }
ALWAYS_INLINE void store_int(int32_t* to, I x) {
  _mm256_storeu_si256((__m256i*)to, x.a), _mm256_storeu_si256((__m256i*)(to + 8), x.b);
}
ALWAYS_INLINE F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
ALWAYS_INLINE I rounded(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
ALWAYS_INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
ALWAYS_INLINE F minimum(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
ALWAYS_INLINE F maximum(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
ALWAYS_INLINE F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
ALWAYS_INLINE F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
ALWAYS_INLINE F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
ALWAYS_INLINE F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
ALWAYS_INLINE F absolute(F x) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, x.a), _mm256_andnot_ps(bit, x.b)};
}
ALWAYS_INLINE F with_sign_of(F x, F sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_and_ps(bit, sign.a), _mm256_andnot_ps(bit, x.a)),
          _mm256_or_ps(_mm256_and_ps(bit, sign.b), _mm256_andnot_ps(bit, x.b))};
}
ALWAYS_INLINE F whole(F x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
ALWAYS_INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
ALWAYS_INLINE F times_power_of_two(F x, F n) {
  return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}

ALWAYS_INLINE B repeated(int32_t four) { return set_int(four); }

struct Range {
  __m256i zero;
  __m128i low, high;

  ALWAYS_INLINE Range(int64_t z, int64_t l, int64_t h)
      : zero(_mm256_set1_epi16((short)z)), low(_mm_set1_epi8((char)l)), high(_mm_set1_epi8((char)h)) {}
};

ALWAYS_INLINE void bytes_of(uint8_t* to, I x, const Range& range) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m256i moved = _mm256_adds_epi16(words, range.zero);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(moved), _mm256_extracti128_si256(moved, 1));
  _mm_storeu_si128((__m128i*)to, _mm_min_epu8(_mm_max_epu8(bytes, range.low), range.high));
}

#else

struct F { float v[kLanes]; };
struct I { int32_t v[kLanes]; };
struct B { int8_t v[4 * kLanes]; };
constexpr int kRegisters = 16;

#define EACH(TYPE, VALUE) TYPE y; for (int i = 0; i < kLanes; ++i) y.v[i] = VALUE; return y
ALWAYS_INLINE F set(float x) { EACH(F, x); }
ALWAYS_INLINE I set_int(int32_t x) { EACH(I, x); }
ALWAYS_INLINE F load(const float* from) { EACH(F, from[i]); }
ALWAYS_INLINE I load_int(const int32_t* from) { EACH(I, from[i]); }
ALWAYS_INLINE B load_weights(const int8_t* from) { B y; std::memcpy(y.v, from, sizeof y.v); return y; }
ALWAYS_INLINE void store_all(float* to, F x) { std::memcpy(to, x.v, sizeof x.v); }
ALWAYS_INLINE void store_int(int32_t* to, I x) { std::memcpy(to, x.v, sizeof x.v); }
ALWAYS_INLINE F to_float(I x) { EACH(F, (float)x.v[i]); }
ALWAYS_INLINE I rounded(F x) { EACH(I, (int32_t)std::nearbyint(std::min(std::max(x.v[i], -2.1e9f), 2.1e9f))); }
ALWAYS_INLINE F fma(F a, F b, F c) { EACH(F, std::fma(a.v[i], b.v[i], c.v[i])); }
ALWAYS_INLINE F minimum(F a, F b) { EACH(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
ALWAYS_INLINE F maximum(F a, F b) { EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
ALWAYS_INLINE F operator+(F a, F b) { EACH(F, a.v[i] + b.v[i]); }
ALWAYS_INLINE F operator-(F a, F b) { EACH(F, a.v[i] - b.v[i]); }
ALWAYS_INLINE F operator*(F a, F b) { EACH(F, a.v[i] * b.v[i]); }
ALWAYS_INLINE F operator/(F a, F b) { EACH(F, a.v[i] / b.v[i]); }
ALWAYS_INLINE F absolute(F x) { EACH(F, std::fabs(x.v[i])); }
ALWAYS_INLINE F with_sign_of(F x, F sign) { EACH(F, std::copysign(x.v[i], sign.v[i])); }
ALWAYS_INLINE F whole(F x) { EACH(F, std::nearbyint(x.v[i])); }
ALWAYS_INLINE F times_power_of_two(F x, F n) { EACH(F, std::ldexp(x.v[i], (int)n.v[i])); }
ALWAYS_INLINE B repeated(int32_t four) {
  B y;
  for (int i = 0; i < kLanes; ++i) std::memcpy(y.v + 4 * i, &four, 4);
  return y;
}
ALWAYS_INLINE F floats_of(const uint8_t* raw) { EACH(F, (float)raw[i]); }
struct Range {
  int64_t zero, low, high;

  Range(int64_t z, int64_t l, int64_t h) : zero(z), low(l), high(h) {}
};

ALWAYS_INLINE void bytes_of(uint8_t* to, I x, const Range& range) {
  for (int i = 0; i < kLanes; ++i) to[i] = (uint8_t)std::min(std::max(x.v[i] + range.zero, range.low), range.high);
}
#undef EACH
#endif

// What has no masks goes through memory where lanes are missing.
ALWAYS_INLINE F load(const float* from, int n) {
  if (n == kLanes) return load(from);
  float whole_lanes[kLanes] = {};
  std::memcpy(whole_lanes, from, n * sizeof(float));
  return load(whole_lanes);
}
ALWAYS_INLINE F load_bytes(const uint8_t* from, int n) {
  uint8_t whole_lanes[kLanes] = {};
  if (n == kLanes) std::memcpy(whole_lanes, from, kLanes);
  else std::memcpy(whole_lanes, from, n);
#if defined(__AVX2__)
  return floats_of(_mm_loadu_si128((const __m128i*)whole_lanes));
#else
  return floats_of(whole_lanes);
#endif
}
ALWAYS_INLINE void store(float* to, F x, int n) {
  if (n == kLanes) return store_all(to, x);
  float whole_lanes[kLanes];
  store_all(whole_lanes, x);
  std::memcpy(to, whole_lanes, n * sizeof(float));
}
ALWAYS_INLINE float sum(F x) {
  float v[kLanes], total = 0;
  store_all(v, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return total + v[0];
}
ALWAYS_INLINE float largest(F x) {
  float v[kLanes];
  store_all(v, x);
  return *std::max_element(v, v + kLanes);
}
ALWAYS_INLINE void transpose(F (&x)[kLanes]) {
  float rows[kLanes][kLanes], columns[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store_all(rows[i], x[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) columns[i][j] = rows[j][i];
  for (int i = 0; i < kLanes; ++i) x[i] = load(columns[i]);
}
template <int V>
ALWAYS_INLINE void store_bytes(uint8_t* to, const I* x, const Range& range, int n) {
  alignas(16) uint8_t bytes[V * kLanes];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) bytes_of(bytes + v * kLanes, x[v], range);
  if (n >= V * kLanes) std::memcpy(to, bytes, V * kLanes);
  else if (n > 0) std::memcpy(to, bytes, n);
}

#endif

ALWAYS_INLINE F clamped(F x, float low, float high) { return minimum(maximum(x, set(low)), set(high)); }

}  // namespace quant2e
