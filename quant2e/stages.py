"""Stages: what takes long says what it is doing, on a terminal by itself and elsewhere to loggers, and can be stopped.

    with stage("lower to ExecuTorch"):        a spinner with the name and the time, on a terminal
        with stage("compare") as shown:       the innermost one that is open, behind the outer ones
            shown(3, 8)                       3 of 8 are done

Shown on stderr where that is a terminal and rich is installed; never with ``QUANT2E_PROGRESS=0``, nor within
`quiet_progress`. Each stage is a line of the logger ``quant2e.stages``, at INFO, when it ends. Ctrl-C ends a stage
wherever it comes, also where Python would lose it.
"""

from __future__ import annotations

import _thread
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from quant2e.errors import Quant2eError

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

VARIABLE = "QUANT2E_PROGRESS"
"""Environment variable: ``0`` shows nothing."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_display: ContextVar[_Display | None] = ContextVar("display", default=None)


_AGAIN = 0.02
"""Seconds until a lost interrupt comes again: at once would be in the hook, where it is lost as well."""


class OpenStage:
    """One stage while it is open. Calling it says how many steps are done, of so many where that is known."""

    def __init__(self, name: str, display: _Display | None) -> None:
        self.name = name
        self.done: int | None = None
        self.total: int | None = None
        self._display = display

    def __call__(self, done: int, total: int | None = None) -> None:
        self.done, self.total = done, total
        if self._display is not None:
            self._display.draw()

    def __str__(self) -> str:
        if self.done is None:
            return self.name
        return f"{self.name} {self.done}" + ("" if self.total is None else f"/{self.total}")


class _Display:
    """The stages that are open, on one line of a terminal that goes when the outermost one ends."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)
        self.stages: list[OpenStage] = []
        bar.start()

    def draw(self) -> None:
        self._bar.update(self._task, description=" › ".join(map(str, self.stages)))

    def stop(self) -> None:
        self._bar.stop()


@contextmanager
def stage(name: str) -> Iterator[OpenStage]:
    """A stage of work with a name, shown while the block runs and logged when it ends, with the seconds it took."""
    outer = _display.get()
    opened = None if outer is not None or not shown() else _opened()
    display = outer or opened
    own, start = OpenStage(name, display), time.monotonic()
    token = _display.set(display)
    ended = "stopped"
    try:
        if display is not None:
            display.stages.append(own)
            display.draw()
        with interrupts_that_last():
            yield own
        ended = "done"
    finally:
        _display.reset(token)
        if display is not None:
            display.stages.remove(own)
            if display.stages:
                display.draw()
        if opened is not None:
            opened.stop()
        LOG.info("%s: %s in %.1f s", own, ended, time.monotonic() - start)


class _Repeated:
    """A hook for what cannot be raised: an interrupt comes again, whatever else goes to the hook that was there."""

    def __init__(self, usual: Callable[[Any], object]) -> None:
        self.usual = usual
        self.lost: list[threading.Timer] = []

    def __call__(self, unraisable: Any) -> None:
        if unraisable.exc_type is None or not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.usual(unraisable)
            return
        again = threading.Timer(_AGAIN, _thread.interrupt_main)
        again.daemon = True
        self.lost.append(again)
        again.start()


@contextmanager
def interrupts_that_last() -> Iterator[None]:
    """Ctrl-C ends the block, also where Python would lose it.

    Weak references and ``__del__`` call back in the midst of everything that a compiler does; what is raised there is
    printed and forgotten, and the program goes on. An interrupt that was raised there is raised again.
    """
    if isinstance(sys.unraisablehook, _Repeated):  # a block around this one sees to it
        yield
        return
    usual = sys.unraisablehook
    sys.unraisablehook = hook = _Repeated(usual)
    try:
        yield
    finally:
        sys.unraisablehook = usual
        waiting = [again for again in hook.lost if again.is_alive()]
        for again in waiting:
            again.cancel()
    if waiting:
        raise KeyboardInterrupt


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Nothing is shown while the block runs; loggers are told as before."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def heard(progress: F | bool | None) -> F | None:
    """Who is told of progress by a function's ``progress=``: nobody where it is None, True or False.

    Raises `Quant2eError` for what is none of these and cannot be called.
    """
    if progress is None or isinstance(progress, bool):
        return None
    if not callable(progress):
        raise Quant2eError(f"progress is a {type(progress).__name__}: False, or a function that is told")
    return progress


def quiet_where_told(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function with a keyword ``progress=``: it shows no stages where that is False, or the user's own.

    Calls raise as `heard`.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        told: Any = kwargs.get("progress")
        if heard(told) is None and told is not False:
            return function(*args, **kwargs)
        with quiet_progress():
            return function(*args, **kwargs)

    return call


def quiet_where_false(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function with a keyword ``progress=`` that counts no steps: it shows no stages where that is False.

    Calls raise `Quant2eError` for what is neither None, True nor False.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        told: Any = kwargs.get("progress")
        if told is not None and not isinstance(told, bool):
            what = "a function" if callable(told) else f"a {type(told).__name__}"
            raise Quant2eError(
                f"{function.__name__}: progress is {what}: None or True shows stages on a terminal, False shows "
                "nothing; there are no steps that a function could be told of"
            )
        if told is not False:
            return function(*args, **kwargs)
        with quiet_progress():
            return function(*args, **kwargs)

    return call


def shown() -> bool:
    """Whether stages are shown: on a terminal, unless asked not to."""
    return not _quiet.get() and os.environ.get(VARIABLE, "") != "0" and sys.stderr.isatty()


def _opened() -> _Display | None:
    """A display that has begun; None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return _Display(Progress(*columns, console=Console(file=sys.stderr), transient=True))
