"""AlgorithmStep: one algorithm that was asked for, and what became of it, for the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

KEPT, ROLLED_BACK, NO_EFFECT, NOT_TRIED = "kept", "rolled back", "no effect", "not tried"
OUTCOMES = (KEPT, ROLLED_BACK, NO_EFFECT, NOT_TRIED)
"""``rolled back``: its result is not in the model. ``no effect``: it found nothing to change."""


@dataclass(frozen=True, slots=True)
class AlgorithmStep:
    """One algorithm and its outcome, of `OUTCOMES`.

    ``changes``: what it changed, a line for each place. ``reason``: why it was not kept, or what else is to be known.
    ``before_db``, ``after_db``: SQNR of the output against float without and with it, in dB, on held-out data; None
    where it was not measured.
    """

    name: str
    outcome: str
    changes: tuple[str, ...] = ()
    reason: str = ""
    before_db: float | None = None
    after_db: float | None = None

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise ValueError(f"'{self.outcome[:80]}' is no outcome: {', '.join(OUTCOMES)}")

    def __str__(self) -> str:
        """The headline; ``changes`` are not in it, only their number."""
        parts = [f"{self.name}: {self.outcome}"]
        if self.before_db is not None and self.after_db is not None:
            parts.append(f"held-out SQNR {self.before_db:.1f} -> {self.after_db:.1f} dB")
        if self.changes:
            parts.append(f"{len(self.changes)} change{'s' if len(self.changes) > 1 else ''}")
        if self.reason:
            parts.append(self.reason)
        return ", ".join(parts)


def kept_algorithms(steps: Sequence[AlgorithmStep]) -> tuple[str, ...]:
    """The names of those that are in the result, in their order."""
    return tuple(step.name for step in steps if step.outcome == KEPT)


def lines_of_steps(steps: Sequence[AlgorithmStep]) -> list[str]:
    """A line for each step that was tried, in their order, then one for each reason for which others were not."""
    lines = [f"algorithm {step}" for step in steps if step.outcome != NOT_TRIED]
    left_out: dict[str, list[str]] = defaultdict(list)
    for step in steps:
        if step.outcome == NOT_TRIED:
            left_out[step.reason].append(step.name)
    return lines + [f"not tried: {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in left_out.items()]
