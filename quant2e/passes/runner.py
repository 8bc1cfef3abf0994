"""Runs passes in order. A pass is a function ``GraphModule -> bool`` that says whether it changed anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import GraphModule

from quant2e.errors import PassError

Pass = Callable[[GraphModule], bool]
"""A rewrite in place: a function, or a frozen dataclass with ``__call__`` when it has options."""


def pass_name(rewrite: Pass) -> str:
    """Name of a pass for messages: the function's, or the class and its options."""
    return getattr(rewrite, "__name__", None) or repr(rewrite)


def run(
    gm: GraphModule,
    passes: Iterable[Pass],
    *,
    verify: Callable[[GraphModule], None] | None = None,
    compiled: bool = True,
) -> bool:
    """Run ``passes`` on ``gm`` in place, and compile the graph once at the end. Says whether anything changed.

    ``compiled=False``: the caller edits on, and compiles itself.

    After each pass that changed the graph it is linted, and given to ``verify``, which raises when it is not legal.
    Raises `PassError`, naming the pass, when the pass, the lint or ``verify`` fails. The graph may then be half
    rewritten: run passes on a copy.
    """
    changed = False
    for rewrite in passes:
        stage = "failed"
        try:
            if not rewrite(gm):
                continue
            changed = True
            stage = "left an illegal graph"
            gm.graph.lint()
            if verify is not None:
                verify(gm)
        except Exception as error:
            raise PassError(f"pass '{pass_name(rewrite)}' {stage}: {error}") from error
    if changed and compiled:
        gm.recompile()
    return changed
