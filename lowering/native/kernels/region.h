// A region: tensors, steps that compute one from others, and what runs them.
//
// Python writes a plan as int64 numbers: a header, a `Tensor` for each value and a `Step` for each op; floats stand in
// it as the bits of doubles. The fields are those of `plan.py`, in the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace quant2e {

constexpr int64_t kVersion = 3;

enum Type : int64_t { kUint8 = 0, kFloat = 1 };

// Pixels of `c` values, `h` rows of `w`, channels last, with a border that holds `zero`: `pad_h` rows above and below,
// `pad_w` pixels left and right. Rows of a matrix are the pixels of one row of an image. `w` of 0: as many as there are
// rows to compute at the moment.
struct Tensor {
  int64_t place;  // of its first byte in the arena, or -1 - i for the i-th tensor that the caller gave
  int64_t type, h, w, c, pad_h, pad_w, zero;
  int64_t shared;  // an argument that is the same for every image
};

enum Kind : int64_t {
  kQuantize, kDequantize, kConvolution, kDepthwise, kBinary, kUnary, kPool, kConcat, kLayerNorm, kAttention, kSoftmax,
};

struct Step {
  int64_t kind;
  int64_t x, other, third, fourth;    // tensors that are read; -1 for none
  int64_t y, z;                       // written: integers, floats; -1 for none
  int64_t weight, scale, bias, init;  // bytes into the constants; -1 for none
  int64_t arithmetic, fast;
  int64_t activation, a_bits, b_bits;
  int64_t inverse_bits, zero, low, high;  // of y: 1 / scale, zero point, range of integers
  int64_t x_scale_bits, x_zero, other_scale_bits, other_zero;
  int64_t kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w;
  int64_t groups, inputs, outputs, taps, inner;  // of one group: input and output channels; taps and bytes of each
  int64_t mode, extra, extra_bits;
  int64_t every_h, every_w, from_h, from_w;  // what is written: every so many rows and columns, from these on
  int64_t third_scale_bits, third_zero;
  int64_t x_first, other_first, third_first;  // channel of a tensor at which its heads begin
  int64_t softmax_scale_bits, softmax_zero, softmax_low, softmax_high;  // of probabilities; a scale of 0: left as floats
  int64_t strip;  // outputs whose weights are packed together: 64 (then 32, then 16), or 16

  static float number(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return (float)value;
  }
  float a() const { return number(a_bits); }
  float b() const { return number(b_bits); }
  float inverse() const { return number(inverse_bits); }
  float x_scale() const { return number(x_scale_bits); }
  float other_scale() const { return number(other_scale_bits); }
  float extra_number() const { return number(extra_bits); }
  float third_scale() const { return number(third_scale_bits); }
  float softmax_scale() const { return number(softmax_scale_bits); }
};

// A tensor where it lies in memory.
struct View {
  char* data;
  int64_t size;  // of a value, in bytes
  int64_t h, w, c, pad_h, pad_w;
  int64_t line, pixel;  // values from one row to the next, and from one pixel to the next

  int64_t row() const { return line; }
  char* at(int64_t i, int64_t j) const { return data + ((i + pad_h) * line + (j + pad_w) * pixel) * size; }
  uint8_t* bytes(int64_t i, int64_t j) const { return (uint8_t*)at(i, j); }
  float* floats(int64_t i, int64_t j) const { return (float*)at(i, j); }
  int64_t pixels() const { return h * w; }
  // The rows and columns that a step writes, as an image of their own.
  View part(const Step& s) const {
    const int64_t rows = (h - s.from_h + s.every_h - 1) / s.every_h, columns = (w - s.from_w + s.every_w - 1) / s.every_w;
    return {at(s.from_h, s.from_w), size, rows, columns, c, 0, 0, line * s.every_h, pixel * s.every_w};
  }
};

// An argument of the op: its memory and how far apart its values are, in values.
struct Given {
  char* data;
  int64_t image, channel, row, column;
};

// What a step needs beside its plan. `threads`: that may work on it, as a team where they are several.
struct Run {
  const Tensor* tensors;
  const Given* given;
  const char* constants;
  char* arena;
  int64_t image, rows, threads;
  Team* team;
  bool shares_all;  // steps are computed by several threads however small they are

  View view(int64_t tensor) const {
    const Tensor& t = tensors[tensor];
    const int64_t size = t.type == kFloat ? 4 : 1, w = t.w ? t.w : rows;
    char* data = t.place >= 0 ? arena + t.place : given[-1 - t.place].data;
    if (t.place < 0 && !t.shared) data += image * given[-1 - t.place].image * size;
    return {data, size, t.h, w, t.c, t.pad_h, t.pad_w, (w + 2 * t.pad_w) * t.c, t.c};
  }
  // What a step writes of a tensor, or adds to it; nothing of a tensor that is not there.
  View part(const Step& s, int64_t tensor) const { return tensor < 0 ? View{} : view(tensor).part(s); }
  template <class T>
  const T* constant(int64_t place) const {
    return place < 0 ? nullptr : (const T*)(constants + place);
  }
};

// What a part has at least, or another thread gains nothing: products, or values that are read or written one by one.
constexpr int64_t kPartProducts = 65536, kPartValues = 2048;

// Calls `work(begin, end)` for parts of [0, count), on as many threads as the run has and no more than `most`. Each part
// is a multiple of `least` long, the last excepted.
template <class Work>
void in_parallel(const Run& run, int64_t count, int64_t least, int64_t most, const Work& work);

void convolution(const Run&, const Step&);
void depthwise(const Run&, const Step&);
void quantize(const Run&, const Step&);
void dequantize(const Run&, const Step&);
void binary(const Run&, const Step&);
void unary(const Run&, const Step&);
void pool(const Run&, const Step&);
void concat(const Run&, const Step&);
void layer_norm(const Run&, const Step&);
void attention(const Run&, const Step&);
void softmax(const Run&, const Step&);

}  // namespace quant2e

namespace quant2e {

template <class Work>
void in_parallel(const Run& run, int64_t count, int64_t least, int64_t most, const Work& work) {
  const int64_t blocks = (count + least - 1) / least, parts = std::min({blocks, run.threads, run.shares_all ? blocks : most});
  if (parts <= 1) return work(0, count);
  struct Context {
    const Work& work;
    int64_t count, least, blocks, parts;
  } context{work, count, least, blocks, parts};
  run.team->share(parts, [](const void* given, int64_t part) {
    const Context& c = *(const Context*)given;
    const int64_t begin = c.blocks * part / c.parts * c.least, end = c.blocks * (part + 1) / c.parts * c.least;
    c.work(begin, end < c.count ? end : c.count);
  }, &context);
}

}  // namespace quant2e
