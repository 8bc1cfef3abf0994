"""Plots: charts drawn by matplotlib as SVG that stands inside a page: text stays text, ids and bytes are fixed."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quant2e.errors import Quant2eError
from quant2e.page.section import DotChart, RangeChart, ScatterChart

_WIDTH = 4.3
"""Inches: about as wide as a phone, so that text keeps its size there."""

_COLOURS = ("#0b6e99", "#c2571a", "#5b5b5b", "#7a3e9d")
_MARKS = ("o", "s", "^", "D")
_LABEL = 34
"""Characters of a name beside a chart; the table has all of it."""


def svg_of(chart: DotChart | RangeChart | ScatterChart) -> str:
    """The chart as an ``<svg>`` element. Raises `Quant2eError` where matplotlib is not installed."""
    height = _height(chart)
    with _figure(height) as (figure, written):
        axes = figure.subplots()
        longest = 0
        if isinstance(chart, DotChart):
            _dots(axes, chart)
            longest = max((len(_short(name)) for name in chart.names), default=0)
        elif isinstance(chart, RangeChart):
            _range(axes, chart)
        else:
            _scatter(axes, chart)
        # Margins in inches: finding them out takes longer than all of the drawing.
        left, below = 0.62 + 0.055 * max(longest - 6, 0), 0.25 if isinstance(chart, RangeChart) else 0.45
        figure.subplots_adjust(left / _WIDTH, below / height, 1 - 0.12 / _WIDTH, 1 - 0.28 / height)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        text = written.getvalue().decode("utf-8")
    found = re.search(r"<svg.*</svg>", text, re.DOTALL)
    assert found is not None, "matplotlib writes one svg element"
    return re.sub(r"<metadata>.*?</metadata>", "", found[0], flags=re.DOTALL)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure that belongs to no window, under settings of its own."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Quant2eError(
            "charts of a page are drawn by matplotlib, which is not installed: pip install 'quant2e[html]'"
        ) from error
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "quant2e",
        "font.family": "sans-serif",
        "font.size": 9.0,
        "text.parse_math": False,  # a name may hold dollars
        "axes.titlesize": 10.0,
    }
    with mpl.rc_context(settings):
        yield Figure(figsize=(_WIDTH, height)), io.BytesIO()


def _height(chart: DotChart | RangeChart | ScatterChart) -> float:
    if isinstance(chart, DotChart):
        return 0.8 + 0.2 * max(len(chart.names), 2)
    return 1.6 if isinstance(chart, RangeChart) else 3.0


def _dots(axes: Any, chart: DotChart) -> None:
    finite = [value for values in chart.series.values() for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    room = max(high - low, 1.0) * 0.12
    rows = range(len(chart.names))
    for (label, values), colour, mark in zip(chart.series.items(), _COLOURS, _MARKS, strict=False):
        placed = [min(max(value, low - room), high + room) for value in values]
        axes.plot(placed, rows, mark, color=colour, markersize=4.5, label=label)
        for row, value in enumerate(values):
            if not math.isfinite(value):
                axes.annotate(
                    str(value), (placed[row], row), (0, 4), textcoords="offset points", fontsize=7, ha="center"
                )
    axes.set_yticks(rows, [_short(name) for name in chart.names], fontsize=8)
    axes.set_ylim(len(chart.names) - 0.5, -0.7)
    axes.set_xlim(low - 2 * room, high + 2 * room)
    axes.set_xlabel(chart.unit)
    axes.set_title(chart.title)
    axes.grid(axis="both", color="#e2e2e2", linewidth=0.7)
    axes.set_axisbelow(True)
    if len(chart.series) > 1:
        axes.legend(fontsize=8, framealpha=0.8)


def _range(axes: Any, chart: RangeChart) -> None:
    width = (chart.high - chart.low) or max(abs(chart.low), 1.0) * 0.02
    begin = chart.low if chart.high > chart.low else chart.low - width / 2
    edges = [begin + width * i / len(chart.counts) for i in range(len(chart.counts) + 1)]
    axes.stairs(chart.counts, edges, fill=True, color=_COLOURS[0])
    low, high = chart.chosen
    axes.axvspan(low, high, facecolor=_COLOURS[1], alpha=0.13)
    for bound in (low, high):
        axes.axvline(bound, color=_COLOURS[1], linewidth=1.3)
    axes.set_yscale("symlog", linthresh=1)
    most = max(len(str(max(chart.counts))) - 1, 0)
    marks = sorted({0, 10 ** (most // 2), 10**most})
    axes.set_yticks(marks, [f"{mark:,}" if mark < 10_000 else f"1e{len(str(mark)) - 1}" for mark in marks])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.set_title(_short(chart.title, 52))


def _scatter(axes: Any, chart: ScatterChart) -> None:
    best = [chart.points[index] for index in chart.front]
    others = [point for index, point in enumerate(chart.points) if index not in chart.front]
    axes.plot([x for x, _ in best], [y for _, y in best], color=_COLOURS[1], linewidth=1.2)
    for points, colour, mark in (
        (others, _COLOURS[0], "o"),
        ([chart.points[i] for i in chart.front], _COLOURS[1], "s"),
    ):
        axes.plot([x for x, _ in points], [y for _, y in points], mark, color=colour, markersize=5)
    for (x, y), label in zip(chart.points, chart.labels, strict=True):
        axes.annotate(_short(label, 20), (x, y), (3, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.set_title(chart.title)
    axes.grid(color="#e2e2e2", linewidth=0.7)
    axes.set_axisbelow(True)


def _short(name: str, most: int = _LABEL) -> str:
    return name if len(name) <= most else f"{name[: most - 12]}…{name[-11:]}"
