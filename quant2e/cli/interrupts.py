"""Ctrl-C: a verb stops wherever it is, also where Python would lose the interrupt."""

from __future__ import annotations

import _thread
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 130
"""Of a verb that was stopped: 128 and the number of the signal, as shells have it."""


@contextmanager
def interrupts_that_last() -> Iterator[None]:
    """An interrupt that comes where Python can raise nothing comes again, until it ends the block.

    Weak references and ``__del__`` call back in the midst of everything that a compiler does; what is raised there is
    printed and forgotten, and the program goes on.
    """
    usual = sys.unraisablehook

    def told(unraisable: Any) -> None:
        if unraisable.exc_type is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            _thread.interrupt_main()
        else:
            usual(unraisable)

    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = usual
