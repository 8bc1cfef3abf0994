"""The hardware, slowly: one number at a time, in Python integers and numpy scalars. Written from the documents, not
from the code: gemmlowp's fixedpoint.h, TFLite's quantization_util.cc and reference/integer_ops/add.h, XNNPACK's
microparams-init.c and qs8-vadd/scalar.c.in."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

F = np.float32


class Grid:
    def __init__(self, scale, zero_point, low, high):
        self.scale, self.zero_point, self.low, self.high = scale, zero_point, low, high

    def saturate(self, steps):
        return max(self.low, min(self.high, int(steps) + self.zero_point))

    def quantize(self, x):
        return self.saturate(np.clip(np.rint(F(x) * F(1.0 / self.scale)), -1e9, 1e9))


def c_divide(a, b):
    """Integer division as in C: towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def quantize_multiplier(ratio):
    """TFLite's QuantizeMultiplier: (multiplier, shift)."""
    mantissa, shift = math.frexp(ratio)
    multiplier = math.floor(mantissa * 2**31 + 0.5)  # std::round on a positive number
    if multiplier == 2**31:
        multiplier, shift = multiplier // 2, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def saturating_rounding_doubling_high_mul(a, b):
    ab = a * b
    nudge = 2**30 if ab >= 0 else 1 - 2**30
    return c_divide(ab + nudge, 2**31)


def rounding_divide_by_pot(x, exponent):
    mask = 2**exponent - 1
    remainder = x & mask
    threshold = (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def multiply_by_quantized_multiplier(x, ratio):
    multiplier, shift = quantize_multiplier(ratio)
    x = max(-(2**31), min(2**31 - 1, x * 2 ** max(shift, 0)))
    return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(x, multiplier), max(-shift, 0))


def single_rounding(x, ratio):
    multiplier, shift = quantize_multiplier(ratio)
    total = 31 - shift
    return (x * multiplier + 2 ** (total - 1)) >> total


def power_of_two(x, ratio):
    exact = Fraction(x) * Fraction(2) ** round(math.log2(ratio))
    return round(exact)  # Python rounds half to even


def requantize(acc, scales, grid, mode, count=1):
    """One accumulator of scale Π scales / count on a grid."""
    acc = int(acc)
    if mode == "float32":
        ratio = F(1)
        for scale in scales:
            ratio = F(ratio * F(scale))
        ratio = F(ratio / F(grid.scale))
        if count != 1:
            ratio = F(ratio * F(F(1) / F(count)))
        return grid.saturate(np.clip(np.rint(F(F(acc) * ratio)), -1e9, 1e9))
    ratio = math.prod(float(s) for s in scales) / grid.scale / count
    step = {
        "fixed_point": multiply_by_quantized_multiplier,
        "fixed_point_single_rounding": single_rounding,
        "power_of_two": power_of_two,
    }[mode]
    return grid.saturate(step(acc, ratio))


def xnnpack_add(steps, ratios, signs, grid):
    largest = max(ratios)
    shift = 20 - (math.frexp(float(largest))[1] - 1)
    total = 2 ** (shift - 1)
    for v, r, sign in zip(steps, ratios, signs, strict=True):
        total += v * sign * int(np.rint(F(r) * F(2.0**shift)))
    return grid.saturate(total >> shift)


def tflite_add(steps, scales, signs, grid):
    twice = 2 * max(scales)
    total = 0
    for v, s, sign in zip(steps, scales, signs, strict=True):
        total += sign * multiply_by_quantized_multiplier(v << 20, s / twice)
    return grid.saturate(multiply_by_quantized_multiplier(total, twice / (2**20 * grid.scale)))


def general_shift(ratios, spans):
    """The largest multiplier below 2**31, the sum below 2**61."""
    reach = sum(r * n for r, n in zip(ratios, spans, strict=True))
    return min(31 - math.frexp(max(ratios))[1], 61 - math.frexp(reach)[1], 61)


def general_add(steps, ratios, signs, spans, grid):
    """64-bit sum: up to 31 bits for each multiplier, half up."""
    shift = general_shift(ratios, spans)
    total = 2 ** (shift - 1)
    for v, r, sign in zip(steps, ratios, signs, strict=True):
        total += v * round(sign * r * 2.0**shift)
    return grid.saturate(total >> shift)


def exact_add(steps, ratios, signs, grid):
    total = sum(
        Fraction(v) * sign * Fraction(2) ** round(math.log2(r)) for v, r, sign in zip(steps, ratios, signs, strict=True)
    )
    return grid.saturate(round(total))


def add(steps, scales, signs, spans, grid, mode, *, narrow):
    ratios = [s / grid.scale for s in scales]
    if mode == "power_of_two":
        return exact_add(steps, ratios, signs, grid)
    if mode == "fixed_point" and narrow:
        return tflite_add(steps, scales, signs, grid)
    if mode == "float32" and narrow:
        single = [F(F(s) / F(grid.scale)) for s in scales]
        if all(2.0**-10 <= r < 2.0**8 for r in single):
            return xnnpack_add(steps, single, signs, grid)
    return general_add(steps, ratios, signs, spans, grid)


def divided(acc, scale, count, grid):
    """An integer division by the count, half up, with a ratio of 22 bits."""
    shift = min(22 - math.frexp(scale / grid.scale)[1], 33)
    ratio = Fraction(round(scale / grid.scale * 2.0**shift)) / 2**shift
    return grid.saturate(math.floor(Fraction(int(acc)) * ratio / count + Fraction(1, 2)))


def convolution(x, w, stride, padding, dilation, groups):
    """x: [N, C, *size], w: [O, C / groups, *kernel], int64; one output at a time."""
    size, kernel = x.shape[2:], w.shape[2:]
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    out = np.zeros([x.shape[0], w.shape[0], *out_size], dtype=np.int64)
    per_group = w.shape[0] // groups
    for place in itertools.product(*map(range, out_size)):
        window = tuple(
            slice(i * s, i * s + d * (k - 1) + 1, d) for i, s, d, k in zip(place, stride, dilation, kernel, strict=True)
        )
        for o in range(w.shape[0]):
            g = o // per_group
            channels = slice(g * w.shape[1], (g + 1) * w.shape[1])
            taken = padded[(slice(None), channels, *window)]
            out[(slice(None), o, *place)] = (taken * w[o]).reshape(x.shape[0], -1).sum(1)
    return out


def transposed_convolution(x, w, stride, padding, output_padding, dilation, groups):
    """x: [N, C, *size], w: [C, O / groups, *kernel]; each input is spread over the outputs it reaches."""
    size, kernel = x.shape[2:], w.shape[2:]
    full = [
        (n - 1) * s + d * (k - 1) + 1 + op
        for n, s, d, k, op in zip(size, stride, dilation, kernel, output_padding, strict=True)
    ]
    out = np.zeros([x.shape[0], w.shape[1] * groups, *full], dtype=np.int64)
    per_group = x.shape[1] // groups
    for c in range(x.shape[1]):
        g = c // per_group
        for place in itertools.product(*map(range, size)):
            for tap in itertools.product(*map(range, kernel)):
                at = tuple(i * s + t * d for i, s, t, d in zip(place, stride, tap, dilation, strict=True))
                for o in range(w.shape[1]):
                    out[(slice(None), g * w.shape[1] + o, *at)] += x[(slice(None), c, *place)] * w[(c, o, *tap)]
    crop = tuple(slice(p, n - p) for p, n in zip(padding, full, strict=True))
    return out[(slice(None), slice(None), *crop)]


def each(values, function):
    """The function of each integer, same shape."""
    values = np.asarray(values)
    out = np.array([function(int(v)) for v in values.flatten()], dtype=np.int64)
    return out.reshape(values.shape)
