"""PageSection: what one part of a page shows, as data. What has a ``page_sections()`` can be put on a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Cell = str | int | float | None
"""One cell of a table. Numbers sort as numbers, and stand to the right."""


def cell_of(value: object) -> Cell:
    """Any value as a cell: numbers as they are, the rest as text."""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class DotChart:
    """A row of dots for each name, from the top down: ``series`` has a value for each of ``names`` under each label.

    Values that are not finite are drawn at the edge of the chart, with their name.
    """

    title: str
    unit: str
    names: tuple[str, ...]
    series: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeChart:
    """A histogram over ``low`` to ``high`` in bins of equal width, and the range ``chosen`` for its integers."""

    title: str
    low: float
    high: float
    counts: tuple[int, ...]
    chosen: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterChart:
    """Points with a label each; those whose index is in ``front`` are joined, in that order."""

    title: str
    x: str
    y: str
    points: tuple[tuple[float, float], ...]
    labels: tuple[str, ...]
    front: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowNode:
    """One op of a graph. ``kind``: a word that has a colour; ``inputs``: ids of nodes before it; ``detail``: a line."""

    id: str
    label: str
    kind: str
    inputs: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowChart:
    """A graph, its nodes in an order in which each comes after what it reads."""

    title: str
    nodes: tuple[FlowNode, ...]


Chart = DotChart | RangeChart | ScatterChart | FlowChart


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSection:
    """One part of a page: ``lines`` of text, a table of ``rows`` under ``headers``, ``charts``, and ``data``, the JSON
    form of all of it.

    ``filters``: headers of columns in which few different words stand, for which the table offers a choice.
    ``joined``: sections of one page with the same title and headers are one table, of the rows of all; ``data`` is a
    list then. Others with the same title are numbered.
    Raises ValueError when a row has another length than ``headers``.
    """

    title: str
    lines: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    filters: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    data: Any = field(default=None)
    joined: bool = False

    def __post_init__(self) -> None:
        if any(len(row) != len(self.headers) for row in self.rows):
            raise ValueError(f"section '{self.title}': every row has {len(self.headers)} cells, one for each header")


@runtime_checkable
class OnAPage(Protocol):
    """What can be put on a page: reports, comparisons, sensitivities, tuning results, lowered programs."""

    def page_sections(self) -> tuple[PageSection, ...]:
        """What it shows, in order."""
        ...
