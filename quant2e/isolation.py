"""Isolation: one thread at a time where torch changes the process, and the process as it was afterwards.

While torch traces a model it changes what belongs to the whole process: how modules are called, oneDNN's flag, the
random stream, warnings filters. Two threads at once break each other's traces, and each puts back what it found of the
other's as if it were the user's. So whatever enters ``torch.export``, ``torch.compile`` or a lowering does so in
`tracing`, and what runs a model on a random stream of its own does so in `IsolatedRandomness`. Both take one lock.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

ALONE = threading.RLock()
"""Held by the one thread that traces or runs a model; a thread that holds it may take it again."""


@dataclass(frozen=True, slots=True, eq=False)
class RandomState:
    """The random streams of the process: Python's, numpy's global one, and torch's on the CPU and on devices in use."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> Self:
        """The streams as they are."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), tuple(devices))  # noqa: NPY002

    def restore(self) -> None:
        """Let the streams go on from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)


class IsolatedRandomness:
    """Runs code on random streams of its own, so that the caller's are as they were; one thread at a time.

    The streams begin where the caller's are when this is made, and each block goes on where the last one ended.
    """

    def __init__(self) -> None:
        self._own = RandomState.now()
        self._callers = self._own
        self._block = ExitStack()

    def __enter__(self) -> None:
        self._block.enter_context(ALONE)
        self._block.enter_context(_without_monitor())
        self._callers = RandomState.now()
        self._own.restore()

    def __exit__(self, *exc: object) -> None:
        with self._block:
            self._own = RandomState.now()
            self._callers.restore()


@contextmanager
def _without_monitor() -> Iterator[None]:
    """Torch's interpreter makes a bar of tqdm, shown or not, and tqdm starts a thread to watch bars, for good."""
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    seconds = getattr(bars, "monitor_interval", 0)
    if bars is not None:
        bars.monitor_interval = 0
    try:
        yield
    finally:
        if bars is not None:
            bars.monitor_interval = seconds


@contextmanager
def tracing(*, streams: bool = True) -> Iterator[None]:
    """One thread at a time; on exit, environment, logging, limits and, unless told otherwise, streams are as before."""
    with ALONE, _without_monitor():
        drawn = RandomState.now() if streams else None
        environment, limit = dict(os.environ), sys.getrecursionlimit()
        threads, filters = torch.get_num_threads(), list(warnings.filters)
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        try:
            yield
        finally:
            if drawn is not None:
                drawn.restore()
            _restore_environment(environment)
            sys.setrecursionlimit(limit)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            if list(warnings.filters) != filters:
                warnings.resetwarnings()  # tells Python that they changed
                warnings.filters[:] = filters  # type: ignore[index]
            root.handlers[:] = handlers
            root.setLevel(level)


def _restore_environment(variables: dict[str, str]) -> None:
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@contextmanager
def quietly(*loggers: str) -> Iterator[None]:
    """Without the warnings of the libraries inside, and below errors without what these loggers say; in `tracing`."""
    named = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in named]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in named:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(named, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def unheard(doing: str) -> Iterator[None]:
    """Keeps from the screen what a library writes while the block runs, by C++ as well: ``doing`` says what it does.

    The logger of this file gets it, at DEBUG. What fails is told by its error alone.
    """
    with ALONE, tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as heard:
        try:
            with redirect_stdout(heard), redirect_stderr(heard), _descriptors_to(heard.fileno()):
                yield
        finally:
            heard.seek(0)
            if said := heard.read().strip():
                _LOG.debug("while %s:\n%s", doing, said)


@contextmanager
def _descriptors_to(other: int) -> Iterator[None]:
    """Standard output and error of the process, as C++ writes to them, go to another file while the block runs."""
    kept = {}
    for number in (1, 2):
        with suppress(OSError):  # a process without them
            kept[number] = os.dup(number)
            os.dup2(other, number)
    try:
        yield
    finally:
        for number, own in kept.items():
            os.dup2(own, number)
            os.close(own)
