"""What the demo is doing now: live bars on a terminal, one line per phase in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int | None], None]
"""Called with the number of steps done and, where it is known, the total."""


def silent(*_: int | None) -> None:
    """An `Advance` that shows nothing."""


class Phases(AbstractContextManager["Phases"]):
    """Shows phases one after the other and remembers how long each took.

    ``seconds``: duration per phase, in the order they ran.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._live: Progress | None = None
        if console.is_terminal:
            columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(bar_width=24))
            self._live = Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def phase(self, what: str) -> Iterator[Advance]:
        """Announce ``what``; yield a function that reports its steps."""
        start = time.perf_counter()
        if self._live is None:
            yield silent
        else:
            yield from self._bar(self._live, what)
        self.seconds[what] = time.perf_counter() - start
        if self._live is None:
            self.console.print(f"{self.seconds[what]:7.1f} s  {what}", highlight=False, soft_wrap=True)

    @staticmethod
    def _bar(live: Progress, what: str) -> Iterator[Advance]:
        task = live.add_task(what, total=None)

        def advance(done: int, total: int | None) -> None:
            live.update(task, completed=done, total=total)

        yield advance
        total = live.tasks[task].total or 1
        live.update(task, completed=total, total=total)
