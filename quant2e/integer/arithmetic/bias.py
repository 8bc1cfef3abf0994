"""Bias quantization: a bias in units of its accumulator, and what is left of it between two units.

    bias = round(b / (scale_x * scale_w)),   int32        fraction = round((b / (scale_x * scale_w) - bias) * 2 ** bits)

The fraction is requantized with the sum, ``acc * 2 ** bits + fraction``: a rounded bias alone would move up to one
output in some thousands to the next integer. A bias on the accumulator's grid, as XNNPACK wants it, has no fraction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.integer.arithmetic.builder import Builder
from quant2e.integer.arithmetic.values import Part

aten = torch.ops.aten

MOST_BITS = 16
"""Fraction bits at the most; fewer where the sum would leave its dtype."""


def bias_integers(bias: Tensor, x_scale: float, w_scale: float | Tensor) -> Tensor:
    """``round(bias * (1 / (scale_w * scale_x)))`` in float32, ties to even, as int64:
    what ExecuTorch hands to XNNPACK.
    """
    scale = w_scale * x_scale
    inverse = 1.0 / scale
    return torch.round(bias.to(torch.float32) * inverse).to(torch.float64).to(torch.int64)


@dataclass(frozen=True, slots=True)
class Fraction:
    """``integers``: int64, one per output channel, each in units of ``2 ** -bits`` of the accumulator."""

    integers: Tensor
    bits: int

    def added(self, b: Builder, part: Part, axis: int, dims: int, name: str) -> Part:
        """``part`` with the fraction: ``node * 2 ** bits + fraction``, in the dtype that its new span needs."""
        span = (part.span << self.bits) + (1 << self.bits)
        dtype = torch.int32 if span < 2**31 else torch.int64
        along = [-1 if i == axis else 1 for i in range(dims)]
        shifted = b.call(aten.mul.Tensor, b.cast(part.node, dtype), 2**self.bits)
        node: Node = b.call(aten.add.Tensor, shifted, b.constant(self.integers.to(dtype).reshape(along), name))
        return replace(
            part, node=node, scales=(*part.scales, 2.0**-self.bits), span=span, accumulator=part.node, narrow=False
        )


def bias_fraction(
    bias: Tensor, integers: Tensor, x_scale: float, w_scale: float | Tensor, span: int
) -> Fraction | None:
    """What ``integers`` leave of ``bias``; None when that is no more than float32 rounded off.

    ``span``: the largest sum, which with the fraction bits still fits 32 bits (or 62, where it needs 64 anyway).
    """
    scale = torch.as_tensor(w_scale).to(torch.float64) * float(torch.tensor(x_scale, dtype=torch.float32))
    left = bias.to(torch.float64) / scale - integers.to(torch.float64)
    noise = (integers.abs().to(torch.float64) * 2.0**-21).clamp(min=2.0**-10)
    if bool((left.abs() <= noise).all()):
        return None
    room = (31 if span < 2**31 else 62) - (span + 1).bit_length()
    bits = min(MOST_BITS, room)
    if bits < 1:
        return None
    return Fraction(torch.round(left * 2.0**bits).to(torch.int64), bits)
