"""What one model's run hands to the table, the JSON file and the exit code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.timing import Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A promise that the run checks: ``value`` is at least, or at most, ``limit``."""

    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the promise was kept; NaN keeps none."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        relation = "at least" if self.at_least else "at most"
        return f"{self.what} is {self.value:.4g}; it must be {relation} {self.limit:.4g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """An int8 model as one runtime sees it, next to the Q/DQ graph that it was lowered from.

    ``scheme``: static or dynamic, the one with the best of ``scores``. ``qdq`` and ``lowered``: measures by name, the
    same names as the float model's. ``max_steps``, ``sqnr_db``: largest difference between the two on held-out data, in
    ``step_rule``, and their signal to noise ratio. ``pt2_bytes``: the saved Q/DQ graph;
    ``program_bytes``: the file the runtime loads, None where it compiles in memory.
    """

    runtime: str
    scheme: str
    scores: Mapping[str, float]
    qdq: Mapping[str, float]
    lowered: Mapping[str, float]
    max_steps: float
    sqnr_db: float
    step_rule: str
    int8_mac_share: float
    pt2_bytes: int
    program_bytes: int | None
    float_program_bytes: int | None
    latencies: tuple[Latency, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that was measured for one model."""

    name: str
    title: str
    data: str
    measures: Mapping[str, float]
    float_bytes: int
    int8: tuple[Int8, ...]
    bounds: tuple[Bound, ...]

    @property
    def failures(self) -> tuple[Bound, ...]:
        """The bounds that do not hold."""
        return tuple(bound for bound in self.bounds if not bound.holds)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = asdict(self)
        plain["bounds"] = [asdict(bound) | {"holds": bound.holds} for bound in self.bounds]
        return plain
