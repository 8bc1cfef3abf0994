"""What a comparison of two models tells: the error that each op makes, the one it inherits, those of the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from quant2e.page.render import ShownOnAPage
from quant2e.page.section import DotChart, PageSection
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.summary import summary

INPUT = "input"
"""The target of a row that is an input of the model."""

_NOTICEABLE = 0.01
"""Noise, of a signal of power 1, that must appear at an op to be a place to look at."""

_SHOWN = 10
"""Ops that a summary shows."""

_DRAWN = 40
"""Ops that a chart shows; the table beside it has all."""

_MEASURES = ("by itself", "weights", "activations", "in the model")
_HEADERS = ("op", "module", "source", *(f"{measure}, dB" for measure in _MEASURES), "cosine")


@dataclass(frozen=True, slots=True)
class OpError:
    """One op, or one input of the model: how far its result is from float, over all data.

    ``op``: the name of its node; ``module``, ``source``: path of its module and the user's line, where they are known.
    ``local_sqnr_db``: SQNR in dB with exact operands, so the error that the op makes itself; of it, ``weight_sqnr_db``
    with nothing but its weights quantized, ``activation_sqnr_db`` with nothing but activations. ``sqnr_db`` and
    ``cosine``: of what it gives in the quantized model, inherited errors included. An SQNR is inf without error.
    ``operands_sqnr_db``: the lowest SQNR among what it reads there. ``advice``: what to do about the error.
    """

    op: str
    target: str
    module: str
    source: str
    local_sqnr_db: float
    weight_sqnr_db: float
    activation_sqnr_db: float
    sqnr_db: float
    cosine: float
    operands_sqnr_db: float
    advice: str

    @property
    def measures(self) -> tuple[float, float, float, float]:
        """The four SQNRs: by itself, of weights, of activations, in the model."""
        return self.local_sqnr_db, self.weight_sqnr_db, self.activation_sqnr_db, self.sqnr_db

    @property
    def added_noise(self) -> float:
        """Power of the error that appears at this op in the model, of a signal of power 1: at most all of the signal.

        More than it makes itself where it reads just those values that were rounded too coarsely before.
        """
        return min(_noise(self.sqnr_db), 1.0) - min(_noise(self.operands_sqnr_db), 1.0)

    @property
    def local_noise(self) -> float:
        """Power of the error that it makes itself, of a signal of power 1."""
        return _noise(self.local_sqnr_db)

    def __str__(self) -> str:
        place = "".join(
            (f" in module '{self.module}'" if self.module else "", f" at {self.source}" * bool(self.source))
        )
        parts = f"weights {self.weight_sqnr_db:.1f}, activations {self.activation_sqnr_db:.1f}"
        own = f"{self.local_sqnr_db:.1f} dB by itself" + (f" ({parts})" if self.local_sqnr_db < math.inf else "")
        before = "" if self.operands_sqnr_db == math.inf else f", what it reads has {self.operands_sqnr_db:.1f} dB"
        return f"'{self.op}' ({self.target}){place}: {own}, {self.sqnr_db:.1f} dB in the model{before}"


@dataclass(frozen=True, slots=True)
class OutputError:
    """One float output of the model, by its place among the leaves: SQNR in dB and cosine against float."""

    output: int
    sqnr_db: float
    cosine: float

    def __str__(self) -> str:
        return f"output {self.output}: {self.sqnr_db:.1f} dB, cosine {self.cosine:.4f}"


@dataclass(frozen=True, slots=True)
class GroupError:
    """Ops of one module or source line: how many they are, and the SQNR in dB with the noise of all of them added."""

    name: str
    ops: int
    local_sqnr_db: float
    worst: str

    def __str__(self) -> str:
        return f"{self.name or '(no name)'}: {self.local_sqnr_db:.1f} dB, {self.ops} ops, the worst is '{self.worst}'"


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(ShownOnAPage):
    """``rows``: ops and inputs, those that make most error themselves first. ``outputs``: the outputs of the model.

    ``batches``: items of data that were looked at. ``notes``: what was not compared, and why. ``str(comparison)`` is
    all of it, ``repr(comparison)`` a summary.
    """

    PAGE_TITLE: ClassVar[str] = "Comparison"

    rows: tuple[OpError, ...]
    outputs: tuple[OutputError, ...]
    batches: int
    notes: tuple[str, ...] = ()

    def of(self, op: str) -> OpError:
        """The row of the op of that node name. Raises KeyError when there is none."""
        for row in self.rows:
            if row.op == op:
                return row
        raise KeyError(op)

    def worst_places(self, count: int = 3) -> tuple[OpError, ...]:
        """The ``count`` ops at which most error appears in the model, the worst first; one at least."""
        found = sorted(self.rows, key=lambda row: -row.added_noise)[:count]
        return tuple(row for row in found if row is found[0] or row.added_noise >= _NOTICEABLE)

    def by_module(self) -> tuple[GroupError, ...]:
        """Rows gathered by the path of their module, the worst first."""
        return _grouped(self.rows, lambda row: row.module)

    def by_source(self) -> tuple[GroupError, ...]:
        """Rows gathered by the user's source line, the worst first."""
        return _grouped(self.rows, lambda row: row.source)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found: dict[str, Any] = plain_data(self)
        return found

    def summary(self) -> str:
        """Outputs and the worst ops, a line each."""
        head = f"Comparison: {len(self.rows)} ops on {self.batches} batch{'es' if self.batches != 1 else ''}"
        lines = [head, *map(str, self.outputs), *map(str, self.rows[:_SHOWN])]
        if (left := len(self.rows) - _SHOWN) > 0:
            lines.append(f"… {left} more ops")
        return summary(lines, self.notes)

    def __repr__(self) -> str:
        return self.summary()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.outputs), *map(str, self.rows), *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        cells = [(r.op, r.module, r.source, *map(_rounded, r.measures), round(r.cosine, 4)) for r in self.rows]
        return html_table(_HEADERS, cells, "\n".join(map(str, self.outputs)))

    def page_sections(self) -> tuple[PageSection, ...]:
        """SQNR by layer: a chart of the ops that make most error, and a table of all, with advice."""
        worst = self.rows[:_DRAWN]
        chart = DotChart(
            title="error of each op, most first",
            unit="SQNR, dB",
            names=tuple(row.op for row in worst),
            series={
                "made by itself": tuple(row.local_sqnr_db for row in worst),
                "in the model": tuple(row.sqnr_db for row in worst),
            },
        )
        section = PageSection(
            title="SQNR by layer",
            lines=(*map(str, self.outputs), *(f"note: {note}" for note in self.notes)),
            headers=(*_HEADERS, "advice"),
            rows=tuple((r.op, r.module, r.source, *r.measures, r.cosine, r.advice) for r in self.rows),
            charts=(chart,) if worst else (),
            data=self.as_dict(),
        )
        return (section,)


def _grouped(rows: Iterable[OpError], key: Callable[[OpError], str]) -> tuple[GroupError, ...]:
    groups: dict[str, list[OpError]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    made = [
        GroupError(name, len(inside), sqnr_db(1.0, math.fsum(row.local_noise for row in inside)), inside[0].op)
        for name, inside in groups.items()
    ]
    return tuple(sorted(made, key=lambda group: group.local_sqnr_db))


def _noise(sqnr: float) -> float:
    return math.inf if sqnr == -math.inf else float(10.0 ** (-sqnr / 10.0))


def _rounded(sqnr: float) -> float | str:
    return round(sqnr, 1) if math.isfinite(sqnr) else str(sqnr)
