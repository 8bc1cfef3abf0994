"""Sums of float32 numbers that are exact, so that they do not depend on the order: one integer per exponent.

A finite float32 is a 24-bit integer times a power of two. The integers of equal powers add up in an int64; slot
`COUNT`, which no finite number uses, counts the numbers. Two sums are added by adding their slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = 256
COUNT = SLOTS - 1
_LEAST = -149
"""Exponent of the smallest float32."""


def slots_of(x: Tensor, wanted: Tensor) -> Tensor:
    """Each number of float32 ``x`` as a sum of its own: int64 ``[*x.shape, 256]``; zeros where ``wanted`` is false."""
    bits = torch.where(wanted, x, 0.0).contiguous().view(torch.int32).to(torch.int64)
    exponent = (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) + ((exponent > 0).to(torch.int64) << 23)
    signed = torch.where(bits < 0, -mantissa, mantissa)
    slots = torch.zeros(*x.shape, SLOTS, dtype=torch.int64, device=x.device)
    slots = slots.scatter(-1, exponent.unsqueeze(-1), signed.unsqueeze(-1))
    number = torch.arange(SLOTS, device=x.device) == COUNT
    return slots + (number & wanted.unsqueeze(-1)).to(torch.int64)


def mean(slots: Tensor) -> float:
    """Mean of the numbers in one sum, int64 ``[256]``, rounded once; 0.0 of none."""
    count = int(slots[COUNT])
    total = sum(int(slots[e]) << (max(e, 1) - 1) for e in torch.nonzero(slots[:COUNT]).flatten().tolist())
    return total / (count << -_LEAST) if count else 0.0
