"""Early stopping of calibration: after so many seconds, or when no range moves any more. Both are opt-in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.calibration.statistics import measuring
from quant2e.errors import CalibrationError

LOOK_EVERY = 8
"""Batches between two looks at the ranges."""

CALM_LOOKS = 3
"""Looks in a row at which no range may have grown."""


@dataclass(slots=True)
class EarlyStopping:
    """Asked after every batch. ``seconds``: time budget. ``range_tolerance``: stop once no range has grown by more than
    this part of its extent over `LOOK_EVERY` times `CALM_LOOKS` batches.
    """

    seconds: float | None
    range_tolerance: float | None
    _start: float = field(default_factory=time.monotonic)
    _extents: Tensor | None = None
    _calm: int = 0

    def __post_init__(self) -> None:
        if self.seconds is not None and not (_is_number(self.seconds) and self.seconds > 0):
            raise CalibrationError(f"seconds={self.seconds!r}: a time budget is above 0; leave it out for all the data")
        if self.range_tolerance is not None and not (
            _is_number(self.range_tolerance) and 0 <= self.range_tolerance < 1
        ):
            raise CalibrationError(
                f"range_tolerance={self.range_tolerance!r}: the part by which ranges may still grow, such as 0.01"
            )

    def enough(self, prepared: GraphModule, done: int) -> bool:
        """Whether to stop after ``done`` batches."""
        if self.seconds is not None and time.monotonic() - self._start >= self.seconds:
            return True
        return (
            self.range_tolerance is not None
            and done % LOOK_EVERY == 0
            and self._is_calm(prepared, self.range_tolerance)
        )

    def _is_calm(self, prepared: GraphModule, tolerance: float) -> bool:
        extents = _extents(prepared)
        before, self._extents = self._extents, extents
        same = before is not None and before.shape == extents.shape
        grown = before is None or not same or bool((extents > before * (1 + tolerance)).any())
        # an observer without data yet is not calm: its range may still come
        self._calm = 0 if grown or bool((extents < 0).any()) else self._calm + 1
        return self._calm >= CALM_LOOKS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _extents(prepared: GraphModule) -> Tensor:
    """Width of every observed range, extended to zero; -1 for none."""
    widths = [
        torch.where(
            observer.max_val < observer.min_val,
            -1.0,
            observer.max_val.clamp(min=0) - observer.min_val.clamp(max=0),
        )
        for observer in measuring(prepared).values()
        if not observer.frozen
    ]
    return torch.cat([width.reshape(-1).cpu() for width in widths]) if widths else torch.zeros(0)
