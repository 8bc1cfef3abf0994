"""The estimators' arithmetic as tensor operations only: nothing is read back to the host.

For devices that run behind the host (a read would wait for them), for compiled graphs, and for many rows at once:
channels, groups. The numbers are those of `ranges` and `histogram`, bit for bit. ``rows`` is ``[R, N]`` everywhere,
statistics are ``[R]`` and ``[R, bins]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EXACT_BITS = 24
_SMALLEST_EXPONENT = -120
_TURNS = 4
"""Doublings of the width, from the first guess, after which every range fits: three, and one to spare."""


@dataclass(frozen=True)
class Seen:
    """``low``, ``high``: float32 ``[R]``, ``(inf, -inf)`` without a usable value; ``usable``: bool ``[R, N]``;
    ``counts``: int64 ``[4]``, see `ranges.TALLY`.
    """

    low: Tensor
    high: Tensor
    usable: Tensor
    counts: Tensor


def look(rows: Tensor, limit: float) -> Seen:
    """Range per row and counts of floating-point rows; values of magnitude ``limit`` and more are mask sentinels."""
    usable = rows.abs() < limit  # false for NaN
    low = torch.where(usable, rows, float("inf")).amin(1).to(torch.float32) + 0.0
    high = torch.where(usable, rows, float("-inf")).amax(1).to(torch.float32) + 0.0
    nan, posinf = torch.isnan(rows).sum(), torch.isposinf(rows).sum()
    masked = rows.numel() - usable.sum() - nan - posinf
    return Seen(low, high, usable, torch.stack([torch.full_like(nan, rows.numel()), nan, posinf, masked]))


def towards(average: Tensor, new: Tensor, constant: float) -> Tensor:
    """One step of a moving average; an infinity on either side stands for "no data there"."""
    moved = average + constant * (new - average)
    return torch.where(torch.isinf(average), new, torch.where(torch.isinf(new), average, moved))


def _power(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in float64, exactly, from its bits; int64 ``[R]`` within the normal exponents."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _number(x: Tensor, exponent: Tensor) -> Tensor:
    return torch.trunc(x * _power(-exponent)).to(torch.int64)


@dataclass(frozen=True)
class Windows:
    """`histogram.Window` of each row: ``exponent`` and ``first``, int64 ``[R]``."""

    exponent: Tensor
    first: Tensor


def windows(low: Tensor, high: Tensor, bins: int) -> Windows:
    """As `histogram.window`, row by row. Rows without values (``low > high``) get a window around zero."""
    none = low > high
    a = torch.where(none, 0.0, low).to(torch.float64)
    b = torch.where(none, 0.0, high).to(torch.float64)
    largest = torch.maximum(a.abs(), b.abs())
    exact = torch.frexp(largest).exponent.to(torch.int64) - _EXACT_BITS
    exponent = torch.where(largest > 0, exact, _SMALLEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)
    wide = torch.frexp((b - a) / (bins + 1)).exponent.to(torch.int64) - 2
    exponent = torch.where(b > a, torch.maximum(exponent, wide), exponent)
    for _ in range(_TURNS):
        exponent = exponent + (_number(b, exponent) - _number(a, exponent) >= bins)
    return Windows(exponent, _number(a, exponent))


def count(rows: Tensor, usable: Tensor, win: Windows, bins: int) -> Tensor:
    """Int64 ``[R, bins]``: how many usable values of each row fall into each of its bins."""
    inverse = _power(-win.exponent).to(torch.float32).unsqueeze(1)
    values = torch.where(usable, rows, 0.0).to(torch.float32)
    number = (values * inverse).to(torch.int32).to(torch.int64) - win.first.unsqueeze(1)
    histogram = torch.zeros(rows.shape[0], bins, dtype=torch.int64, device=rows.device)
    return histogram.scatter_add(1, number.clamp(0, bins - 1), usable.to(torch.int64))


def widen(histogram: Tensor, old: Windows, new: Windows) -> Tensor:
    """As `histogram.widen`, row by row."""
    bins = histogram.shape[1]
    factor = torch.ones_like(old.exponent) << (new.exponent - old.exponent).clamp(0, 62)
    number = torch.arange(bins, device=histogram.device) + old.first.unsqueeze(1)
    moved = torch.div(number, factor.unsqueeze(1), rounding_mode="trunc") - new.first.unsqueeze(1)
    # Bins outside the new window are empty, so it does not matter where they are added.
    return torch.zeros_like(histogram).scatter_add(1, moved.clamp(0, bins - 1), histogram)


@dataclass(frozen=True)
class Rows:
    """A histogram per row: ``low``, ``high`` float32 ``[R]``; ``histogram`` int64 ``[R, bins]``."""

    low: Tensor
    high: Tensor
    histogram: Tensor


def merge(a: Rows, b: Rows) -> Rows:
    """The histograms of what both saw; exact, associative and commutative."""
    bins = a.histogram.shape[1]
    low, high = torch.minimum(a.low, b.low), torch.maximum(a.high, b.high)
    total = windows(low, high, bins)
    parts = [widen(part.histogram, windows(part.low, part.high, bins), total) for part in (a, b)]
    return Rows(low, high, parts[0] + parts[1])


def update(state: Rows, rows: Tensor, seen: Seen) -> Rows:
    """``state`` with the usable values of ``rows``."""
    bins = state.histogram.shape[1]
    low, high = torch.minimum(state.low, seen.low), torch.maximum(state.high, seen.high)
    total = windows(low, high, bins)
    before = widen(state.histogram, windows(state.low, state.high, bins), total)
    return Rows(low, high, before + count(rows, seen.usable, total, bins))
