"""flatten, squeeze, unsqueeze, reshape  =  view, with -1 for the one size that is known at run time only.

XNNPACK takes a view whose sizes are numbers, at most one of them -1. It has no squeeze, and unsqueezes at the end only.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten
RESHAPES = movements(Effect.RESHAPE)


def one_view(module: GraphModule) -> int:
    """Rewrite reshapes of floats and integers alike as views; returns how many changed."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in RESHAPES or not isinstance(node.args[0], Node):
            continue
        sizes = _sizes(node)
        if sizes is None or (node.target is _ATEN.view.default and list(node.args[1]) == sizes):
            continue
        view = _viewed(node, node.args[0], sizes)
        node.replace_all_uses_with(view)
        module.graph.erase_node(node)
        count += 1
    return count


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
