"""The table of trials while they run: a live one on a terminal with rich, lines without it, and nothing elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self, TextIO

from quant2e.accuracy.tuning.result import HEADERS, cells
from quant2e.accuracy.tuning.space.trial import TuningTrial

_ROWS = 20
"""Trials that a live table shows, the last ones."""


class TrialTable:
    """Shows trials; give it as ``progress`` to `quant2e.tune`, which makes one on a terminal unless told otherwise.

    ``stream``: stderr by default. What is no terminal gets nothing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._trials: list[TuningTrial] = []
        self._live: Any = None

    def __enter__(self) -> Self:
        self._live = _live(self._stream) if self._stream.isatty() else None
        if self._live is not None:
            self._live.start()
        return self

    def __call__(self, trial: TuningTrial) -> None:
        """One more trial is finished."""
        self._trials.append(trial)
        if self._live is not None:
            self._live.update(_table(self._trials), refresh=True)
        elif self._stream.isatty():
            self._stream.write(f"{trial}\n")
            self._stream.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _live(stream: TextIO) -> Any:
    """Rich's live display; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None
    return Live(_table([]), console=Console(file=stream), auto_refresh=False)


def _table(trials: list[TuningTrial]) -> Any:
    from rich.table import Table

    met = [trial for trial in trials if trial.met]
    best = min(met, key=lambda trial: trial.work) if met else None
    title = f"{len(trials)} trials; the goal is {'met' if met else 'not met yet'}"
    table = Table(title=title)
    for header in HEADERS:
        table.add_column(header, justify="right")
    for trial in trials[-_ROWS:]:
        table.add_row(*cells(trial, best), style="green" if trial.met else None)
    return table
