"""The way in which a layer's products are summed without VNNI: the fastest that is proven exact for its weights.

``vpmaddubsw`` adds two u8 × s8 products into a *saturating* 16-bit lane (see `quant2e.cpu`). With activations in
0..high and the integer weights of an output channel, no lane overflows

    SEVEN     where four products stay within 16 bits:     high · (w₁ + w₂ + w₃ + w₄) <= 32767, and the smallest alike
    BOUNDED   where two products do:                       high · (w₁ + w₂) <= 32767
    SIGNED    for any activation and weights in -127..127:  |a - 128| · 127 · 2 <= 32512
    EXACT     always: bytes are widened to 16 bits, and ``vpmaddwd`` adds two products in 32

for the largest weights wᵢ of each channel, whichever of them meet in a lane. Instruction sets that are exact by
themselves read the same plans, and take no notice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowering.native.kernels.plan import Arithmetic
from lowering.native.units.values import Integers
from quant2e.cpu import LANE

_SUM = torch.iinfo(torch.int32)


def arithmetic_of(weight: Tensor, x: Integers) -> Arithmetic:
    """The way for a weight of int8, output channels first, and activations as ``x`` says that they are stored."""
    if _fit(weight, x.high, 4):
        return Arithmetic.SEVEN
    if _fit(weight, x.high, 2):
        return Arithmetic.BOUNDED
    return Arithmetic.SIGNED if int(weight.min()) > torch.iinfo(torch.int8).min else Arithmetic.EXACT


def _fit(weight: Tensor, high: int, count: int) -> bool:
    """Whether no ``count`` products of an output channel leave a 16-bit lane."""
    lowest, highest = (int(value) * high * count for value in torch.aminmax(weight))
    if lowest >= LANE.min and highest <= LANE.max:
        return True
    rows = weight.reshape(weight.shape[0], -1).to(torch.int32)
    most = min(count, rows.shape[1])
    largest = rows.topk(most).values.clamp(min=0).sum(1)
    smallest = rows.topk(most, largest=False).values.clamp(max=0).sum(1)
    return bool((largest * high <= LANE.max).all() and (smallest * high >= LANE.min).all())


def sums_fit(weight: Tensor, x: Integers) -> bool:
    """Whether every sum of products of ``weight``, int8 and output channels first, is an int32.

    Sums on the way to it may leave 32 bits: they come back, as integers do that wrap around.
    """
    farthest = max(x.high - x.zero, x.zero - x.low)
    lowest, highest = (int(value) for value in torch.aminmax(weight))
    if max(-lowest, highest) * farthest * (weight.numel() // weight.shape[0]) <= _SUM.max:
        return True
    total = weight.reshape(weight.shape[0], -1).to(torch.int32).abs().sum(1, dtype=torch.int64)
    return bool((total * farthest <= _SUM.max).all())
