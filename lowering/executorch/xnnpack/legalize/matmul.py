"""Matmul → bmm.

matmul(a, b)  =  view(bmm(view(a), view(b)))  for tensors with the same leading dimensions.

Torch's own decomposition expands both operands to a common batch first, by an op that no delegate takes even where
it does nothing.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import all_of, float32
from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten


def _same_batch(node: Node) -> bool | str:
    a, b = operand(node, 0), operand(node, 1)
    left, right = (shape_of(x) if isinstance(x, Node) else () for x in (a, b))
    same = len(left) == len(right) and len(left) >= 3 and left[:-2] == right[:-2]
    return same or f"the operands of '{node.name}' are not batches of the same sizes"


def _batched(_: GraphModule, match: Match) -> Node:
    return product(match.root, match.edges["a"][0], match.edges["b"][0])


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


batched_matmul = Rewrite(
    "batched_matmul",
    Op(frozenset({_ATEN.matmul.default}), (Arg("a"), Arg("b")), when=all_of(float32, _same_batch)),
    _batched,
)
"""Products of float32 tensors of equal rank, 3 or more, and equal leading sizes."""
