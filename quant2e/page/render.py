"""Rendering: sections become one self-contained HTML file, written atomically.

The page loads nothing: style, script and charts are in it, and its content security policy allows no other source and
no other script. Text is escaped by the template engine, and the JSON by its filter for scripts, since names of ops and
modules come from files.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from quant2e.errors import Quant2eError
from quant2e.files import atomic_file
from quant2e.page.flow import Drawing, drawing
from quant2e.page.plots import svg_of
from quant2e.page.section import Cell, FlowChart, OnAPage, PageSection

_CHOICES = 12
"""Different words in a column up to which a table offers them as a choice."""


@dataclass(frozen=True, slots=True)
class _Plot:
    title: str
    svg: Any


@dataclass(frozen=True, slots=True)
class _Graph:
    title: str
    drawing: Drawing
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    number: str | None


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    cells: tuple[_Cell, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    column: int
    header: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Shown:
    """A section as the template reads it."""

    title: str
    lines: tuple[str, ...]
    headers: tuple[str, ...]
    table: tuple[_Row, ...]
    choices: tuple[_Choice, ...]
    plots: tuple[_Plot, ...]
    graphs: tuple[_Graph, ...]


class ShownOnAPage(ABC):
    """What can be written as a page of its own."""

    __slots__ = ()

    PAGE_TITLE: ClassVar[str] = "Quantization report"

    @abstractmethod
    def page_sections(self) -> tuple[PageSection, ...]:
        """What a page shows of it, in order."""

    def to_html(self, path: str | os.PathLike[str], *others: Any, title: str = "") -> None:
        """Write one HTML file that opens without a network, on a phone too: tables that search and sort, and plots.

        ``others``: what else is known of the run, shown below: a report (verdicts, graph, worst tensors), a comparison
        (SQNR by layer), a sensitivity, a tuning result (trials and the Pareto front), lowered programs or their reports
        (delegates, kernels), rows of ``quant2e bench`` (latency), or lists of these. The JSON of all of it is in the
        element of the id ``data``, and the page saves it. Needs the extra ``html``.

        Raises `Quant2eError` where that is not installed, or for something that no page shows, and OSError when the
        file cannot be written; ``path`` is then as it was.
        """
        write_page(path, title or self.PAGE_TITLE, (self, *others))


def write_page(path: str | os.PathLike[str], title: str, shown: Sequence[Any]) -> None:
    """Write a page with everything that ``shown`` has to show, in order, to ``path``; the file appears whole.

    ``shown``: things with ``page_sections()``, and sequences of them. Raises `Quant2eError` for anything else, and
    where matplotlib is missing; OSError when the file cannot be written. Nothing is written then.
    """
    text = page_text(title, sections_of(shown), f"{Path(path).stem}.json")
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def sections_of(shown: Iterable[Any]) -> list[PageSection]:
    """The sections of everything that is shown, those that are ``joined`` as one; no two have the same title.

    Raises `Quant2eError` for what cannot be shown.
    """
    found: list[PageSection] = []
    places: dict[tuple[str, tuple[str, ...]], int] = {}
    times: Counter[str] = Counter()
    for section in _each(shown):
        place = places.get((section.title, section.headers)) if section.joined else None
        if place is not None:
            before = found[place]
            rows, data = (*before.rows, *section.rows), [*before.data, *section.data]
            found[place] = replace(before, rows=rows, data=data)
            continue
        places[section.title, section.headers] = len(found)
        times[section.title] += 1
        number = f" ({times[section.title]})" if times[section.title] > 1 else ""
        found.append(replace(section, title=section.title + number))
    return found


def _each(shown: Iterable[Any]) -> Iterable[PageSection]:
    for one in shown:
        if isinstance(one, OnAPage):
            yield from one.page_sections()
        elif isinstance(one, list | tuple):
            yield from _each(one)
        else:
            raise Quant2eError(
                f"a page shows reports, comparisons, sensitivities, tuning results, lowered programs and rows of "
                f"`bench`, not a {type(one).__name__}"
            )


def page_text(title: str, sections: Sequence[PageSection], file_name: str) -> str:
    """The page as HTML. ``file_name``: under which the JSON of the page is saved from it."""
    from markupsafe import Markup

    environment = _environment()
    script, style = _read("page.js"), _read("page.css")
    rows_of: dict[str, str] = defaultdict(str)
    shown = [_shown(section, number, rows_of) for number, section in enumerate(sections, start=1)]
    told = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    data = {"title": title, "parts": [{"title": s.title, "data": s.data} for s in sections if s.data is not None]}
    return str(
        environment.from_string(_read("page.html")).render(
            title=title,
            sections=shown,
            rows_of=rows_of,
            style=Markup(style),  # noqa: S704  # a file of this package
            script=Markup(script),  # noqa: S704  # a file of this package
            script_hash=told,
            data=data,
            made_by="Written by quant2e. This file loads nothing from elsewhere.",
            file_name=file_name,
        )
    )


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise Quant2eError(
            "pages are rendered by jinja2, which is not installed: pip install 'quant2e[html]'"
        ) from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False}
    return environment


@cache
def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _shown(section: PageSection, number: int, rows_of: dict[str, str]) -> _Shown:
    from markupsafe import Markup

    flows = [chart for chart in section.charts if isinstance(chart, FlowChart)]
    others = [chart for chart in section.charts if not isinstance(chart, FlowChart)]
    ids = [f"row-{number}-{index}" for index in range(len(section.rows))]
    for row, name in zip(section.rows, ids, strict=True) if section.headers[:1] == ("op",) else ():
        rows_of.setdefault(str(row[0]), name)
    return _Shown(
        title=section.title,
        lines=section.lines,
        headers=section.headers,
        table=tuple(_Row(name, tuple(map(_cell, row))) for name, row in zip(ids, section.rows, strict=True)),
        choices=tuple(_choices(section)),
        plots=tuple(_Plot(chart.title, Markup(svg_of(chart))) for chart in others),  # noqa: S704  # matplotlib escapes
        graphs=tuple(
            _Graph(chart.title, drawing(chart.nodes), tuple(dict.fromkeys(node.kind for node in chart.nodes)))
            for chart in flows
        ),
    )


def _choices(section: PageSection) -> Iterable[_Choice]:
    for header in section.filters:
        column = section.headers.index(header)
        words = tuple(dict.fromkeys(_cell(row[column]).text for row in section.rows))
        if 1 < len(words) <= _CHOICES:
            yield _Choice(column, header, tuple(sorted(words)))


def _cell(value: Cell) -> _Cell:
    """Numbers sort by their value; those that are not finite sort at the ends."""
    if value is None:
        return _Cell("", None)
    if isinstance(value, str):
        return _Cell(value, None)
    if isinstance(value, int):
        return _Cell(f"{value:,}", str(value))
    if math.isnan(value):
        return _Cell("nan", None)
    if math.isinf(value):
        return _Cell(str(value), "1e308" if value > 0 else "-1e308")
    return _Cell(f"{value:.4g}", repr(value))
