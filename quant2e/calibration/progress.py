"""Progress of a long calibration: rich's bar on a terminal, one line per phase in a log.

rich is not needed: without it a terminal gets the log's lines.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO


class ProgressLine:
    """Shows one phase; give it as ``progress``, within ``with`` so that the line is finished whatever happens.

    ``with ProgressLine("calibrate") as progress: calibrate(prepared, data, progress=progress)``

    ``stream``: stderr by default. On a terminal, where rich is installed, a bar with the time that is left; in any case
    one line is written at the end of the phase.
    """

    def __init__(self, phase: str, stream: TextIO | None = None) -> None:
        self.phase = phase
        self._stream = sys.stderr if stream is None else stream
        self._start = time.monotonic()
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._bar = _bar(self._stream) if self._stream.isatty() else None
        if self._bar is not None:
            self._bar.add_task(self.phase, total=None)
            self._bar.start()
        return self

    def __call__(self, done: int, total: int | None) -> None:
        """So many steps are done, of so many where that is known."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        end = "" if kind is None else f", stopped by {kind.__name__}"
        elapsed = time.monotonic() - self._start
        self._stream.write(f"{self.phase}: {self._done} batches in {elapsed:.1f} s{end}\n")
        self._stream.flush()


def _bar(stream: TextIO) -> Any:
    """Rich's bar, which goes when it is stopped; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeft())
    return Progress(*columns, console=Console(file=stream), transient=True)
