// Linear layers with an integer weight: rows of floats, or of int8.
//
//     y[m, n] = bias[n] + sum over groups g of  scale[n, g] * sum over k in g of  x[m, k] * (w[n, k] - zero_point[n, g])
//
// A weight is read as the integers it is stored as. Few rows: unpacked into registers, once for every few rows. Many:
// into a panel that stays in the cache, as floats. A sum runs in float32 (of int8 rows: within a group in int32), in an
// order that neither threads nor neighbouring outputs change.
//
// Weights lie in strips of 64 outputs, which are four vectors of sixteen; a strip is one stream through memory. Of each
// vector in turn it has a line of 64 bytes: of 8 bits, four inputs for sixteen outputs each; of 4 bits, eight inputs, four
// bytes for each output, whose low halves are inputs 0 to 3 and whose high halves are inputs 4 to 7, each plus 8. A
// group is whole lines, filled up with zeros.

#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "../../../quant2e/observers/native/native_op.cpp"
#include "lanes.cpp"

extern "C" {
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_get_dtype(Handle, int32_t*);
}

namespace {

constexpr int kVectors = 4;  // of a strip
constexpr int kStrip = kVectors * kLanes;
constexpr int64_t kGrain = 1 << 16;      // multiplications that are worth waking a thread for
constexpr int64_t kPanelInputs = 128;    // unpacked at a time
constexpr int64_t kSlab = 32;            // blocks of rows that read a panel before the next one is unpacked
constexpr int64_t kWeightsAhead = 16384; // bytes that are asked for from memory in time
constexpr int64_t kScalesAhead = 2048;

struct Work {
  const uint8_t* weight;  // [strips, groups, lines, 4, 64]
  const void* scale;      // [strips, groups, 64], float32 or bfloat16
  const int8_t* point;    // [strips, groups, 64], or null where all are 0
  const float* bias;      // [outputs], or null
  const float* totals;    // [outputs], what the dequantized weights of an output add up to: for int8 rows
  float* y;               // [rows, outputs]
  bool bfloats;
  int64_t rows, inputs, outputs, groups, lines, line_inputs;
  // rows as `arrange_rows` leaves them, in blocks of `rows_at_once`, the last perhaps of fewer
  const void* x;      // by block [groups * lines * line_inputs, rows of the block]: floats, or four int8 in one
  const float* sums;  // by block [groups, rows of the block], of a group of x; null where nobody needs them
  const float *x_scale, *x_point;  // of int8 rows: [rows]
  int rows_at_once;

  int64_t padded() const { return groups * lines * line_inputs; }
  int64_t strips() const { return (outputs + kStrip - 1) / kStrip; }
  int64_t row_blocks() const { return (rows + rows_at_once - 1) / rows_at_once; }
  int rows_of(int64_t row_block) const {
    const int64_t left = rows - row_block * rows_at_once;
    return left < rows_at_once ? (int)left : rows_at_once;
  }
  const uint8_t* lines_of(int64_t strip, int64_t first) const {
    return weight + (strip * groups * lines + first) * kVectors * kLineBytes;
  }
};

template <class Act, int... kEach>
inline void each_of(std::integer_sequence<int, kEach...>, Act&& act) {
  (act(std::integral_constant<int, kEach>{}), ...);
}

// A line of weights, and its numbers: those of one of its inputs, for sixteen outputs.
template <int kBits>
struct Numbers;
template <>
struct Numbers<4> {
  Line packed;
  explicit Numbers(const uint8_t* from) : packed(line(from)) {}
  template <int kWhich>
  Lanes at() const {
    return of_nibbles<kWhich>(packed);
  }
  static constexpr int kInputs = 8;
  static constexpr int input(int which) { return input_of_nibble(which); }
};
template <>
struct Numbers<8> {
  const int8_t* from;
  explicit Numbers(const uint8_t* at) : from((const int8_t*)at) {}
  template <int kWhich>
  Lanes at() const {
    return of_bytes(from + kWhich * kLanes);
  }
  static constexpr int kInputs = 4;
  static constexpr int input(int which) { return which; }
};
template <int kBits>
using EachInput = std::make_integer_sequence<int, Numbers<kBits>::kInputs>;

// Scales and zero points of a vector of outputs, by their place among all of them.
inline Lanes scale_at(const Work& work, int64_t at) {
  return work.bfloats ? of_bfloats((const uint16_t*)work.scale + at) : loaded((const float*)work.scale + at);
}
inline Lanes point_at(const Work& work, int64_t at) { return of_bytes(work.point + at); }
inline void expect_parameters(const Work& work, int64_t at) {
  expect((const uint8_t*)work.scale + at * (work.bfloats ? 2 : 4) + kScalesAhead);
  if (work.point) expect(work.point + at + kScalesAhead / 2);
}

// Sixteen of a vector of `outputs` numbers; where it ends before, zeros.
inline Lanes part_of(const float* vector, int64_t first, int64_t outputs) {
  if (first + kLanes <= outputs) return loaded(vector + first);
  float found[kLanes] = {};
  for (int64_t n = first; n < outputs; ++n) found[n - first] = vector[n];
  return loaded(found);
}

inline void write(const Work& work, int64_t row, int64_t first, Lanes y) {
  if (first >= work.outputs) return;
  if (work.bias) y = sum(y, part_of(work.bias, first, work.outputs));
  float* to = work.y + row * work.outputs + first;
  if (first + kLanes <= work.outputs) return store(to, y);
  float made[kLanes];
  store(made, y);
  std::memcpy(to, made, (work.outputs - first) * sizeof(float));
}

// ----------------------------------------------------------------------------------------------- few rows of floats

// R rows by the V vectors of outputs of a strip from vector `v` on.
template <int kBits, int R, int V>
void few_rows(const Work& work, int64_t row_block, int64_t strip, int v) {
  constexpr int kInputs = Numbers<kBits>::kInputs;
  constexpr int kChains = R * V < 8 ? 2 : 1;  // sums of their own, so that no addition waits for the one before
  const int64_t row = row_block * work.rows_at_once;
  const float* x = (const float*)work.x + row * work.padded();
  const uint8_t* from = work.lines_of(strip, 0) + v * kLineBytes;
  int64_t at = strip * work.groups * kStrip + v * kLanes;
  Lanes total[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) total[r][i] = all(0);
  for (int64_t g = 0; g < work.groups; ++g, at += kStrip) {
    Lanes part[kChains][R][V];
    for (int c = 0; c < kChains; ++c)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) part[c][r][i] = all(0);
    for (int64_t l = 0; l < work.lines; ++l, x += R * kInputs, from += kVectors * kLineBytes) {
      for (int i = 0; i < V; ++i) expect(from + i * kLineBytes + kWeightsAhead);
      each_of(EachInput<kBits>{}, [&](auto which) {
        constexpr int kWhich = decltype(which)::value;
        Lanes w[V];
        for (int i = 0; i < V; ++i) w[i] = Numbers<kBits>(from + i * kLineBytes).template at<kWhich>();
        for (int r = 0; r < R; ++r) {
          const Lanes value = all(x[Numbers<kBits>::input(kWhich) * R + r]);
          Lanes* sums = part[kWhich % kChains][r];
          for (int i = 0; i < V; ++i) sums[i] = plus_product(sums[i], w[i], value);
        }
      });
    }
    for (int i = 0; i < V; ++i) {
      expect_parameters(work, at + i * kLanes);
      const Lanes scale = scale_at(work, at + i * kLanes);
      for (int r = 0; r < R; ++r) {
        Lanes found = kChains > 1 ? sum(part[0][r][i], part[kChains - 1][r][i]) : part[0][r][i];
        if (work.point)
          found = minus_product(found, point_at(work, at + i * kLanes), all(work.sums[row * work.groups + g * R + r]));
        total[r][i] = plus_product(total[r][i], found, scale);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) write(work, row + r, strip * kStrip + (v + i) * kLanes, total[r][i]);
}

// ---------------------------------------------------------------------------------------------- many rows of floats

// The dequantized weights of V vectors of outputs, from line `first` to `end`: [lines * inputs of a line, V, 16].
template <int kBits, int V>
void unpack(const Work& work, int64_t strip, int v, int64_t first, int64_t end, float* panel) {
  for (int i = 0; i < V; ++i) {
    const uint8_t* from = work.lines_of(strip, first) + (v + i) * kLineBytes;
    float* to = panel + i * kLanes;
    for (int64_t l = first; l < end;) {
      const int64_t g = l / work.lines, stop = (g + 1) * work.lines < end ? (g + 1) * work.lines : end;
      const int64_t at = (strip * work.groups + g) * kStrip + (v + i) * kLanes;
      const Lanes scale = scale_at(work, at), point = work.point ? point_at(work, at) : all(0);
      for (; l < stop; ++l, from += kVectors * kLineBytes, to += Numbers<kBits>::kInputs * V * kLanes) {
        expect(from + kWeightsAhead);
        const Numbers<kBits> numbers(from);
        each_of(EachInput<kBits>{}, [&](auto which) {
          constexpr int kWhich = decltype(which)::value;
          store(to + Numbers<kBits>::input(kWhich) * V * kLanes,
                product(difference(numbers.template at<kWhich>(), point), scale));
        });
      }
    }
  }
}

template <int R, int V>
void multiply(const float* x, const float* panel, int64_t inputs, float* sums, bool first) {
  Lanes total[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) total[r][i] = first ? all(0) : loaded(sums + (r * V + i) * kLanes);
  for (int64_t k = 0; k < inputs; ++k, x += R, panel += V * kLanes) {
    Lanes w[V];
    for (int i = 0; i < V; ++i) w[i] = loaded(panel + i * kLanes);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < V; ++i) total[r][i] = plus_product(total[r][i], w[i], all(x[r]));
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) store(sums + (r * V + i) * kLanes, total[r][i]);
}

template <int V, int... kEach>
auto multiply_of(int rows, std::integer_sequence<int, kEach...>) {
  static constexpr decltype(&multiply<1, V>) kAll[] = {multiply<kEach + 1, V>...};
  return kAll[rows - 1];
}

// All rows by V vectors of outputs.
template <int kBits, int V>
void many_rows(const Work& work, int64_t strip, int v) {
  constexpr int kInputs = Numbers<kBits>::kInputs;
  alignas(64) float panel[kPanelInputs * V * kLanes], sums[kSlab][kPanelRows * V * kLanes];
  const int64_t lines = work.groups * work.lines, step = kPanelInputs / kInputs;
  for (int64_t slab = 0; slab < work.row_blocks(); slab += kSlab) {
    const int64_t stop = slab + kSlab < work.row_blocks() ? slab + kSlab : work.row_blocks();
    for (int64_t l = 0; l < lines; l += step) {
      const int64_t end = l + step < lines ? l + step : lines;
      unpack<kBits, V>(work, strip, v, l, end, panel);
      for (int64_t m = slab; m < stop; ++m) {
        const int rows = work.rows_of(m);
        const float* x = (const float*)work.x + m * work.rows_at_once * work.padded() + l * kInputs * rows;
        multiply_of<V>(rows, std::make_integer_sequence<int, kPanelRows>{})(x, panel, (end - l) * kInputs,
                                                                            sums[m - slab], l == 0);
      }
    }
    for (int64_t m = slab; m < stop; ++m)
      for (int r = 0; r < work.rows_of(m); ++r)
        for (int i = 0; i < V; ++i)
          write(work, m * work.rows_at_once + r, strip * kStrip + (v + i) * kLanes,
                loaded(sums[m - slab] + (r * V + i) * kLanes));
  }
}

// ----------------------------------------------------------------------------------------------------- rows of int8

template <int R, int V>
void int8_rows(const Work& work, int64_t row_block, int64_t strip, int v) {
  const int64_t row = row_block * work.rows_at_once;
  const int32_t* x = (const int32_t*)work.x + row * (work.padded() / 4);
  const float* sums = work.sums + row * work.groups;
  const uint8_t* from = work.lines_of(strip, 0) + v * kLineBytes;
  int64_t at = strip * work.groups * kStrip + v * kLanes;
  Lanes total[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) total[r][i] = all(0);
  for (int64_t g = 0; g < work.groups; ++g, sums += R, at += kStrip) {
    Counts part[R][V];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < V; ++i) part[r][i] = all_counts(-8 * (int32_t)sums[r]);
    for (int64_t l = 0; l < work.lines; ++l, x += 2 * R, from += kVectors * kLineBytes)
      for (int i = 0; i < V; ++i) {
        expect(from + i * kLineBytes + kWeightsAhead);
        const Line packed = line(from + i * kLineBytes), low = low_halves(packed), high = high_halves(packed);
        for (int r = 0; r < R; ++r)
          part[r][i] = plus_products(plus_products(part[r][i], low, x[r]), high, x[R + r]);
      }
    for (int i = 0; i < V; ++i) {
      expect_parameters(work, at + i * kLanes);
      const Lanes scale = scale_at(work, at + i * kLanes);
      for (int r = 0; r < R; ++r) {
        Lanes found = of_counts(part[r][i]);
        if (work.point) found = minus_product(found, point_at(work, at + i * kLanes), all(sums[r]));
        total[r][i] = plus_product(total[r][i], found, scale);
      }
    }
  }
  for (int i = 0; i < V; ++i) {
    const int64_t first = strip * kStrip + (v + i) * kLanes;
    const Lanes weights = part_of(work.totals, first, work.outputs);
    for (int r = 0; r < R; ++r) {
      const Lanes y = minus_product(total[r][i], weights, all(work.x_point[row + r]));
      write(work, row + r, first, product(y, all(work.x_scale[row + r])));
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ choice

// Kinds of work: each computes a strip of outputs, of all rows.
template <int kBits>
struct FewRows {
  template <int R>
  static void block(const Work& work, int64_t m, int64_t strip) {
    for (int v = 0; v < kVectors; v += vectors_of(R)) few_rows<kBits, R, vectors_of(R)>(work, m, strip, v);
  }
};
struct Int8Rows {
  template <int R>
  static void block(const Work& work, int64_t m, int64_t strip) {
    for (int v = 0; v < kVectors; v += vectors_of(R)) int8_rows<R, vectors_of(R)>(work, m, strip, v);
  }
};

template <class Kind, int... kEach>
auto block_of(int rows, std::integer_sequence<int, kEach...>) {
  static constexpr decltype(&Kind::template block<1>) kAll[] = {Kind::template block<kEach + 1>...};
  return kAll[rows - 1];
}

template <class Kind>
void strips_of(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  for (int64_t strip = begin; strip < end; ++strip)
    for (int64_t m = 0; m < work.row_blocks(); ++m)
      block_of<Kind>(work.rows_of(m), std::make_integer_sequence<int, kFewRows>{})(work, m, strip);
}

template <int kBits>
void strips_of_many_rows(int64_t begin, int64_t end, void* context) {
  constexpr int V = vectors_of(kPanelRows);
  for (int64_t strip = begin; strip < end; ++strip)
    for (int v = 0; v < kVectors; v += V) many_rows<kBits, V>(*(const Work*)context, strip, v);
}

// ------------------------------------------------------------------------------------------------------ arrangement

struct Arranged {
  const Work* work;
  const void* from;  // [rows, inputs]
  void* x;           // null where the rows are arranged already
  float* sums;       // or null
};

template <class T>
void arrange_rows(int64_t begin, int64_t end, void* context) {
  const Arranged& to = *(const Arranged*)context;
  const Work& work = *to.work;
  const int64_t group = work.inputs / work.groups, room = work.lines * work.line_inputs;
  constexpr int kTogether = 4 / sizeof(T);  // numbers of a row that lie together: one float, or four int8
  for (int64_t m = begin; m < end; ++m) {
    const int rows = work.rows_of(m);
    for (int r = 0; r < rows; ++r) {
      const T* from = (const T*)to.from + (m * work.rows_at_once + r) * work.inputs;
      T* x = (T*)to.x + m * work.rows_at_once * work.padded() + r * kTogether;
      for (int64_t g = 0; g < work.groups; ++g, from += group, x += room * rows) {
        for (int64_t k = 0; to.x && k < room; ++k)
          x[k / kTogether * rows * kTogether + k % kTogether] = k < group ? from[k] : (T)0;
        if (!to.sums) continue;
        typename std::conditional<std::is_same<T, float>::value, double, int32_t>::type total = 0;
        for (int64_t k = 0; k < group; ++k) total += from[k];
        to.sums[m * work.rows_at_once * work.groups + g * rows + r] = (float)total;
      }
    }
  }
}

typedef void (*Strips)(int64_t begin, int64_t end, void* work);

template <class T>
void compute(Work& work, const T* from, int at_once, bool with_sums, Strips strips) {
  const int64_t count = (work.rows + at_once - 1) / at_once;
  work.rows_at_once = count ? (int)((work.rows + count - 1) / count) : 1;  // blocks of about equal size
  const bool arranged = work.rows == 1 && work.padded() == work.inputs;
  const std::unique_ptr<T[]> x(arranged ? nullptr : new T[work.rows * work.padded()]);
  const std::unique_ptr<float[]> sums(with_sums ? new float[work.rows * work.groups] : nullptr);
  if (x || sums) {
    Arranged to{&work, from, x.get(), sums.get()};
    const int64_t each = work.rows_at_once * work.padded();
    must(torch_parallel_for(0, work.row_blocks(), kGrain / (each + 1) + 1, arrange_rows<T>, &to));
  }
  work.x = x ? (const void*)x.get() : from;
  work.sums = sums.get();
  const int64_t each = work.padded() * kStrip * work.rows;
  must(torch_parallel_for(0, work.strips(), kGrain / (each + 1) + 1, strips, &work));
}

// ---------------------------------------------------------------------------------------------------------------- ops

struct Layer {
  Argument weight, scale, point, bias;
  explicit Layer(const uint64_t* stack) : weight(stack[0]), scale(stack[1]), point(stack[2]), bias(stack[3]) {}
};

template <class T>
T* data_or_null(const Argument& x) {
  int64_t count = 0;
  must(aoti_torch_get_numel(x.handle, &count));
  return count ? x.data<T>() : nullptr;
}

bool is(const Argument& x, int32_t dtype) {
  int32_t found = 0;
  must(aoti_torch_get_dtype(x.handle, &found));
  return found == dtype;
}

// What the arguments say; makes the result, of the shape of x but for its last size.
Work work_of(const Argument& x, const Layer& layer, int64_t outputs, Handle* made) {
  int64_t rank = 0, *sizes = nullptr, *packed = nullptr, shape[64], strides[64], rows = 1;
  must(aoti_torch_get_dim(x.handle, &rank));
  must(aoti_torch_get_sizes(x.handle, &sizes));
  must(aoti_torch_get_sizes(layer.weight.handle, &packed));
  for (int64_t d = 0; d + 1 < rank; ++d) rows *= shape[d] = sizes[d];
  shape[rank - 1] = outputs;
  for (int64_t d = rank - 1, step = 1; d >= 0; --d) strides[d] = step, step *= shape[d];
  const int32_t float32 = aoti_torch_dtype_float32(), cpu = aoti_torch_device_type_cpu();
  must(aoti_torch_empty_strided(rank, shape, strides, float32, cpu, 0, made));
  void* y = nullptr;
  must(aoti_torch_get_data_ptr(*made, &y));
  Work work{};
  work.weight = layer.weight.data<uint8_t>();
  work.scale = layer.scale.data<void>();
  work.point = data_or_null<int8_t>(layer.point);
  work.bias = data_or_null<float>(layer.bias);
  work.y = (float*)y;
  work.bfloats = is(layer.scale, aoti_torch_dtype_bfloat16());
  work.rows = rows, work.inputs = sizes[rank - 1], work.outputs = outputs;
  work.groups = packed[1], work.lines = packed[2];
  work.line_inputs = is(layer.weight, aoti_torch_dtype_uint8()) ? 8 : 4;
  return work;
}

// (Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor bias, int outputs) -> Tensor
void weight_only_linear(uint64_t* stack, uint64_t, uint64_t) {
  Argument x(stack[0]);
  Layer layer(stack + 1);
  Handle y = nullptr;
  Work work = work_of(x, layer, (int64_t)stack[5], &y);
  const bool bytes = work.line_inputs == 4;
  if (work.rows <= 2 * kFewRows)
    compute(work, x.data<float>(), kFewRows, work.point != nullptr,
            bytes ? strips_of<FewRows<8>> : strips_of<FewRows<4>>);
  else
    compute(work, x.data<float>(), kPanelRows, false, bytes ? strips_of_many_rows<8> : strips_of_many_rows<4>);
  stack[0] = (uint64_t)y;
}

// (Tensor x, Tensor x_scale, Tensor x_zero_point, Tensor weight, Tensor scale, Tensor zero_point, Tensor bias,
//  Tensor totals, int outputs) -> Tensor
void int8_rows_linear(uint64_t* stack, uint64_t, uint64_t) {
  Argument x(stack[0]), x_scale(stack[1]), x_point(stack[2]);
  Layer layer(stack + 3);
  Argument totals(stack[7]);
  Handle y = nullptr;
  Work work = work_of(x, layer, (int64_t)stack[8], &y);
  work.totals = totals.data<float>();
  work.x_scale = x_scale.data<float>(), work.x_point = x_point.data<float>();
  compute(work, x.data<int8_t>(), kFewRows, true, strips_of<Int8Rows>);
  stack[0] = (uint64_t)y;
}

}  // namespace

// Gives the ops, which weight_only.py has declared, to torch; returns 0, or the step that failed.
extern "C" int quant2e_register() {
  Handle library = nullptr;
  if (aoti_torch_library_init_impl("quant2e", "CPU", __FILE__, __LINE__, &library)) return 1;
  if (aoti_torch_library_impl(library, "weight_only_linear", weight_only_linear)) return 2;
  return aoti_torch_library_impl(library, "int8_rows_linear", int8_rows_linear) ? 3 : 0;
}
