"""Lowered programs: one shape of what comes out, whatever the target.

``program(*inputs)`` returns what the Q/DQ graph returns; ``program.report`` says what runs it, ``program.verification``
how far the two are apart, and ``program.save(path)`` writes a file that the target's own runtime loads.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from lowering.state import KeepsState
from lowering.verify import Verification
from quant2e.page.render import ShownOnAPage
from quant2e.page.section import PageSection, cell_of
from quant2e.report.html import html_table
from quant2e.report.plain_data import plain_data
from quant2e.report.summary import summary

Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""Headers and rows."""


class LoweringReport(ShownOnAPage):
    """What a target made of a graph. Subclasses are frozen dataclasses with the two fields below.

    ``notes``: what to know about the whole. ``verification``: the program against its Q/DQ graph; None when that was
    not asked for. ``str(report)`` is the whole report, ``repr(report)`` a summary of at most ten lines.
    """

    __slots__ = ()

    PAGE_TITLE: ClassVar[str] = "Lowered program"

    notes: tuple[str, ...]
    verification: Verification | None

    @property
    @abstractmethod
    def headline(self) -> str:
        """The result in one line."""

    @abstractmethod
    def table(self) -> Table:
        """What happened to each op or group of ops, as headers and rows."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**plain_data(self)}

    def summary(self, title: str) -> str:
        """``title`` with the headline, the verification and the first notes."""
        lines = [f"{title}: {self.headline}"]
        if self.verification is not None:
            lines.append(f"against its Q/DQ graph: {self.verification}")
        return summary(lines, self.notes)

    def __repr__(self) -> str:
        return self.summary(type(self).__name__)

    def _repr_html_(self) -> str:
        return html_table(*self.table(), repr(self))

    def page_sections(self) -> tuple[PageSection, ...]:
        """What runs each op: the table of the report, under the result, the comparison and the notes."""
        headers, rows = self.table()
        compared = () if self.verification is None else (f"against its Q/DQ graph: {self.verification}",)
        section = PageSection(
            title=type(self).__name__.removesuffix("Report") + " program",
            lines=(self.headline, *compared, *(f"note: {note}" for note in self.notes)),
            headers=tuple(headers),
            rows=tuple(tuple(cell_of(value) for value in row) for row in rows),
            filters=tuple(headers),
            data=self.as_dict(),
        )
        return (section,)


ReportT_co = TypeVar("ReportT_co", bound=LoweringReport, covariant=True)


class LoweredProgram(KeepsState, ABC, Generic[ReportT_co]):
    """A program that computes what its Q/DQ graph says, made by one of the functions of `lowering`.

    Where the graph writes to its buffers, so does the program, to buffers of its own: they begin with the values that
    the graph had when it was lowered, and `reset` puts those back.
    """

    @property
    @abstractmethod
    def report(self) -> ReportT_co:
        """What runs the program, and what to know about it."""

    @property
    def verification(self) -> Verification | None:
        """How far the program is from its Q/DQ graph; None when that was not asked for."""
        return self.report.verification

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on what the model takes, and return what it returns. Raises `LoweringError` on other inputs."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program to a file, which appears whole or not at all."""

    def page_sections(self) -> tuple[PageSection, ...]:
        """What a page shows of its report."""
        return self.report.page_sections()

    def __repr__(self) -> str:
        return self.report.summary(type(self).__name__)

    def _repr_html_(self) -> str:
        return html_table(*self.report.table(), repr(self))
