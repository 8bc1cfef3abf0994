// Convolutions, and linear layers as 1 x 1 convolutions: unsigned bytes times signed bytes, summed in 32 bits.
//
// A block is up to 6 pixels by 64 outputs (or more pixels by fewer outputs; without AVX-512 5 pixels by 16). Its sums
// stay in registers while the bytes of its inputs go by, four at a time: see README.md for how weights are packed. Each
// pixel has a pointer, so that strides, borders and dilations are a matter of addresses.

#include "dot.h"
#include <unistd.h>

#include "epilogue.h"

namespace quant2e {
namespace {

constexpr int kMostPixels = 14;
constexpr Ending kOfLayer = (Ending)-1;  // known when it is computed
constexpr int kMostTaps = 1024;

// Of inputs that stay in the L2 cache beside the weights of a strip: half of it.
int64_t panel_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE) / 2;
#else
  static const int64_t found = 0;
#endif
  return std::max<int64_t>(found, 128 * 1024);
}

struct Layer {
  const int8_t* weights;  // packed, of the first output of this block
  const int32_t* init;
  int64_t inner, taps;
  int64_t step;   // bytes of four inputs' weights: of all the outputs that are packed together
  int64_t apart;  // bytes from the weights of 16 outputs to those of the next, for the same inputs
  const int64_t* offsets;  // of each tap, in bytes from a pixel's first
  Epilogue epilogue;
  Ending ending;
  const char* next;   // weights that are needed after these, and how far apart a block asks for them: 64 bytes or none
  int64_t next_step;
};

// Outputs that are computed together, in lanes: as many as are packed together, or one lane of them.
#if defined(__AVX512VNNI__)
constexpr bool kWhole = true;
#else
constexpr bool kWhole = false;
#endif

// What is written of a block. What few layers ask for is done to sums in memory, so that it takes no registers here.
template <int R, int V, Ending kEnding>
ALWAYS_INLINE void finish_block(I (&sums)[R][V], const Epilogue& e, const Pixel* pixels, int n) {
  if constexpr (kEnding == kFloats || kEnding == kFloatsAdded) {
    const float *scale = e.scale, *bias = e.bias;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      finish_floats<V, kEnding>(sums[r], scale, bias, pixels[r].z, (const float*)pixels[r].added, n);
  } else if constexpr (kEnding != kAny) {
    const Range range = e.range;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {  // scale and bias are read once
      const F scale = load(e.scale + v * kLanes), bias = load(e.bias + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const uint8_t* added = kEnding == kFoldedAdded ? (const uint8_t*)pixels[r].added + v * kLanes : nullptr;
        sums[r][v] = integers_of<kEnding>(sums[r][v], e, scale, bias, added);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store_bytes<V>(pixels[r].y, sums[r], range, n);
  } else {
    alignas(64) int32_t memory[R][V * kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store_int(memory[r] + v * kLanes, sums[r][v]);
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) finish<V>(memory[r], e, pixels[r], n);
  }
}

template <Ending kEnding, int R, int V>
ALWAYS_INLINE void finish_as(const Layer& layer, I (&sums)[R][V], const Pixel* pixels, int n) {
  if constexpr (kEnding != kOfLayer) return finish_block<R, V, kEnding>(sums, layer.epilogue, pixels, n);
  switch (layer.ending) {
    case kFolded: return finish_block<R, V, kFolded>(sums, layer.epilogue, pixels, n);
    case kFoldedAdded: return finish_block<R, V, kFoldedAdded>(sums, layer.epilogue, pixels, n);
    default: return finish_block<R, V, kAny>(sums, layer.epilogue, pixels, n);
  }
}

// Addresses of the pixels of a block, which were just written one by one: read one by one too, as a vector of them would
// wait until the block before is done. More than a few stay in memory: the compiler would hold them in vector registers.
template <int R>
struct Addresses {
  const uint8_t* const volatile* memory;
  const uint8_t* registers[R];

  ALWAYS_INLINE explicit Addresses(const uint8_t* const* x) : memory(x) {
    for (int r = 0; r < R && R <= 8; ++r) registers[r] = memory[r];
  }
  ALWAYS_INLINE const uint8_t* operator[](int r) const { return R <= 8 ? registers[r] : memory[r]; }
};

// R pixels by V * 16 outputs.
template <int R, int V, int kHow, Ending kEnding>
__attribute__((noinline)) void block(const Layer& layer, const uint8_t* const* x, const Pixel* pixels, int n) {
  I sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = load_int(layer.init + v * kLanes);
  const int8_t* w = layer.weights;
  const Addresses<R> p(x);
  const int64_t step = kWhole ? 64 * V : layer.step, next_step = layer.next_step;
  const char* next = layer.next;
  for (int64_t t = 0; t < layer.taps; ++t) {
    const int64_t begin = layer.offsets[t], end = begin + layer.inner;
    int64_t k = begin;
    if constexpr (kHow == kSeven)
      for (; k + 8 <= end; k += 8, w += 2 * step)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int32_t four[2];
          std::memcpy(four, p[r] + k, 8);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            sums[r][v] = dot_two(sums[r][v], load_weights(w + 64 * v), load_weights(w + step + 64 * v), four[0], four[1]);
        }
    for (; k < end; k += 4, w += step, next += next_step) {
      __builtin_prefetch(next, 0, 2);
      B weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[v] = load_weights(w + 64 * v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, p[r] + k, 4);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = dot<kHow>(sums[r][v], weights[v], four);
      }
    }
  }
  finish_as<kEnding>(layer, sums, pixels, n);
}

// One pixel has few sums, each of which would wait for the one before: two for each output, of bytes in turn.
template <int V, int kHow>
__attribute__((noinline)) void row(const Layer& layer, const uint8_t* const* x, const Pixel* pixels, int n) {
  I sums[2][V];
  for (int v = 0; v < V; ++v) sums[0][v] = load_int(layer.init + v * kLanes), sums[1][v] = set_int(0);
  const int8_t* w = layer.weights;
  const int64_t step = layer.step, apart = layer.apart;
  for (int64_t t = 0; t < layer.taps; ++t) {
    const uint8_t* p = x[0] + layer.offsets[t];
    int64_t k = 0;
    for (; k + 8 <= layer.inner; k += 8) {
      int32_t four[2];
      std::memcpy(four, p + k, 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          sums[half][v] = dot<kHow>(sums[half][v], load_weights(w + step * half + apart * v), four[half]);
      for (int half = 0; half < 2; ++half)
        for (int v = 0; v < V; ++v) __builtin_prefetch(w + step * (32 + half) + apart * v);
      w += 2 * step;
    }
    if (k < layer.inner) {
      int32_t four;
      std::memcpy(&four, p + k, 4);
      for (int v = 0; v < V; ++v) sums[0][v] = dot<kHow>(sums[0][v], load_weights(w + apart * v), four);
      w += step;
    }
  }
  int32_t memory[2][V * kLanes];
  for (int half = 0; half < 2; ++half)
    for (int v = 0; v < V; ++v) store_int(memory[half] + v * kLanes, sums[half][v]);
  for (int i = 0; i < V * kLanes; ++i) memory[0][i] += memory[1][i];
  I again[1][V];
  for (int v = 0; v < V; ++v) again[0][v] = load_int(memory[0] + v * kLanes);
  finish_as<kOfLayer>(layer, again, pixels, n);
}

using Block = void (*)(const Layer&, const uint8_t* const*, const Pixel*, int);

struct Shape {
  int pixels;
  Block run;
};

// For V: blocks by falling number of pixels. With 32 registers up to 24 sums, with 16 (two a sum) up to 5.
template <int V, int kHow, Ending kEnding>
const Shape* shapes() {
#if defined(__AVX512VNNI__)
  if constexpr (V == 4) {
    static const Shape found[] = {{6, block<6, 4, kHow, kEnding>}, {5, block<5, 4, kHow, kEnding>}, {4, block<4, 4, kHow, kEnding>},
                                  {3, block<3, 4, kHow, kEnding>}, {2, block<2, 4, kHow, kEnding>}, {1, row<4, kHow>}};
    return found;
  } else if constexpr (V == 2) {
    static const Shape found[] = {{12, block<12, 2, kHow, kEnding>}, {8, block<8, 2, kHow, kEnding>}, {7, block<7, 2, kHow, kEnding>},
                                  {6, block<6, 2, kHow, kEnding>}, {4, block<4, 2, kHow, kEnding>}, {2, block<2, 2, kHow, kEnding>},
                                  {1, row<2, kHow>}};
    return found;
  } else {
    static const Shape found[] = {{14, block<14, 1, kHow, kEnding>}, {8, block<8, 1, kHow, kEnding>}, {7, block<7, 1, kHow, kEnding>},
                                  {4, block<4, 1, kHow, kEnding>}, {2, block<2, 1, kHow, kEnding>}, {1, row<1, kHow>}};
    return found;
  }
#else
  if constexpr (V == 1) {
    static const Shape found[] = {{5, block<5, 1, kHow, kEnding>}, {4, block<4, 1, kHow, kEnding>}, {2, block<2, 1, kHow, kEnding>}, {1, row<1, kHow>}};
    return found;
  } else {
    static const Shape found[] = {{1, row<V, kHow>}};
    return found;
  }
#endif
}

// The ending is part of a block where sums stay in registers for it; otherwise a block asks for it.
template <int V, int kHow>
const Shape* shapes_for(Ending ending) {
#if defined(__AVX2__)
  switch (ending) {
    case kFolded: return shapes<V, kHow, kFolded>();
    case kFoldedAdded: return shapes<V, kHow, kFoldedAdded>();
    case kOnlyHardswish: return shapes<V, kHow, kOnlyHardswish>();
    case kOnlyGelu: return shapes<V, kHow, kOnlyGelu>();
    case kFloats: return shapes<V, kHow, kFloats>();
    case kFloatsAdded: return shapes<V, kHow, kFloatsAdded>();
    default: return shapes<V, kHow, kAny>();
  }
#else
  return shapes<V, kHow, kOfLayer>();
#endif
}

// Where the pixels of a layer are read, written and added to.
struct Places {
  const View &x, &y, &z, &added;
  int64_t w;                              // pixels of a row
  int64_t stride_h, stride_w, top, left;  // of what is read
  int64_t channel_in, channel_out;
};

// Pixels in turn. Along a row addresses grow by a constant.
class Walk {
 public:
  Walk(const Places& places, int64_t pixel) : p(places), i(pixel / places.w), j(pixel % places.w) {
    in_step = p.stride_w * p.x.c;
    y_step = p.y.pixel, z_step = p.z.pixel, added_step = p.added.pixel * p.added.size;
    row();
  }

  ALWAYS_INLINE void next(const uint8_t*& from, Pixel& to) {
    from = in, to = out;
    in += in_step, out.y += y_step, out.z += z_step, out.added = (const char*)out.added + added_step;
    if (++j == p.w) j = 0, ++i, row();
  }

 private:
  const Places& p;
  int64_t i, j, in_step, y_step, z_step, added_step;
  const uint8_t* in;
  Pixel out;

  void row() {
    in = p.x.bytes(i * p.stride_h - p.top, j * p.stride_w - p.left) + p.channel_in;
    out.y = p.y.data ? p.y.bytes(i, j) + p.channel_out : nullptr;
    out.z = p.z.data ? p.z.floats(i, j) + p.channel_out : nullptr;
    out.added = p.added.data ? p.added.at(i, j) + p.channel_out * p.added.size : nullptr;
  }
};

// The first blocks ask for the weights that come next, a line of the cache for each four inputs: these may lie in memory,
// and are there when their turn comes.
template <int V, int kHow>
void pixels_by_outputs(Layer layer, Walk walk, int64_t count, int n) {
  const Shape* shape = shapes_for<V, kHow>(layer.ending);
  const int64_t most = shape->pixels;
  int64_t ahead = layer.next_step ? V : 0;
  const uint8_t* x[kMostPixels];
  Pixel pixels[kMostPixels];
  while (count > 0) {
    const int64_t wanted = count > most && count < 2 * most ? (count + 1) / 2 : count;  // two halves of the last pixels
    while (shape->pixels > wanted) ++shape;
    const int take = shape->pixels;
    for (int r = 0; r < take; ++r) walk.next(x[r], pixels[r]);
    shape->run(layer, x, pixels, n);
    count -= take;
    layer.next += layer.inner * layer.taps * 16;
    if (ahead && --ahead == 0) layer.next_step = 0;
  }
}

template <int kHow>
void blocks(const Step& step, Layer layer, Places places, int64_t pixel, int64_t pixels, int64_t from, int64_t to) {
  const int64_t outputs = step.outputs, padded = (outputs + 15) / 16 * 16;
  const int64_t bytes = layer.inner * layer.taps;
  const int64_t panels = pixels * layer.inner / panel_bytes() + 1;
  const int64_t panel = (pixels / panels + 12) / 12 * 12;  // of about the same length
  const Epilogue whole = layer.epilogue;
  const int8_t* weights = layer.weights;
  const int32_t* init = layer.init;
  const int64_t channel = places.channel_out;
  for (int64_t at = 0; at < pixels; at += panel) {
    const int64_t count = std::min(panel, pixels - at);
    for (int64_t n = from; n < to;) {
      const int64_t left = to - n;
      const int most = left >= 64 ? 4 : left >= 32 ? 2 : 1, packed = step.strip == 64 ? most : 1;  // together, in lanes
      const int v = count == 1 ? most : kWhole ? packed : 1;                                       // computed together
      const int strip = std::max(packed, v);
      layer.step = 64 * packed, layer.apart = packed == 1 ? kLanes * bytes : 64;
      for (int part = 0; part < strip; part += v) {
        const int64_t at_output = n + part * kLanes;
        layer.weights = weights + n * bytes + 64 * part;
        layer.init = init + at_output;
        layer.epilogue.scale = whole.scale + at_output, layer.epilogue.bias = whole.bias + at_output;
        places.channel_out = channel + at_output;
        const Walk walk(places, pixel + at);
        const int some = (int)std::min<int64_t>(v * kLanes, outputs - at_output);
        layer.next = (const char*)weights + (n + strip * kLanes) * bytes;
        layer.next_step = count > 1 && part == 0 && n + strip * kLanes < to ? 64 : 0;
        if (v == 4) pixels_by_outputs<4, kHow>(layer, walk, count, some);
        else if (v == 2) pixels_by_outputs<2, kHow>(layer, walk, count, some);
        else pixels_by_outputs<1, kHow>(layer, walk, count, some);
      }
      n += strip * kLanes;
    }
  }
}

using Blocks = void (*)(const Step&, Layer, Places, int64_t, int64_t, int64_t, int64_t);

#ifdef ADDS_PAIRS
Blocks blocks_for(int64_t arithmetic) {
  switch (arithmetic) {
    case kBounded: return blocks<kBounded>;
    case kSeven: return blocks<kSeven>;
    case kSigned: return blocks<kSigned>;
    default: return blocks<kExact>;
  }
}
#else
Blocks blocks_for(int64_t) { return blocks<kExact>; }
#endif

// Whether each thread computes some of the outputs of all pixels, for which it reads its own weights only, and not all
// outputs of some pixels: where there are few pixels, or more weights than there is to read of the image.
bool share_outputs(const Run& run, const Step& step, const View& x, int64_t pixels) {
  if (pixels < 24 * run.threads) return true;
  const int64_t weights = step.outputs * step.inner * step.taps, image = x.h * x.w * step.inputs;
  const int64_t strips = (step.outputs + step.strip - 1) / step.strip;
  return weights > 2 * image && (strips % run.threads == 0 || strips >= 8 * run.threads);
}

}  // namespace

Epilogue epilogue_of(const Run& run, const Step& step) {
  Epilogue e{nullptr, nullptr, Range(step.zero, step.low, step.high), 0, 0, 0, 0, 0, 0, false, false};
  e.scale = run.constant<float>(step.scale), e.bias = run.constant<float>(step.bias);
  e.activation = step.activation, e.a = step.a(), e.b = step.b();
  e.inverse = step.inverse();
  if (step.other >= 0) {
    e.adds_floats = run.tensors[step.other].type == kFloat, e.adds_bytes = !e.adds_floats;
    e.added_scale = step.other_scale(), e.added_zero = (float)step.other_zero;
  }
  return e;
}

void convolution(const Run& run, const Step& step) {
  const View x = run.view(step.x), y = run.part(step, step.y), z = run.part(step, step.z);
  const View added = run.part(step, step.other), &out = step.y >= 0 ? y : z;
  int64_t offsets[kMostTaps];
  // A tap is a place of the kernel, or a row of it where the bytes of a row lie side by side.
  const int64_t across = step.taps == step.kernel_h ? 1 : step.kernel_w;
  for (int64_t t = 0; t < step.taps; ++t)
    offsets[t] = t / across * step.dilation_h * x.row() + t % across * step.dilation_w * x.c;
  const int64_t pixels = out.pixels(), padded = (step.outputs + 15) / 16 * 16, strip = step.strip;
  const Blocks compute = blocks_for(step.arithmetic);
  for (int64_t g = 0; g < step.groups; ++g) {
    Layer layer{nullptr, nullptr, step.inner, step.taps, 0, 0, offsets, epilogue_of(run, step), linear_ending_of(run, step), nullptr, 0};
    layer.weights = run.constant<int8_t>(step.weight) + g * padded * step.inner * step.taps;
    layer.init = run.constant<int32_t>(step.init) + (g + (kShifts && step.arithmetic == kSigned ? step.groups : 0)) * padded;
    layer.epilogue.scale += g * padded, layer.epilogue.bias += g * padded;
    const Places places{x, y, z, added, out.w, step.stride_h, step.stride_w, step.top, step.left, g * step.inputs,
                        g * step.outputs};
    const int64_t most = pixels * padded * step.inner * step.taps / kPartProducts;
    if (share_outputs(run, step, x, pixels))
      in_parallel(run, padded, strip, most, [&](int64_t begin, int64_t end) {
        compute(step, layer, places, 0, pixels, begin, end);
      });
    else
      in_parallel(run, pixels, 12, most, [&](int64_t begin, int64_t end) {
        compute(step, layer, places, begin, end - begin, 0, padded);
      });
  }
}

}  // namespace quant2e
