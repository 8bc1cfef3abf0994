"""TensorRange: what calibration saw of one tensor, and the range that its integers stand for, for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

MOST_TENSORS = 12
"""Tensors that a report describes, those that lose most: with `BINS` a file grows by 5 KB at most."""

BINS = 32
"""Bins of the histogram of such a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """One quantized tensor with one scale.

    ``tensor``: the name of the node that gives it; ``reader``: of an op that reads it, where a model's input or a
    constant is observed. ``low``, ``high``: smallest and largest value that was seen; ``range_low``, ``range_high``:
    what the smallest and the largest of ``levels`` integers stand for. ``sqnr_db``: of rounding and clipping the values
    that were seen, in dB, from the counts of a finer histogram; inf without error. ``clipped``: share of them outside
    of the range. ``counts``: values in `BINS` bins of equal width from ``low`` to ``high``.
    """

    tensor: str
    reader: str
    low: float
    high: float
    range_low: float
    range_high: float
    levels: int
    sqnr_db: float
    clipped: float
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) > BINS or any(count < 0 for count in self.counts):
            raise ValueError(f"a histogram has up to {BINS} counts, none of which is negative")
        if not all(map(math.isfinite, (self.low, self.high, self.range_low, self.range_high))):
            raise ValueError("the bounds of a range are finite")

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return f"{self.tensor}, read by {self.reader}" if self.reader else self.tensor

    def __str__(self) -> str:
        seen = f"values {self.low:.4g} to {self.high:.4g}"
        clipped = f", {self.clipped:.2%} clipped" if self.clipped else ""
        spread = f"{self.levels} integers from {self.range_low:.4g} to {self.range_high:.4g}"
        return f"{self.name}: {self.sqnr_db:.1f} dB; {seen}, {spread}{clipped}"
