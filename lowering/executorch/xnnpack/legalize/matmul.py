"""matmul(a, b)  =  view(bmm(view(a), view(b)))  for tensors with the same leading dimensions.

Torch's own decomposition expands both operands to a common batch first, by an op that no delegate takes even where
it does nothing.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten


def batched_matmul(module: GraphModule) -> int:
    """Rewrite products of float32 tensors of equal rank, 3 or more, and equal leading sizes; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.matmul.default:
            continue
        a, b = node.args
        if not isinstance(a, Node) or not isinstance(b, Node) or a.meta["val"].dtype is not torch.float32:
            continue
        left, right = shape_of(a), shape_of(b)
        if len(left) != len(right) or len(left) < 3 or left[:-2] != right[:-2]:
            continue
        node.replace_all_uses_with(product(node, a, b))
        module.graph.erase_node(node)
        count += 1
    return count


def product(like: Node, a: Node, b: Node) -> Node:
    """Batched product over the last two dimensions, through three dimensions: what XNNPACK has a kernel for."""
    rank = len(shape_of(a))
    if rank == 3:
        return emit(like, _ATEN.bmm.default, a, b)
    lead = range(rank - 2)
    left = _reshaped(like, a, [(a, *lead), (a, rank - 2), (a, rank - 1)])
    right = _reshaped(like, b, [(b, *lead), (b, rank - 2), (b, rank - 1)])
    result = emit(like, _ATEN.bmm.default, left, right)
    return _reshaped(like, result, [*((a, dim) for dim in lead), (a, rank - 2), (b, rank - 1)])


def _reshaped(like: Node, x: Node, sizes: list[tuple[Node, *tuple[int, ...]]]) -> Node:
    """``x`` with each size the product of some sizes of a tensor; the first unknown one is -1."""
    arguments: list[int | Node] = []
    for source, *dims in sizes:
        known = [shape_of(source)[dim] for dim in dims]
        if all(isinstance(size, int) for size in known):
            arguments.append(math.prod(int(size) for size in known))
        elif -1 not in arguments:
            arguments.append(-1)
        else:
            arguments.append(emit(like, _ATEN.sym_size.int, source, dims[0]))
    return emit(like, _ATEN.reshape.default, x, arguments)
