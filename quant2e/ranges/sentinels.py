"""Sentinels: finite values that stand for "never" (-1e9, -1e4), told from data by the empty space around them.

Values without bound (-inf, ``finfo.min``) are counted apart by every estimator (`minmax.SENTINEL`). A mask of -1e4 is
too small for that and would own the range: here it is found by the batch, as values of one sign within a factor of
`TOGETHER` of the largest, with nothing between them and all other values over a factor of `APART`. An outlier that is
60 times larger than the rest is data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant2e.ranges.minmax import on_host, sentinel_of

APART = 64.0
"""Ratio of the smallest sentinel to the largest other value: with 8 bits, the others would keep two of 256 steps."""

TOGETHER = 4.0
"""Ratio within which sentinels lie: scores have been added to them, or two masks to each other."""

Never = tuple[float, float]
"""Smallest magnitudes of a negative and of a positive sentinel; inf where that sign stands for nothing."""


def hide_sentinels(x: Tensor, never: Never) -> Tensor:
    """``x``, with -inf in place of its sentinels, which estimators count as masked. Any shape, floating point."""
    if x.numel() == 0 or (on_host(x) and not _may_hold(x, never)):
        return x
    size = x.detach().abs()
    data = size < sentinel_of(x.dtype)  # false for NaN
    largest = torch.where(data, size, 0.0).amax()
    far = data & (size >= largest / TOGETHER)
    near = data & ~far
    least = torch.where(far, size, math.inf).amin()
    others = torch.where(near, size, 0.0).amax()
    down, up = (far & (x < 0)).any(), (far & (x > 0)).any()
    smallest = torch.where(down & ~up, never[0], torch.where(up & ~down, never[1], math.inf))
    found = near.any() & (least >= smallest) & (least / APART >= others)
    return torch.where(far & found, -math.inf, x)


def _may_hold(x: Tensor, never: Never) -> bool:
    """Whether some value is as large as a sentinel: one pass, which most batches end with."""
    low, high = (float(extreme) for extreme in torch.aminmax(x.detach()))
    return not (-low < never[0] and high < never[1])


def owned_by_sentinels(low: float, high: float, never: Never) -> bool:
    """Whether a range alone shows that sentinels own it; for observers that do not tell values apart.

    Weaker evidence than `hide_sentinels` has, so it asks for more: one bound `APART` times as far as the other, and at
    `UNMISTAKABLE` or beyond.
    """
    below = -low >= max(APART * max(high, 0.0), never[0], UNMISTAKABLE)
    above = high >= max(APART * max(-low, 0.0), never[1], UNMISTAKABLE)
    return below or above


UNMISTAKABLE = 1e3
"""Magnitude below which the bounds of a range say nothing about sentinels."""
