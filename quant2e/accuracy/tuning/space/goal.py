"""Goal: how much of the float model's metric may be lost, in the direction in which the metric is better.

allowed = max_drop · |float|   (relative)      or      max_drop   (absolute)
met     = drop ≤ allowed,      drop = float − metric  (higher is better)  or  metric − float
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quant2e.errors import Quant2eError


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """``float_metric``: what the float model reaches; the other fields are arguments of `quant2e.tune`.

    Invariants: ``float_metric`` and ``max_drop`` are finite, ``max_drop`` is not negative.
    """

    float_metric: float
    max_drop: float
    relative: bool
    higher_is_better: bool

    def __post_init__(self) -> None:
        check_drop(self.max_drop)
        if self.relative and self.float_metric == 0.0:
            raise Quant2eError(
                "the float model's metric is 0, of which no part can be kept: pass relative=False, and max_drop= "
                "in units of the metric"
            )

    @property
    def allowed(self) -> float:
        """The largest drop that is accepted, in units of the metric."""
        return self.max_drop * abs(self.float_metric) if self.relative else self.max_drop

    @property
    def least(self) -> float:
        """The worst metric that is accepted."""
        return self.float_metric - self.allowed if self.higher_is_better else self.float_metric + self.allowed

    def drop(self, metric: float) -> float:
        """What is lost, in units of the metric; negative where it became better."""
        return self.float_metric - metric if self.higher_is_better else metric - self.float_metric

    def is_met(self, metric: float | None) -> bool:
        """Whether a metric keeps the goal; None and NaN, which nobody measured, do not."""
        if metric is None or math.isnan(metric):
            return False
        return metric >= self.least if self.higher_is_better else metric <= self.least

    def __str__(self) -> str:
        side = "at least" if self.higher_is_better else "at most"
        share = f"{self.max_drop:.3g} of it" if self.relative else f"{self.max_drop:.3g}"
        return f"{side} {self.least:.6g} (float {self.float_metric:.6g}, {share} may be lost)"


def check_drop(max_drop: Any) -> None:
    """Raise `Quant2eError` unless ``max_drop`` is a number that is not negative."""
    number = isinstance(max_drop, int | float) and not isinstance(max_drop, bool)
    if not number or not 0.0 <= max_drop < math.inf:
        raise Quant2eError(f"max_drop={max_drop!r}: a number, 0 or more: 0.01 allows one per cent of the float metric")
