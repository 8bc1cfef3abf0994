// Depthwise convolutions: each channel with a kernel of its own, up to 8 rows high.
//
// Four rows of the image are interleaved byte by byte, so that a lane holds one column of one channel's kernel, and one
// instruction adds four products for each of 16 channels. Rows that are interleaved serve several rows of outputs: the
// weights are there once for each of these, moved down. See README.md for a picture.

#include "depthwise.h"

namespace quant2e {

void depthwise(const Run& run, const Step& step) {
  const View x = run.view(step.x), y = run.part(step, step.y), z = run.part(step, step.z);
  const View added = run.part(step, step.other), &out = step.y >= 0 ? y : z;
  const Depthwise d{step, x, y, z, added, out, epilogue_of(run, step), run.constant<int8_t>(step.weight),
                    run.constant<int32_t>(step.init)};
  const bool three = step.inner > 0 && step.kernel_w == 3;
  const auto kernel_of = [&](int n) { return three ? three_by_three(step, n) : any_size(step, n); };
  const int64_t rows = kernel_of(kStrip).rows, strips = (x.c + kStrip - 1) / kStrip;
  const int64_t most = out.pixels() * x.c / kPartValues;
  in_parallel(run, (out.h + rows - 1) / rows * strips, 1, most, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = at / strips * rows, channel = at % strips * kStrip;
      const int n = (int)std::min<int64_t>(kStrip, x.c - channel);
      kernel_of(n).compute(d, {i, std::min(rows, out.h - i), channel, n});
    }
  });
}

}  // namespace quant2e
