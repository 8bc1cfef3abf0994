// What the kernels of depthwise convolutions share.
#pragma once

#include "bytes.h"
#include "dot.h"
#include "epilogue.h"

namespace quant2e {

struct Depthwise {
  const Step& step;
  const View &x, &y, &z, &added, &out;
  Epilogue epilogue;
  const int8_t* weights;
  const int32_t* init;

  // Packed weights of a strip of 64 channels. `groups`: of four rows of the kernel, `rows`: of outputs computed together.
  const int8_t* packed(int64_t channel, int64_t groups, int64_t rows) const {
    return weights + channel / kStrip * step.kernel_w * groups * rows * 4 * kStrip;
  }
  Pixel pixel(int64_t i, int64_t j, int64_t channel) const {
    return {y.data ? y.bytes(i, j) + channel : nullptr, z.data ? z.floats(i, j) + channel : nullptr,
            added.data ? added.at(i, j) + channel * added.size : nullptr};
  }
};

// Outputs of `rows` rows from i on, channels [channel, channel + n): all columns.
struct Rows {
  int64_t i, rows, channel;
  int n;
};

// The kernel of a step: how many rows of outputs it computes together, and what computes them.
struct Kernel {
  int64_t rows;
  void (*compute)(const Depthwise&, const Rows&);
};

Kernel three_by_three(const Step&, int n);
Kernel any_size(const Step&, int n);

}  // namespace quant2e
