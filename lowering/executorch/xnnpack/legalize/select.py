"""select(x, d, i)  =  squeeze(slice(x, d, i, i + 1), d), and unbind is one select per part.

XNNPACK slices and views; it does not drop a dimension.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten


def slice_selects(module: GraphModule) -> int:
    """Rewrite selections from a static dimension; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _ATEN.unbind.int:
            dim = node.args[1] if len(node.args) > 1 else 0
            for part in [user for user in node.users if user.target is operator.getitem]:
                count += _sliced(part, node.args[0], dim, part.args[1])
        elif node.target is _ATEN.select.int:
            count += _sliced(node, *node.args)
    return count


def _sliced(node: Node, x: object, dim: object, index: object) -> int:
    if not isinstance(x, Node) or not isinstance(dim, int) or not isinstance(index, int):
        return 0
    shape = shape_of(x)
    dim %= len(shape)
    size = shape[dim]
    rest = [*shape[:dim], *shape[dim + 1 :]]
    if not rest or not isinstance(size, int) or sum(not isinstance(s, int) for s in rest) > 1:
        return 0
    index %= size
    part = emit(node, _ATEN.slice.Tensor, x, dim, index, index + 1)
    # one_view spells the unknown size out as -1
    node.replace_all_uses_with(emit(node, _ATEN.squeeze.dims, part, [dim]))
    node.graph.erase_node(node)
    return 1
