// The peak rate of one core: products of bytes, in registers only; and what an inner loop reaches without registers.

#include <chrono>

#include "../lowering/native/kernels/dot.h"

namespace {

constexpr int kSums = 12;  // more than the latency of an instruction times how many start in a cycle
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
      for (int i = 0; i < kSums; ++i) sums[i] = dot<kBounded>(sums[i], operands, 0x01010101);
    }
  });
  int32_t kept[kLanes], total = 0;
  for (const I& sum : sums) store_int(kept, sum), total += kept[0];
  return total == -1 ? 0 : rate;
}

// Multiply-accumulates a second of 6 pixels by 64 outputs, each sum read from memory and written back for every four
// inputs, as a compiler does that finds no register for it.
extern "C" __attribute__((visibility("default"))) double quant2e_spilled_int8(double time) {
  using namespace quant2e;
  constexpr int kPixels = 6, kOutputs = 4, kInputs = 768;
  alignas(64) static int8_t weights[kInputs * kOutputs * kLanes];
  static int32_t inputs[kPixels][kInputs / 4];
  alignas(64) int32_t sums[kPixels][kOutputs][kLanes] = {};
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
