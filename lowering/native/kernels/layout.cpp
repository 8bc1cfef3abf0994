// What enters and leaves a region: floats become bytes with channels last, and bytes become floats.

#include "bytes.h"
#include "epilogue.h"

namespace quant2e {
namespace {

constexpr int kMostChannels = 4;  // of images whose channels lie apart, and are interleaved pixel by pixel

ALWAYS_INLINE I integers_of(F x, F inverse) { return rounded(clamped(x * inverse, -1e9f, 1e9f)); }

void quantize_line(const Step& s, const float* x, uint8_t* y, int64_t count) {
  const Range range(s.zero, s.low, s.high);
  const F inverse = set(s.inverse());
  int64_t c = 0;
  for (; c + kStrip <= count; c += kStrip) {
    I integers[4];
    for (int v = 0; v < 4; ++v) integers[v] = integers_of(load(x + c + v * kLanes), inverse);
    store_bytes<4>(y + c, integers, range, kStrip);
  }
  for (; c < count; c += kLanes) {
    const int n = (int)std::min<int64_t>(kLanes, count - c);
    const I integers = integers_of(load(x + c, n), inverse);
    store_bytes<1>(y + c, &integers, range, n);
  }
}

// A row of pixels from planes: C of them at once, 16 pixels at a time.
template <int C>
void mix(const Step& s, const float* const* planes, uint8_t* y, int64_t w) {
  const Range range(s.zero, s.low, s.high);
  const F inverse = set(s.inverse());
  for (int64_t j = 0; j < w; j += kLanes) {
    const int n = (int)std::min<int64_t>(kLanes, w - j);
    I integers[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) integers[c] = integers_of(load(planes[c] + j, n), inverse);
    store_pixels<C>(y + j * C, integers, range, n);
  }
}

// An argument of the caller: any strides, in values.
struct Source {
  const float* data;
  int64_t channel, row, column;
};

void quantize_row(const Step& s, const Source& x, const View& y, int64_t i) {
  const float* from = x.data + i * x.row;
  if (x.channel == 1 && x.column == y.c) return quantize_line(s, from, y.bytes(i, 0), y.w * y.c);
  if (x.column == 1 && y.c <= kMostChannels) {
    const float* planes[kMostChannels];
    for (int64_t c = 0; c < y.c; ++c) planes[c] = from + c * x.channel;
    uint8_t* to = y.bytes(i, 0);
    if (y.c == 1) mix<1>(s, planes, to, y.w);
    else if (y.c == 2) mix<2>(s, planes, to, y.w);
    else if (y.c == 3) mix<3>(s, planes, to, y.w);
    else mix<4>(s, planes, to, y.w);
    return;
  }
  float pixels[kLanes * kLanes];  // 16 channels of 16 pixels
  for (int64_t j = 0; j < y.w; j += kLanes)
    for (int64_t c = 0; c < y.c; c += kLanes) {
      const int64_t columns = std::min<int64_t>(kLanes, y.w - j), channels = std::min<int64_t>(kLanes, y.c - c);
      for (int64_t q = 0; q < channels; ++q)
        for (int64_t p = 0; p < columns; ++p)
          pixels[p * kLanes + q] = from[(c + q) * x.channel + (j + p) * x.column];
      for (int64_t p = 0; p < columns; ++p)
        quantize_line(s, pixels + p * kLanes, y.bytes(i, j + p) + c, channels);
    }
}

}  // namespace

void quantize(const Run& run, const Step& step) {
  const View x = run.view(step.x), y = run.view(step.y);
  Source source{(const float*)x.data, 1, x.row(), x.c};
  if (run.tensors[step.x].place < 0) {
    const Given& given = run.given[-1 - run.tensors[step.x].place];
    source.channel = given.channel, source.row = given.row, source.column = given.column;
  }
  in_parallel(run, y.h * y.w, y.h > 1 ? y.w : 16, y.pixels() * y.c / kPartValues, [&](int64_t begin, int64_t end) {
    if (y.h > 1)
      for (int64_t i = begin / y.w; i < end / y.w; ++i) quantize_row(step, source, y, i);
    else {
      const View part{(char*)y.bytes(0, begin), 1, 1, end - begin, y.c, 0, 0, (end - begin) * y.c, y.c};
      quantize_row(step, {source.data + begin * source.column, source.channel, source.row, source.column}, part, 0);
    }
  });
}

void dequantize(const Run& run, const Step& step) {
  const View x = run.view(step.x), z = run.view(step.z);
  const F scale = set(step.x_scale()), zero = set((float)step.x_zero);
  in_parallel(run, x.pixels(), 1, x.pixels() * x.c / kPartValues, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const uint8_t* from = x.bytes(at / x.w, at % x.w);
      float* to = z.floats(at / x.w, at % x.w);
      for (int64_t c = 0; c < x.c; c += kLanes) {
        const int n = (int)std::min<int64_t>(kLanes, x.c - c);
        store(to + c, (load_bytes(from + c, n) - zero) * scale, n);
      }
    }
  });
}

}  // namespace quant2e
