"""TuningTrial: one mix that was tried, and what came out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quant2e.accuracy.tuning.space.space import Mix
from quant2e.report.plain_data import plain_data


@dataclass(frozen=True, slots=True)
class TuningTrial:
    """One quantized model that was evaluated.

    ``number``: in the order in which trials began; ``metric``: what the user's function returned, None where it failed,
    and ``error`` says how; ``met``: the goal is kept, and so is the budget (``within_budget``). ``left_float``: ops
    that could be quantized and are not. ``int8_share``: of the multiply-accumulates; ``size_bytes``: of all tensors;
    ``bits_per_weight``: mean over the weights that could be quantized; ``latency``: seconds, where it was measured;
    ``work``: what strategies minimise (see `quant2e.accuracy.tuning.space.costs`); ``seconds``: how long it took.
    ``mix``: of which alternative each group is.
    """

    number: int
    mix: Mix
    metric: float | None
    met: bool
    within_budget: bool
    left_float: tuple[str, ...]
    int8_share: float
    size_bytes: int
    bits_per_weight: float
    work: float
    latency: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether there is no metric: the function raised, or returned what is none."""
        return self.metric is None or math.isnan(self.metric)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found: dict[str, Any] = plain_data(self)
        return found

    def __str__(self) -> str:
        metric = f"no metric ({self.error})" if self.metric is None else f"metric {self.metric:.6g}"
        latency = "" if self.latency is None else f", {1e3 * self.latency:.3g} ms"
        word = "met" if self.met else "not met"
        return (
            f"trial {self.number}: {metric}, {word}; {self.int8_share:.1%} of MACs on int8, {self.size_bytes:,} bytes"
            f"{latency}, {len(self.left_float)} ops left float"
        )
