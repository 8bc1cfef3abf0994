// Products of two matrices that are computed, unlike those of convolution.cpp, whose weights are packed beforehand.
//
// The right one is packed first, as panels of up to 64 columns: rows of a panel lie one behind the other, of bytes four
// rows side by side. A panel is read from the L1 cache while rows of the left one go by.
#pragma once

#include "simd.h"

namespace quant2e {

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows of floats, or of bytes that stand for (byte - zero) * scale; `row`: how far apart, in values.
struct Rows {
  const char* data;
  bool bytes;
  int64_t row, count, size;
  float scale;
  int64_t zero;

  const char* at(int64_t i) const { return data + i * row * (bytes ? 1 : 4); }
  ALWAYS_INLINE F values(int64_t i, int64_t c, int n) const {
    if (bytes) return (load_bytes((const uint8_t*)at(i) + c, n) - set((float)zero)) * set(scale);
    return load((const float*)at(i) + c, n);
  }
};

// A packed matrix: `depth` rows of `columns`. Of bytes: minus 128, and `init`, the sums of a column times minus the zero
// point of what it is multiplied with.
struct Panels {
  void* data;
  int32_t* init;
  int64_t depth, columns;
};

// What `data` takes.
int64_t panel_bytes(bool bytes, int64_t depth, int64_t columns);

void pack(const Rows& x, const Panels& to);
void pack_transposed(const Rows& x, const Panels& to);
void pack_bytes(const Rows& x, int64_t left_zero, const Panels& to);
void pack_transposed_bytes(const Rows& x, int64_t left_zero, const Panels& to);

// c[rows, columns] = a[rows, depth] times the first `columns` columns of the first `depth` rows of panels. `a_row`,
// `c_row`: how far apart rows are. c has room for whole sixteens of columns.
void multiply(const float* a, int64_t a_row, int64_t rows, const Panels& panels, int64_t depth, int64_t columns, float* c,
              int64_t c_row);

// Of bytes a: (a - left_zero) times (byte - 128), exact. Up to 3 bytes behind a row are read.
void multiply(const uint8_t* a, int64_t a_row, int64_t rows, const Panels& panels, int64_t depth, int64_t columns,
              int32_t* c, int64_t c_row);

}  // namespace quant2e
