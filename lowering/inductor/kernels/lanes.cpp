// Sixteen lanes, one for each of sixteen outputs: what weight_only.cpp computes with. AVX-512, AVX2 and plain C++ have the
// same functions, so that the loops are written once.
//
//     Lanes    sixteen floats
//     Counts   sixteen 32-bit integers
//     Line     64 bytes of packed weights: four for each lane

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr int kLineBytes = 64;

inline void expect(const void* address) { __builtin_prefetch(address); }

// Where among the eight inputs of a line that nibble is which lies at bit 4 j of a lane.
constexpr int input_of_nibble(int j) { return j / 2 + j % 2 * 4; }

#if defined(__AVX512F__) && defined(__AVX512BW__)

constexpr int kFewRows = 4;    // computed together with weights that are unpacked into registers
constexpr int kPanelRows = 6;  // and with weights that were unpacked into memory
// Vectors of sixteen outputs that are computed together, given the rows that are: as many sums as fit the registers.
constexpr int vectors_of(int) { return 4; }

typedef __m512 Lanes;
typedef __m512i Counts;
typedef __m512i Line;

inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes loaded(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline Lanes difference(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes product(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes sum(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes plus_product(Lanes total, Lanes a, Lanes b) { return _mm512_fmadd_ps(a, b, total); }
inline Lanes minus_product(Lanes total, Lanes a, Lanes b) { return _mm512_fnmadd_ps(a, b, total); }
inline Lanes of_bytes(const int8_t* x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
}
inline Lanes of_bfloats(const uint16_t* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
inline Line line(const void* x) { return _mm512_loadu_si512(x); }
// A look-up by the low four bits of each lane: no conversion.
template <int kNibble>
inline Lanes of_nibbles(Line x) {
  const Lanes values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_permutexvar_ps(kNibble ? _mm512_srli_epi32(x, 4 * kNibble) : x, values);
}
inline Line low_halves(Line x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Line high_halves(Line x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline Counts all_counts(int32_t x) { return _mm512_set1_epi32(x); }
inline Lanes of_counts(Counts x) { return _mm512_cvtepi32_ps(x); }
// Adds to each lane four products of a byte from 0 to 15 and one of four signed bytes, which are the same for all lanes.
inline Counts plus_products(Counts total, Line bytes, int32_t four) {
  const __m512i x = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(total, bytes, x);
#else
  return _mm512_add_epi32(total, _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, x), _mm512_set1_epi16(1)));
#endif
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kFewRows = 4;
constexpr int kPanelRows = 6;
constexpr int vectors_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

struct Lanes {
  __m256 a, b;
};
struct Counts {
  __m256i a, b;
};
typedef Counts Line;

inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes loaded(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void store(float* to, Lanes x) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
inline Lanes difference(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes product(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes sum(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes plus_product(Lanes total, Lanes x, Lanes y) {
  return {_mm256_fmadd_ps(x.a, y.a, total.a), _mm256_fmadd_ps(x.b, y.b, total.b)};
}
inline Lanes minus_product(Lanes total, Lanes x, Lanes y) {
  return {_mm256_fnmadd_ps(x.a, y.a, total.a), _mm256_fnmadd_ps(x.b, y.b, total.b)};
}
inline __m256 eight_bytes(const int8_t* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
}
inline Lanes of_bytes(const int8_t* x) { return {eight_bytes(x), eight_bytes(x + 8)}; }
inline __m256 eight_bfloats(const uint16_t* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}
inline Lanes of_bfloats(const uint16_t* x) { return {eight_bfloats(x), eight_bfloats(x + 8)}; }
inline Line line(const void* x) {
  return {_mm256_loadu_si256((const __m256i*)x), _mm256_loadu_si256((const __m256i*)x + 1)};
}
// The nibble, less 8, in the top of a lane; shifted down with its sign.
template <int kNibble>
inline __m256 eight_nibbles(__m256i x) {
  const __m256i top = _mm256_slli_epi32(_mm256_xor_si256(x, _mm256_set1_epi8((char)0x88)), 28 - 4 * kNibble);
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28));
}
template <int kNibble>
inline Lanes of_nibbles(Line x) {
  return {eight_nibbles<kNibble>(x.a), eight_nibbles<kNibble>(x.b)};
}
inline __m256i low_half(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Line low_halves(Line x) { return {low_half(x.a), low_half(x.b)}; }
inline Line high_halves(Line x) { return {low_half(_mm256_srli_epi16(x.a, 4)), low_half(_mm256_srli_epi16(x.b, 4))}; }
inline Counts all_counts(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Lanes of_counts(Counts x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i plus_eight_products(__m256i total, __m256i bytes, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(total, bytes, x);
#else
  // a pair is at most 2 * 15 * 128, so that nothing saturates
  return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), _mm256_set1_epi16(1)));
#endif
}
inline Counts plus_products(Counts total, Line bytes, int32_t four) {
  const __m256i x = _mm256_set1_epi32(four);
  return {plus_eight_products(total.a, bytes.a, x), plus_eight_products(total.b, bytes.b, x)};
}

#else

constexpr int kFewRows = 2;
constexpr int kPanelRows = 4;
constexpr int vectors_of(int) { return 1; }

struct Lanes {
  float at[kLanes];
};
struct Counts {
  int32_t at[kLanes];
};
struct Line {
  uint8_t at[kLineBytes];
};

template <class Made, class Each>
inline Made each(Each value) {
  Made made;
  for (int i = 0; i < kLanes; ++i) made.at[i] = value(i);
  return made;
}
inline Lanes all(float x) { return each<Lanes>([=](int) { return x; }); }
inline Lanes loaded(const float* x) { return each<Lanes>([=](int i) { return x[i]; }); }
inline void store(float* to, const Lanes& x) { std::memcpy(to, x.at, sizeof x.at); }
inline Lanes difference(const Lanes& x, const Lanes& y) {
  return each<Lanes>([&](int i) { return x.at[i] - y.at[i]; });
}
inline Lanes product(const Lanes& x, const Lanes& y) {
  return each<Lanes>([&](int i) { return x.at[i] * y.at[i]; });
}
inline Lanes sum(const Lanes& x, const Lanes& y) {
  return each<Lanes>([&](int i) { return x.at[i] + y.at[i]; });
}
inline Lanes plus_product(const Lanes& total, const Lanes& x, const Lanes& y) {
  return each<Lanes>([&](int i) { return total.at[i] + x.at[i] * y.at[i]; });
}
inline Lanes minus_product(const Lanes& total, const Lanes& x, const Lanes& y) {
  return each<Lanes>([&](int i) { return total.at[i] - x.at[i] * y.at[i]; });
}
inline Lanes of_bytes(const int8_t* x) { return each<Lanes>([=](int i) { return (float)x[i]; }); }
inline Lanes of_bfloats(const uint16_t* x) {
  Lanes made;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = (uint32_t)x[i] << 16;
    std::memcpy(&made.at[i], &bits, sizeof bits);
  }
  return made;
}
inline Line line(const void* x) {
  Line made;
  std::memcpy(made.at, x, kLineBytes);
  return made;
}
template <int kNibble>
inline Lanes of_nibbles(const Line& x) {
  return each<Lanes>([&](int i) { return (float)(x.at[4 * i + kNibble / 2] >> (kNibble % 2 * 4) & 15) - 8; });
}
template <int kShift>
inline Line halves(const Line& x) {
  Line made;
  for (int i = 0; i < kLineBytes; ++i) made.at[i] = x.at[i] >> kShift & 15;
  return made;
}
inline Line low_halves(const Line& x) { return halves<0>(x); }
inline Line high_halves(const Line& x) { return halves<4>(x); }
inline Counts all_counts(int32_t x) { return each<Counts>([=](int) { return x; }); }
inline Lanes of_counts(const Counts& x) { return each<Lanes>([&](int i) { return (float)x.at[i]; }); }
inline Counts plus_products(const Counts& total, const Line& bytes, int32_t four) {
  int8_t x[4];
  std::memcpy(x, &four, 4);
  return each<Counts>([&](int i) {
    int32_t found = total.at[i];
    for (int k = 0; k < 4; ++k) found += bytes.at[4 * i + k] * x[k];
    return found;
  });
}

#endif

}  // namespace
