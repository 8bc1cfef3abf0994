"""Ready-made progress for `calibrate` and `quantize`: a live line with ETA on a terminal, one line per phase in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

_SECONDS_BETWEEN = 0.1
_BAR = 24


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressLine:
    """Shows one phase; give it as ``progress``, within ``with`` so that the line is finished whatever happens.

    ``with ProgressLine("calibrate") as progress: calibrate(prepared, data, progress=progress)``

    ``stream``: stderr by default. On a terminal the line is rewritten ten times a second at most, with the time that is
    left; elsewhere one line is written at the end of the phase.
    """

    def __init__(self, phase: str, stream: TextIO | None = None) -> None:
        self.phase = phase
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._start = self._shown = time.monotonic()
        self._done = 0
        self._total: int | None = None

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def __call__(self, done: int, total: int | None) -> None:
        """So many steps are done, of so many where that is known."""
        self._done, self._total = done, total
        now = time.monotonic()
        if self._live and (now - self._shown >= _SECONDS_BETWEEN or done == total):
            self._shown = now
            self._stream.write(f"\r\033[K{self.line(now - self._start)}")
            self._stream.flush()

    def line(self, elapsed: float) -> str:
        """What the terminal shows after so many seconds."""
        if self._total is None:
            return f"{self.phase}: {self._done} batches, {clock(elapsed)}"
        filled = _BAR * self._done // max(self._total, 1)
        left = elapsed / self._done * (self._total - self._done) if self._done else 0.0
        bar = "█" * filled + "·" * (_BAR - filled)
        return f"{self.phase}: {bar} {self._done}/{self._total}, {clock(elapsed)}, {clock(left)} left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        elapsed = time.monotonic() - self._start
        end = "" if kind is None else f", stopped by {kind.__name__}"
        start = "\r\033[K" if self._live else ""
        self._stream.write(f"{start}{self.phase}: {self._done} batches in {elapsed:.1f} s{end}\n")
        self._stream.flush()
