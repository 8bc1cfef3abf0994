// Products of two matrices that are computed: see multiply.h.

#include "dot.h"
#include "multiply.h"

namespace quant2e {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 2;
#endif

struct Floats {
  using Left = float;
  using Right = float;
  using Sum = F;
  using Result = float;
  using Value = F;
  static constexpr int kGroup = 1;  // values of a row of the left matrix that meet one vector

  static ALWAYS_INLINE Sum first(const int32_t*) { return set(0.0f); }
  static ALWAYS_INLINE Value value(const Left* from) { return set(*from); }
  static ALWAYS_INLINE F column(const Right* from) { return load(from); }
  static ALWAYS_INLINE Sum add(Sum sum, Value value, F column) { return fma(value, column, sum); }
  static ALWAYS_INLINE void put(float* to, Sum sum) { store(to, sum, kLanes); }
};

struct Bytes {
  using Left = uint8_t;
  using Right = int8_t;
  using Sum = I;
  using Result = int32_t;
  using Value = B;
  static constexpr int kGroup = 4;

  static ALWAYS_INLINE Sum first(const int32_t* init) { return load_int(init); }
  static ALWAYS_INLINE Value value(const Left* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return repeated(four);
  }
  static ALWAYS_INLINE B column(const Right* from) { return load_weights(from); }
  static ALWAYS_INLINE Sum add(Sum sum, Value value, B column) { return dot_lanes(sum, value, column); }
  static ALWAYS_INLINE void put(int32_t* to, Sum sum) { store_int(to, sum); }
};

// R rows by a panel of V * 16 columns, `groups` of values of a row.
template <class T, int R, int V>
__attribute__((noinline)) void product(const typename T::Left* a, int64_t a_row, const typename T::Right* panel,
                                       const int32_t* init, int64_t groups, typename T::Result* c,
                                       int64_t c_row) {
  typename T::Sum sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = T::first(init + v * kLanes);
  const typename T::Left* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a + r * a_row;
  for (int64_t k = 0; k < groups * T::kGroup; k += T::kGroup) {
    decltype(T::column(panel)) columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = T::column(panel + v * kLanes * T::kGroup);
    panel += V * kLanes * T::kGroup;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename T::Value value = T::value(rows[r] + k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = T::add(sums[r][v], value, columns[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) T::put(c + r * c_row + v * kLanes, sums[r][v]);
}

template <class T>
struct Shape {
  int rows;
  void (*run)(const typename T::Left*, int64_t, const typename T::Right*, const int32_t*, int64_t, typename T::Result*,
              int64_t);
};

// For V: products by falling number of rows. With 32 registers up to 24 sums, with 16 (two a sum) up to 6.
template <class T, int V>
const Shape<T>* shapes() {
#if defined(__AVX512VNNI__)
  if constexpr (V == 4) {
    static const Shape<T> found[] = {{6, product<T, 6, 4>}, {4, product<T, 4, 4>}, {3, product<T, 3, 4>},
                                     {2, product<T, 2, 4>}, {1, product<T, 1, 4>}};
    return found;
  } else if constexpr (V == 2) {
    static const Shape<T> found[] = {{12, product<T, 12, 2>}, {8, product<T, 8, 2>}, {4, product<T, 4, 2>},
                                     {2, product<T, 2, 2>}, {1, product<T, 1, 2>}};
    return found;
  } else {
    static const Shape<T> found[] = {{14, product<T, 14, 1>}, {8, product<T, 8, 1>}, {4, product<T, 4, 1>},
                                     {2, product<T, 2, 1>}, {1, product<T, 1, 1>}};
    return found;
  }
#else
  constexpr int kRows = V == 2 ? 2 : 6;
  static const Shape<T> found[] = {{kRows, product<T, kRows, V>}, {1, product<T, 1, V>}};
  return found;
#endif
}

// Columns of the panel that begins at column `n`, in vectors.
int vectors_at(int64_t n, int64_t columns) {
  const int64_t left = (columns - n + kLanes - 1) / kLanes;
  return left >= 4 && kMostVectors == 4 ? 4 : left >= 2 ? 2 : 1;
}

int64_t groups_of(int64_t depth) { return (depth + 3) / 4; }

template <class T>
void by_panels(const typename T::Left* a, int64_t a_row, int64_t rows, const Panels& panels, int64_t depth,
               int64_t columns, typename T::Result* c, int64_t c_row) {
  const auto* data = (const typename T::Right*)panels.data;
  const int64_t height = T::kGroup == 1 ? panels.depth : 4 * groups_of(panels.depth);
  for (int64_t n = 0; n < columns;) {
    const int v = vectors_at(n, panels.columns);
    const Shape<T>* shape = v == 4 ? shapes<T, kMostVectors>() : v == 2 ? shapes<T, 2>() : shapes<T, 1>();
    for (int64_t r = 0; r < rows; r += shape->rows) {
      while (shape->rows > rows - r) ++shape;
      shape->run(a + r * a_row, a_row, data + n * height, panels.init + n, (depth + T::kGroup - 1) / T::kGroup,
                 c + r * c_row + n, c_row);
    }
    n += v * kLanes;
  }
}

// Minus 128, and sums of each column times `-zero`.
void finish_panel(int8_t* panel, int64_t groups, int width, int64_t zero, int32_t* init) {
  const int64_t size = groups * width * 4;
  for (int64_t i = 0; i < size; ++i) panel[i] = (int8_t)(panel[i] ^ 0x80);
  for (int j = 0; j < width; j += kLanes) {
    int32_t sums[kLanes];
    I total = set_int(0);
    for (int64_t g = 0; g < groups; ++g)
      total = dot_lanes(total, repeated(0x01010101), load_weights(panel + (g * width + j) * 4));
    store_int(sums, total);
    for (int i = 0; i < kLanes; ++i) init[j + i] = (int32_t)(-zero * sums[i]);
  }
}

// A group of rows side by side; a row that is not there holds 128.
template <int kWidth>
void interleave(const uint8_t* const* rows, int64_t n, int8_t* to) {
  uint8_t own[4][kWidth];
  const uint8_t* from[4];
  for (int i = 0; i < 4; ++i) {
    from[i] = rows[i];
    if (rows[i] && n >= kWidth) continue;
    std::memset(own[i], 128, kWidth);
    if (rows[i]) std::memcpy(own[i], rows[i], n);
    from[i] = own[i];
  }
  const uint8_t *a = from[0], *b = from[1], *c = from[2], *d = from[3];
  uint8_t* out = (uint8_t*)to;
  for (int j = 0; j < kWidth; ++j) out[4 * j] = a[j], out[4 * j + 1] = b[j], out[4 * j + 2] = c[j], out[4 * j + 3] = d[j];
}

}  // namespace

int64_t panel_bytes(bool bytes, int64_t depth, int64_t columns) {
  return whole_lanes(columns) * (bytes ? 4 * groups_of(depth) : 4 * depth);
}

void pack(const Rows& x, const Panels& panels) {
  float* to = (float*)panels.data;
  for (int64_t n = 0; n < x.size;) {
    const int width = vectors_at(n, x.size) * kLanes;
    for (int64_t i = 0; i < x.count; ++i, to += width)
      for (int c = 0; c < width; c += kLanes) {
        const int count = (int)std::min<int64_t>(kLanes, x.size - n - c);
        store(to + c, x.values(i, n + c, count), kLanes);
      }
    n += width;
  }
}

void pack_transposed(const Rows& x, const Panels& panels) {
  float* to = (float*)panels.data;
  for (int64_t n = 0; n < x.count;) {
    const int width = vectors_at(n, x.count) * kLanes;
    for (int64_t c = 0; c < x.size; c += kLanes)
      for (int j = 0; j < width; j += kLanes) {
        F square[kLanes];
        const int count = (int)std::min<int64_t>(kLanes, x.size - c);
        for (int i = 0; i < kLanes; ++i)
          square[i] = n + j + i < x.count ? x.values(n + j + i, c, count) : set(0.0f);
        transpose(square);
        for (int i = 0; i < count; ++i) store(to + (c + i) * width + j, square[i], kLanes);
      }
    to += x.size * width;
    n += width;
  }
}

void pack_bytes(const Rows& x, int64_t left_zero, const Panels& panels) {
  int8_t* to = (int8_t*)panels.data;
  const int64_t groups = groups_of(x.count);
  for (int64_t n = 0; n < x.size;) {
    const int v = vectors_at(n, x.size), width = v * kLanes;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* rows[4];
      for (int i = 0; i < 4; ++i) rows[i] = 4 * g + i < x.count ? (const uint8_t*)x.at(4 * g + i) + n : nullptr;
      const int64_t left = x.size - n;
      int8_t* group = to + g * width * 4;
      v == 4 ? interleave<64>(rows, left, group) : v == 2 ? interleave<32>(rows, left, group) : interleave<16>(rows, left, group);
    }
    finish_panel(to, groups, width, left_zero, panels.init + n);
    to += groups * width * 4;
    n += width;
  }
}

void pack_transposed_bytes(const Rows& x, int64_t left_zero, const Panels& panels) {
  int8_t* to = (int8_t*)panels.data;
  const int64_t groups = groups_of(x.size);
  for (int64_t n = 0; n < x.count;) {
    const int width = vectors_at(n, x.count) * kLanes;
    for (int64_t g = 0; g < groups; g += kLanes)
      for (int j = 0; j < width; j += kLanes) {
        F square[kLanes];  // of a key 64 bytes: fours of them, as lanes
        uint8_t bytes[64];
        const int count = (int)std::min<int64_t>(kLanes, groups - g);
        const int64_t left = std::min<int64_t>(64, x.size - 4 * g);
        for (int i = 0; i < kLanes; ++i) {
          const bool there = n + j + i < x.count;
          const uint8_t* from = there ? (const uint8_t*)x.at(n + j + i) + 4 * g : bytes;
          if (!there || left % 4) std::memset(bytes, 128, 64);
          if (there && left % 4) std::memcpy(bytes, from, left), from = bytes;
          square[i] = load((const float*)from, count);
        }
        transpose(square);
        for (int i = 0; i < count; ++i) store((float*)(to + ((g + i) * width + j) * 4), square[i], kLanes);
      }
    finish_panel(to, groups, width, left_zero, panels.init + n);
    to += groups * width * 4;
    n += width;
  }
}

void multiply(const float* a, int64_t a_row, int64_t rows, const Panels& panels, int64_t depth, int64_t columns, float* c,
              int64_t c_row) {
  by_panels<Floats>(a, a_row, rows, panels, depth, columns, c, c_row);
}

void multiply(const uint8_t* a, int64_t a_row, int64_t rows, const Panels& panels, int64_t depth, int64_t columns,
              int32_t* c, int64_t c_row) {
  by_panels<Bytes>(a, a_row, rows, panels, depth, columns, c, c_row);
}

}  // namespace quant2e
