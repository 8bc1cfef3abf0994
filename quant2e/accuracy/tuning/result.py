"""TuningResult: the best model that was found, whether it keeps the goal, and every trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from quant2e.accuracy.tuning.budgets import Budget
from quant2e.accuracy.tuning.space.goal import Goal
from quant2e.accuracy.tuning.space.trial import TuningTrial
from quant2e.page.render import ShownOnAPage
from quant2e.page.section import PageSection, ScatterChart
from quant2e.quantized_model import QuantizedModel
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data

INTERRUPTED = "interrupted"
"""`TuningResult.stopped` after Ctrl-C."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TuningResult(ShownOnAPage):
    """``model``: of the best trial, the cheapest that keeps the goal; where none does, the one with the best metric.

    ``met``: whether it keeps the goal; ``metric``, ``float_metric``: what the user's function returned for it and for
    the float model; ``left_float``: names of its ops that could be quantized and are not; ``choices``: by which
    alternative each of the others is quantized; ``trials``: all, in the order in which they began; ``best``: that of
    the model; ``goal``, ``budget``: what was asked; ``stopped``: why no further trial was made; ``notes``: what could
    not be done.
    """

    PAGE_TITLE: ClassVar[str] = "Tuning"

    model: QuantizedModel
    best: TuningTrial
    goal: Goal
    budget: Budget
    trials: tuple[TuningTrial, ...]
    choices: dict[str, str]
    strategy: str
    stopped: str
    notes: tuple[str, ...] = field(default=())

    @property
    def met(self) -> bool:
        """Whether the goal is kept, within the budget."""
        return self.best.met

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it; the model is the best until then."""
        return self.stopped == INTERRUPTED

    @property
    def metric(self) -> float:
        """The metric of the model."""
        assert self.best.metric is not None
        return self.best.metric

    @property
    def float_metric(self) -> float:
        """The metric of the float model."""
        return self.goal.float_metric

    @property
    def left_float(self) -> tuple[str, ...]:
        """Names of the ops that could be quantized and are not, in graph order."""
        return self.best.left_float

    @property
    def pareto(self) -> tuple[TuningTrial, ...]:
        """The trials that no other one beats in metric, size, share on int8 and latency at once; best metric first."""
        better = -1.0 if self.goal.higher_is_better else 1.0
        points = {
            trial: (better * trial.metric, trial.size_bytes, -trial.int8_share, trial.latency or 0.0)
            for trial in self.trials
            if trial.metric is not None and not trial.failed
        }
        kept = [trial for trial, point in points.items() if not any(_beats(p, point) for p in points.values())]
        unique = {points[trial]: trial for trial in reversed(kept)}
        return tuple(unique[point] for point in sorted(unique))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: everything but the model."""
        return {
            "met": self.met,
            "metric": plain_data(self.metric),
            "float_metric": plain_data(self.float_metric),
            "goal": plain_data(self.goal),
            "budget": plain_data(self.budget),
            "strategy": self.strategy,
            "stopped": self.stopped,
            "choices": dict(self.choices),
            "left_float": list(self.left_float),
            "best": self.best.as_dict(),
            "trials": [trial.as_dict() for trial in self.trials],
            "pareto": [trial.number for trial in self.pareto],
            "notes": list(self.notes),
        }

    def _head(self) -> list[str]:
        word = "met" if self.met else "not met"
        if not self.met and self.goal.is_met(self.metric):
            word = f"not met within the budget ({self.budget})"
        count = len(self.trials)
        best = self.best
        latency = "" if best.latency is None else f", {1e3 * best.latency:.3g} ms"
        left = f"{len(self.left_float)} op{'s' if len(self.left_float) != 1 else ''} left float"
        if self.left_float:
            more = f" and {len(self.left_float) - 6} more" if len(self.left_float) > 6 else ""
            left += f": {', '.join(self.left_float[:6])}{more}"
        return [
            f"TuningResult: the goal is {word}; metric {self.metric:.6g}, {self.goal}",
            f"{best.int8_share:.1%} of MACs on int8, {best.size_bytes:,} bytes{latency}; {left}",
            f"{count} trial{'s' if count != 1 else ''} by strategy '{self.strategy}', {self.stopped}",
            *(f"note: {note}" for note in self.notes),
        ]

    def __repr__(self) -> str:
        return "\n  ".join(self._head())

    def __str__(self) -> str:
        lines = [*self._head(), "", *text_table(self.trials, self.best)]
        if len(self.pareto) > 1:
            lines += ["", "not beaten by any other trial:", *text_table(self.pareto, self.best)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [cells(trial, self.best) for trial in self.trials]
        return html_table(HEADERS, rows, "\n".join(self._head()))

    def page_sections(self) -> tuple[PageSection, ...]:
        """The trials, as a table and against what they cost, with the Pareto front; `model.report` has a page, too."""
        done = [trial for trial in self.trials if trial.metric is not None and not trial.failed]
        costs = [("bytes of all tensors", [float(trial.size_bytes) for trial in done])]
        if all(trial.latency is not None for trial in done):
            costs.append(("latency, ms", [1e3 * (trial.latency or 0.0) for trial in done]))
        front = [done.index(trial) for trial in self.pareto]
        charts = tuple(
            ScatterChart(
                title="trials; joined: not beaten by any other",
                x=name,
                y="metric",
                points=tuple((cost, trial.metric or 0.0) for cost, trial in zip(values, done, strict=True)),
                labels=tuple(str(trial.number) for trial in done),
                front=tuple(sorted(front, key=values.__getitem__)),
            )
            for name, values in costs
            if done
        )
        section = PageSection(
            title="Tuning",
            lines=tuple(self._head()),
            headers=HEADERS,
            rows=tuple(cells(trial, self.best) for trial in self.trials),
            filters=("goal",),
            charts=charts,
            data=self.as_dict(),
        )
        return (section,)


_LATENCY = "latency, ms"
HEADERS = ("trial", "metric", "goal", "MACs on int8", "bytes", "bits a weight", "left float", _LATENCY, "seconds")


def cells(trial: TuningTrial, best: TuningTrial | None = None) -> tuple[str, ...]:
    """One row of a table of trials."""
    word = "met" if trial.met else "failed" if trial.failed else "over budget" if not trial.within_budget else "not met"
    return (
        f"{trial.number}{' *' if best is not None and trial.number == best.number else ''}",
        "–" if trial.metric is None else f"{trial.metric:.6g}",
        word,
        f"{trial.int8_share:.1%}",
        f"{trial.size_bytes:,}",
        f"{trial.bits_per_weight:.2f}",
        str(len(trial.left_float)),
        "" if trial.latency is None else f"{1e3 * trial.latency:.3g}",
        f"{trial.seconds:.1f}",
    )


def text_table(trials: Sequence[TuningTrial], best: TuningTrial | None = None) -> list[str]:
    """Trials as aligned lines, under headers; a star marks the best."""
    rows = [HEADERS, *(cells(trial, best) for trial in trials)]
    if all(trial.latency is None for trial in trials):
        rows = [row[: HEADERS.index(_LATENCY)] + row[HEADERS.index(_LATENCY) + 1 :] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether a point is at least as small in everything, and smaller in something."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
