// quant2e::few_rows_linear: a linear layer with float rows and an integer weight, for few rows.
//
//     y[m, n] = bias[n] + sum over groups g of  scale[n, g] * sum over k in g of  x[m, k] * (w[n, k] - zero_point[n, g])
//
// A weight is read once, as the integers it is stored as; that is what the time of one row consists of. Sums run in
// float32, in an order that the number of threads does not change.

#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "../../../quant2e/observers/native/native_op.cpp"

namespace {

constexpr int kLanes = 16;
constexpr int kOutputs = 4;  // computed together
constexpr int64_t kGrain = 1 << 16;  // multiplications that are worth waking a thread for
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

struct Work {
  const float* x;
  const void* weight;
  const float *scale, *point, *bias;
  const float* totals;  // of x by row and group
  float* y;
  int64_t rows, inputs, outputs, group;
};

Lanes loaded(const float* x) {
  Lanes found;
  std::memcpy(&found, x, sizeof found);
  return found;
}

// Sixteen integers as floats. GCC converts them one by one unless it is told the instructions.
#if defined(__AVX512F__)
Lanes converted(__m128i raw) { return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)); }
#elif defined(__AVX2__)
Lanes converted(__m128i raw) {
  const __m256 parts[2] = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)),
                           _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(raw, 8)))};
  return loaded((const float*)parts);
}
#endif

Lanes numbers(const int8_t* from) {
#ifdef __AVX2__
  return converted(_mm_loadu_si128((const __m128i*)from));
#else
  float found[kLanes];
  for (int i = 0; i < kLanes; ++i) found[i] = (float)from[i];
  return loaded(found);
#endif
}

// The low or, shifted by 4, the high halves of sixteen bytes, each 8 more than the number it stands for.
template <int kShift>
Lanes halves(const uint8_t* from) {
#ifdef __AVX2__
  const __m128i raw = _mm_loadu_si128((const __m128i*)from);
  const __m128i half = _mm_and_si128(_mm_srli_epi16(raw, kShift), _mm_set1_epi8(15));
  return converted(_mm_sub_epi8(half, _mm_set1_epi8(8)));
#else
  float found[kLanes];
  for (int i = 0; i < kLanes; ++i) found[i] = (float)((from[i] >> kShift) & 15) - 8;
  return loaded(found);
#endif
}

float sum(Lanes v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// A block of R rows and O outputs: sums of their own, so that no addition waits for the one before.
template <int R, int O, bool kPacked>
void block(const Work& work, int64_t m, int64_t n) {
  const int64_t groups = work.inputs / work.group;
  const int64_t whole = work.group - work.group % kLanes;  // packed groups have no rest
  Lanes sums[R][O] = {};
  float rest[R][O] = {};  // what does not fill the lanes, and what the zero points take away
  for (int64_t g = 0; g < groups; ++g) {
    const float* x = work.x + m * work.inputs + g * work.group;
    const int64_t at = n * work.inputs + g * work.group;
    const float *scale = work.scale + n * groups + g, *point = work.point + n * groups + g;
    Lanes part[R][O] = {};
    if (kPacked) {
      const uint8_t* w = (const uint8_t*)work.weight + at / 2;
      for (int64_t k = 0; k < work.group; k += 2 * kLanes)
        for (int o = 0; o < O; ++o) {
          const uint8_t* from = w + (o * work.inputs + k) / 2;
          const Lanes low = halves<0>(from), high = halves<4>(from);
          for (int r = 0; r < R; ++r) {
            const float* row = x + r * work.inputs + k;
            part[r][o] += loaded(row) * low + loaded(row + kLanes) * high;
          }
        }
    } else {
      const int8_t* w = (const int8_t*)work.weight + at;
      for (int64_t k = 0; k < whole; k += kLanes)
        for (int o = 0; o < O; ++o) {
          const Lanes value = numbers(w + o * work.inputs + k);
          for (int r = 0; r < R; ++r) part[r][o] += loaded(x + r * work.inputs + k) * value;
        }
      for (int64_t k = whole; k < work.group; ++k)
        for (int o = 0; o < O; ++o)
          for (int r = 0; r < R; ++r)
            rest[r][o] += x[r * work.inputs + k] * (float)w[o * work.inputs + k] * scale[o * groups];
    }
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < O; ++o) {
        sums[r][o] += part[r][o] * scale[o * groups];
        if (point[o * groups] != 0)
          rest[r][o] -= work.totals[(m + r) * groups + g] * point[o * groups] * scale[o * groups];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o)
      work.y[(m + r) * work.outputs + n + o] = sum(sums[r][o]) + rest[r][o] + work.bias[n + o];
}

template <int O, bool kPacked>
void outputs_at(const Work& work, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= work.rows; m += 4)  // more sums than registers would be slower
    for (int o = 0; o < O; o += O < 2 ? 1 : 2) block<4, O < 2 ? 1 : 2, kPacked>(work, m, n + o);
  for (; m + 2 <= work.rows; m += 2) block<2, O, kPacked>(work, m, n);
  if (m < work.rows) block<1, O, kPacked>(work, m, n);
}

template <bool kPacked>
void outputs_from(int64_t begin, int64_t end, void* context) {
  const Work& work = *(const Work*)context;
  int64_t n = begin;
  for (; n + kOutputs <= end; n += kOutputs) outputs_at<kOutputs, kPacked>(work, n);
  for (; n < end; ++n) outputs_at<1, kPacked>(work, n);
}

// Sums of `n` values each, in double: zero points take a multiple of them away again.
std::vector<float> totals_of(const float* x, int64_t count, int64_t n) {
  std::vector<float> found(count);
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t k = 0; k < n; ++k) total += x[i * n + k];
    found[i] = (float)total;
  }
  return found;
}

// (Tensor x, Tensor weight, Tensor scale, Tensor zero_point, Tensor bias, bool packed) -> Tensor
void few_rows_linear(uint64_t* stack, uint64_t, uint64_t) {
  Argument x(stack[0]), weight(stack[1]), scale(stack[2]), point(stack[3]), bias(stack[4]);
  const bool packed = stack[5] & 1;
  int64_t rank = 0, *sizes = nullptr, *groups = nullptr, shape[64], strides[64];
  must(aoti_torch_get_dim(x.handle, &rank));
  must(aoti_torch_get_sizes(x.handle, &sizes));
  must(aoti_torch_get_sizes(scale.handle, &groups));
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < rank; ++d) rows *= shape[d] = sizes[d];
  shape[rank - 1] = groups[0];
  for (int64_t d = rank - 1, step = 1; d >= 0; --d) strides[d] = step, step *= shape[d];
  Handle y = nullptr;
  must(aoti_torch_empty_strided(rank, shape, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &y));
  void* out = nullptr;
  must(aoti_torch_get_data_ptr(y, &out));
  const int64_t inputs = sizes[rank - 1], outputs = groups[0];
  const std::vector<float> totals = totals_of(x.data<float>(), rows * groups[1], inputs / groups[1]);
  Work work{x.data<float>(),    weight.data<void>(), scale.data<float>(), point.data<float>(), bias.data<float>(),
            totals.data(),      (float*)out,         rows,                inputs,              outputs,
            inputs / groups[1]};
  const int64_t grain = kGrain / (inputs * (rows ? rows : 1)) + 1;
  must(torch_parallel_for(0, outputs, grain, packed ? outputs_from<true> : outputs_from<false>, &work));
  stack[0] = (uint64_t)y;
}

}  // namespace

// Gives the op, which few_rows.py has declared, to torch; returns 0, or the step that failed.
extern "C" int quant2e_register() {
  Handle library = nullptr;
  if (aoti_torch_library_init_impl("quant2e", "CPU", __FILE__, __LINE__, &library)) return 1;
  return aoti_torch_library_impl(library, "few_rows_linear", few_rows_linear) ? 2 : 0;
}
