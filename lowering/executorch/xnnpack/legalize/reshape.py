"""Reshapes as views.

flatten, squeeze, unsqueeze, reshape  =  view, with -1 for the one size that is known at run time only.

XNNPACK takes a view whose sizes are numbers, at most one of them -1. It has no squeeze, and unsqueezes at the end only.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import unary
from quant2e.annotation.pattern import Match
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten
RESHAPES = movements(Effect.RESHAPE)


def _changes(node: Node) -> bool | str:
    sizes = _sizes(node)
    if sizes is None:
        return f"'{node.name}' has several sizes that vary, or one of 0"
    same = node.target is _ATEN.view.default and list(operand(node, "size")) == sizes
    return not same or f"'{node.name}' is such a view"


def _view(_: GraphModule, match: Match) -> Node:
    sizes = _sizes(match.root)
    assert sizes is not None, "matched"
    return _viewed(match.root, match.edges["x"][0], sizes)


def _viewed(node: Node, x: Node, sizes: list[int]) -> Node:
    if -1 not in sizes:
        return emit(node, _ATEN.reshape.default, x, sizes)
    # where reshape has to copy it writes the unknown size out, as an expression; a view keeps the -1
    return emit(node, _ATEN.view.default, emit(node, _ATEN.contiguous.default, x), sizes)


def _sizes(node: Node) -> list[int] | None:
    """The output's sizes with -1 for the symbolic one; None when several are symbolic, or a size is 0."""
    sizes: list[int | torch.SymInt] = list(shape_of(node))
    symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(symbolic) > 1 or any(size == 0 for size in sizes if isinstance(size, int)):
        return None
    return [-1 if i in symbolic else int(size) for i, size in enumerate(sizes)]


one_view = Rewrite("one_view", unary(*RESHAPES, when=_changes), _view)
"""Reshapes of floats and integers alike as views."""
