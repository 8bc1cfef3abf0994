"""Verdict: what became of one float op: quantized by which rule, or float for which reason."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quant2e.report.float_ops import FloatOp

STATIC, DYNAMIC, WEIGHT_ONLY, FLOAT, FOLDED = "static", "dynamic", "weight-only", "float", "folded"
KINDS = (STATIC, DYNAMIC, WEIGHT_ONLY, FLOAT, FOLDED)
"""Verdicts. ``folded``: the op is gone, its effect is part of another one."""


_INTO = re.compile(r"into (\w+)(, .*)?")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One float op and what became of it (see `KINDS`). ``reason``: the rule that quantized it, or why it is float."""

    op: FloatOp
    kind: str
    reason: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"'{self.kind[:80]}' is no verdict: {', '.join(KINDS)}")

    @property
    def folded_into(self) -> str:
        """The name of the op that it is part of; empty when it is part of none."""
        into = _INTO.fullmatch(self.reason) if self.kind == FOLDED else None
        return into[1] if into else ""

    @property
    def quantized(self) -> bool:
        """Whether the op computes on quantized activations (static or dynamic) or a quantized weight."""
        return self.kind in (STATIC, DYNAMIC, WEIGHT_ONLY)
