// The peak rate of one core: products of bytes, in registers only; and what an inner loop reaches without registers.

#include <chrono>

#include "../lowering/native/kernels/dot.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr int kSums = 12;  // more than the latency of an instruction times how many start in a cycle
#else
constexpr int kSums = 5;  // of two registers each: as many as there are, and as inner loops hold
#endif
constexpr int kTurns = 4096;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Operations a second of `turn`, which computes `operations`: the best of what fits in the time.
template <class Turn>
double best(double time, double operations, const Turn& turn) {
  double rate = 0;
  const double end = seconds() + time;
  do {
    const double begin = seconds();
    turn();
    rate = std::max(rate, operations / (seconds() - begin));
  } while (seconds() < end);
  return rate;
}

// The same bytes, which the compiler takes for others: products that it knows already would be computed once.
ALWAYS_INLINE quant2e::B anew(quant2e::B x) {
#if defined(__AVX512VNNI__)
  asm volatile("" : "+v"(x));
#elif defined(__AVX2__)
  asm volatile("" : "+x"(x.a), "+x"(x.b));
#else
  asm volatile("" : "+m"(x));
#endif
  return x;
}

}  // namespace

// Multiply-accumulates a second of unsigned and signed bytes.
extern "C" __attribute__((visibility("default"))) double quant2e_peak_int8(double time) {
  using namespace quant2e;
  I sums[kSums];
  B operands;
  std::memset(&operands, 1, sizeof operands);
  for (I& sum : sums) sum = set_int(0);
  const double rate = best(time, 4.0 * kLanes * kSums * kTurns, [&] {
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = dot<kBounded>(sums[i], anew(operands), 0x01010101);
    }
  });
  alignas(64) int32_t kept[kSums][kLanes];
  for (int i = 0; i < kSums; ++i) store_int(kept[i], sums[i]);
  asm volatile("" : : "m"(kept));  // all lanes are used: none need not be computed
  return rate;
}

// Multiply-accumulates a second of 6 pixels by 64 outputs, each sum read from memory and written back for every four
// inputs, as a compiler does that finds no register for it.
extern "C" __attribute__((visibility("default"))) double quant2e_spilled_int8(double time) {
  using namespace quant2e;
  constexpr int kPixels = 6, kOutputs = 4, kInputs = 768;
  alignas(64) static int8_t weights[kInputs * kOutputs * kLanes];
  static int32_t inputs[kPixels][kInputs / 4];
  alignas(64) int32_t sums[kPixels][kOutputs][kLanes] = {};
  asm volatile("" : "+m"(weights), "+m"(inputs));  // they hold anything
  return best(time, 1.0 * kPixels * kOutputs * kLanes * kInputs, [&] {
    for (int k = 0; k < kInputs / 4; ++k) {
      for (int r = 0; r < kPixels; ++r)
        for (int v = 0; v < kOutputs; ++v) {
          const B weight = load_weights(weights + 4 * kLanes * (k * kOutputs + v));
          store_int(sums[r][v], dot<kBounded>(load_int(sums[r][v]), weight, inputs[r][k]));
        }
      asm volatile("" : "+m"(sums));
    }
  });
}
