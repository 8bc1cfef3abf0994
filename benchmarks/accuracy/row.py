"""Row: one model, quantized in one way by one library, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FLOAT, PLAIN, MENDED = "float", "quant2e", "quant2e, algorithms"
ALIKE = "quant2e, algorithms, as peers"
"""With the ranges of the peers' quantizer, for machines that multiply them exactly, and embedding tables in float."""
NNCF, TORCHAO, REDUCED = "NNCF", "torchao", "torchao, reduced range"
"""``REDUCED``: with 7 bits of activations, as torchao advises for machines without VNNI."""
METHODS = (FLOAT, PLAIN, MENDED, ALIKE, NNCF, TORCHAO, REDUCED)
"""In the order in which rows are measured and printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``scheme``: the target and the form of weights and activations; ``method``: one of `METHODS`.

    ``measures``: the numbers of the task, the metric first, larger is better. ``int8_share``: of the
    multiply-accumulates of a call with the example inputs, those whose two operands come from integers, counted in the
    Q/DQ graph in the same way for every library. ``sqnr_db``: at the output against float, on the calibration data's
    last batch, which is held out of nothing: a measure of noise, not of accuracy. ``seconds``: of CPU time from the
    float model to the Q/DQ graph, which other work on the machine hardly moves; None: not measured. ``samples``: how
    many the metric is a share of; 0: it is no share. ``notes``: the steps that were taken. ``failed``: why there are no
    numbers. ``instructions``: the instruction set of the machine, as `Machine.instructions` says it.
    """

    model: str
    scheme: str
    method: str
    measures: Mapping[str, float] = field(default_factory=dict)
    int8_share: float = 0.0
    sqnr_db: float | None = None
    seconds: float | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()
    failed: str = ""
    versions: str = ""
    instructions: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What is measured: rows of a later run with the same key take the place of earlier ones."""
        return self.model, self.scheme, self.method

    @property
    def metric(self) -> float:
        """The first of the measures; NaN where there are none."""
        return next(iter(self.measures.values()), math.nan)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        sqnr = "no error" if self.sqnr_db == math.inf else self.sqnr_db
        return {**asdict(self), "measures": dict(self.measures), "sqnr_db": sqnr}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of `plain`."""
        sqnr = math.inf if data["sqnr_db"] == "no error" else data["sqnr_db"]
        return cls(**{**data, "sqnr_db": sqnr, "notes": tuple(data["notes"])})
