"""Requantization constants: from the scale of an accumulator to the scale of a tensor, as plain numbers.

Formulas: `docs/integer_semantics.md`. ``float32`` follows XNNPACK (``src/operators/convolution-nhwc.c``,
``src/microparams-init.c``), ``fixed_point`` gemmlowp (``fixedpoint.h``) and TFLite (``quantization_util.cc``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Requantization = Literal["float32", "fixed_point", "fixed_point_single_rounding", "power_of_two"]
"""The arithmetic that takes an accumulator to the scale of its output."""

REQUANTIZATIONS: tuple[Requantization, ...] = ("float32", "fixed_point", "fixed_point_single_rounding", "power_of_two")


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many steps of the output one unit of an accumulator is.

    ``exact``: float64, as TFLite computes it; ``single``: float32 by XNNPACK's order of operations. Both 0-D, or 1-D
    with one entry for each channel.
    """

    exact: Tensor
    single: Tensor

    @staticmethod
    def of(numerators: tuple[float | Tensor, ...], denominator: float, count: float | Tensor = 1) -> Ratio:
        """``numerators[0] * numerators[1] / denominator / count``, each in its precision;
        ``count`` may vary by place.
        """
        exact = torch.ones((), dtype=torch.float64)
        single = torch.ones((), dtype=torch.float32)
        for factor in numerators:
            exact = exact * torch.as_tensor(factor).to(torch.float64)
            single = single * torch.as_tensor(factor).to(torch.float32)
        exact = exact / denominator / count
        single = single / torch.tensor(denominator, dtype=torch.float32)
        if isinstance(count, Tensor) or count != 1:
            single = single * (1.0 / torch.as_tensor(count).to(torch.float32))
        return Ratio(exact, single)


def fixed_point(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """``ratio ≈ multiplier * 2 ** (exponent - 31)``: int64 tensors, multiplier in ``2**30 .. 2**31 - 1``.

    TFLite's ``QuantizeMultiplier``: frexp, round half away from zero, carry. Ratios below ``2**-31`` give 0.
    """
    mantissa, exponent = torch.frexp(ratio.to(torch.float64))
    scaled = mantissa * 2.0**31
    multiplier = torch.floor(scaled + 0.5).to(torch.int64)
    carry = multiplier == 2**31
    multiplier = torch.where(carry, multiplier // 2, multiplier)
    exponent = exponent.to(torch.int64) + carry
    tiny = exponent < -31
    return torch.where(tiny, 0, multiplier), torch.where(tiny, 0, exponent)


def power_of_two(ratio: Tensor) -> Tensor | None:
    """The exponent ``n`` of ``ratio == 2 ** n``, int64; None when one entry is not a power of two.

    Scales are rounded to float32 somewhere on their way here, so a relative difference of ``2**-20`` counts as none.
    """
    exponent = torch.round(torch.log2(ratio.to(torch.float64)))
    fits = ((ratio / torch.exp2(exponent)) - 1).abs() < 2.0**-20
    return exponent.to(torch.int64) if bool(fits.all()) else None


@dataclass(frozen=True, slots=True)
class SumConstants:
    """``out = (Σ multipliers[i] * v[i] + 2 ** (shift - 1)) >> shift``;
    a multiplier is 0-D or has one entry per channel.
    """

    multipliers: tuple[Tensor, ...]
    shift: int


def xnnpack_sum(ratios: tuple[float, float], signs: tuple[int, int]) -> SumConstants | None:
    """Constants of XNNPACK's 8-bit addition; None where its range ends (a ratio outside ``2**-10 .. 2**8``)."""
    if not all(2.0**-10 <= r < 2.0**8 for r in ratios):
        return None
    shift = 20 - (math.frexp(max(ratios))[1] - 1)
    multipliers = tuple(torch.tensor(s * round(r * 2.0**shift)) for r, s in zip(ratios, signs, strict=True))
    return SumConstants(multipliers, shift)


def general_sum(ratios: tuple[Tensor, ...], spans: tuple[int, ...]) -> SumConstants | None:
    """Constants of a sum of any terms in 64 bits: up to 31 bits for each multiplier.

    ``spans``: the largest magnitude of each term. None when no shift keeps the sum within 63 bits.
    """
    largest = max(float(r.abs().max()) for r in ratios)
    reach = sum(float(r.abs().max()) * span for r, span in zip(ratios, spans, strict=True))
    shift = min(31 - math.frexp(largest)[1], 61 - math.frexp(reach)[1], 61)
    if shift < 1:
        return None
    multipliers = tuple(torch.round(r.to(torch.float64) * 2.0**shift).to(torch.int64) for r in ratios)
    return SumConstants(multipliers, shift)
