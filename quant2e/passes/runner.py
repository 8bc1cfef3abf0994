"""The pass contract, and the one runner of every pipeline.

A pass is ``(name, GraphModule -> count)``: a rewrite in place that keeps the float result and says how often it
applied. A pipeline is a tuple of passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from quant2e.errors import PassError


class Pass(Protocol):
    """A rewrite in place: a function, or an object with a name where it has options or is a pattern."""

    @property
    def __name__(self) -> str:
        """The name, in messages and reports."""
        ...

    def __call__(self, gm: GraphModule, /) -> int:
        """Rewrite ``gm`` in place; returns how often the rewrite applied, 0 when the graph is as it was."""
        ...


Check = Callable[[], None]
"""Raises when the graph is not as it should be. Called after every pass that changed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What the passes of a pipeline keep.

    ``result``: the float result; False for passes that change numbers, as what lowers with them says. ``waived``: the
    rules of a legal Q/DQ graph (`convert.legality`) that the form of a target does without.
    """

    result: bool = True
    waived: frozenset[str] = frozenset()


KEEPS_ALL = Promise()

Watch = Callable[[GraphModule, Promise], Check]
"""Looks at a graph in front of a pipeline, and makes the `Check` of what the pipeline promises."""

_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def checking(watch: Watch) -> Iterator[None]:
    """Have every pipeline that runs inside of the block watched; the tests do so."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def run(
    gm: GraphModule, passes: Iterable[Pass], *, compiled: bool = True, promise: Promise = KEEPS_ALL
) -> dict[str, int]:
    """Run ``passes`` on ``gm`` in place; returns how often each applied, without those that did not.

    ``compiled``: compile the graph once at the end, if it changed; False when the caller edits on, and compiles itself.
    After each pass that applied the graph is linted, and in tests checked (`checking`). Raises `PassError`, naming the
    pass, when the pass, the lint or the check fails. The graph may then be half rewritten: run passes on a copy.
    """
    watch = _WATCH.get()
    check = watch(gm, promise) if watch is not None else None
    applied: dict[str, int] = {}
    for rewrite in passes:
        stage = "failed"
        try:
            count = rewrite(gm)
            if not count:
                continue
            applied[rewrite.__name__] = applied.get(rewrite.__name__, 0) + count
            stage = "left an illegal graph"
            gm.graph.lint()
            if check is not None:
                check()
        except Exception as error:
            raise PassError(f"pass '{rewrite.__name__}' {stage}: {error}") from error
    if applied and compiled:
        gm.recompile()
    return applied
