"""Report of an integer graph: which ops compute in integers, which stay in float, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.graph.control_flow import prefixed
from quant2e.integer.arithmetic.builder import Record
from quant2e.integer.arithmetic.requantization import Requantization
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.summary import summary

INTEGER = "quant2e_integer"
"""Key in ``gm.meta`` under which an integer graph keeps its `IntegerReport`."""


@dataclass(frozen=True, slots=True)
class IntegerVerdict:
    """One float op of the Q/DQ graph. ``integer``: it computes in integers; ``reason``: how, or why not.

    ``annotated``: the quantizer asked for it; an op that it left float has no integers to work on.
    """

    name: str
    op: str
    integer: bool
    reason: str
    annotated: bool

    @property
    def kind(self) -> str:
        """``integer``; ``LEFT`` for an op that the quantizer asked for and that computes in float; ``float``."""
        return "integer" if self.integer else "LEFT" if self.annotated else "float"


@dataclass(frozen=True, slots=True, repr=False)
class IntegerReport:
    """Verdicts in the order of the graph; ``notes``: accumulators that need 64 bits. ``records``: what was written."""

    requantization: Requantization
    verdicts: tuple[IntegerVerdict, ...]
    notes: tuple[str, ...] = ()
    records: tuple[Record, ...] = field(default=())

    @property
    def left(self) -> tuple[IntegerVerdict, ...]:
        """Annotated ops that stay between dequantize and quantize."""
        return tuple(v for v in self.verdicts if v.annotated and not v.integer)

    def of(self, name: str) -> IntegerVerdict:
        """The verdict of the op of that name. Raises KeyError when the graph had no such float op."""
        for verdict in self.verdicts:
            if verdict.name == name:
                return verdict
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; without ``records``, which hold tensors: `quant2e.dump_vectors` writes those."""
        return {name: plain_data(getattr(self, name)) for name in ("requantization", "verdicts", "notes")}

    def __repr__(self) -> str:
        return summary([f"IntegerReport: {self._headline}"], self.notes)

    def _repr_html_(self) -> str:
        rows = [(v.name, v.kind, v.reason) for v in self.verdicts]
        return html_table(("op", "verdict", "reason"), rows, repr(self))

    @property
    def _headline(self) -> str:
        integer = sum(v.integer for v in self.verdicts)
        return f"{integer} of {len(self.verdicts)} float ops compute in integers, requantization {self.requantization}"

    def __str__(self) -> str:
        lines = [self._headline]
        width = max((len(v.name) for v in self.verdicts), default=0)
        lines += [f"  {v.name:<{width}}  {v.kind:<7}  {v.reason}" for v in self.verdicts]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def with_integers_of(report: IntegerReport, path: str, body: IntegerReport) -> IntegerReport:
    """``report`` with the verdicts and notes of the body of control flow at ``path``.

    Without its records: a body may run many times, and test vectors are of one run.
    """
    verdicts = (replace(v, name=prefixed(path, v.name)) for v in body.verdicts)
    notes = [f"{path}: {note}" for note in body.notes]
    if body.records:
        notes.append(f"{path}: test vectors do not hold the ops of this body")
    return replace(report, verdicts=(*report.verdicts, *verdicts), notes=(*report.notes, *notes))


def integer_report(gm: GraphModule) -> IntegerReport:
    """The report of an integer graph. Raises `Quant2eError` when ``gm`` is none."""
    report = gm.meta.get(INTEGER)
    if not isinstance(report, IntegerReport):
        raise Quant2eError(
            "this graph has no integer report: make it with convert_pt2e(prepared, use_reference_representation=True) "
            "or to_integer(converted)"
        )
    return report
