"""Products of activations → bmm.

    matmul(a, b)           =  view(bmm(view(a), view(b)))      for equal leading dimensions, and for matrices
    mm(a, b)               =  view(bmm(view(a), view(b)))
    linear(a, b, c)        =  view(bmm(view(a), view(bᵀ))) + c
    addmm(c, a, b)         =  view(bmm(view(a), view(b))) + c

    linear(x, w, c)        =  view(linear(view(x), w, c))      for x in more dimensions than XNNPACK holds

where ``b`` is no constant. Torch's own decomposition of matmul expands both operands to a common batch first, by an op
that no delegate takes even where it does nothing. And the delegate takes a product of two matrices for a linear whose
weight is in the file, and computes zeros where it is not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import MOST_DIMENSIONS, all_of, float32
from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, replace
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


def batched_matrices(module: GraphModule) -> int:
    """Rewrite products with a matrix that is no constant; returns how many."""
    constants = Constants(module.graph)
    count = 0
    for node in list(module.graph.nodes):
        names = _MATRICES.get(node.target)
        if names is None or float32(node) is not True:
            continue
        a, b = (operand(node, name) for name in names)
        if b in constants or len(shape_of(b)) != 2 or len(shape_of(a)) < 2:
            continue
        bias = operand(node, _BIAS.get(node.target, ""))
        if any(operand(node, factor) not in (None, 1) for factor in ("alpha", "beta")):
            continue
        if node.target is _ATEN.linear.default:
            b = emit(node, _ATEN.transpose.int, b, 0, 1)
        result = _rows_times_matrix(node, a, b)
        replace(node, result if bias is None else emit(node, _ATEN.add.Tensor, result, bias))
        count += 1
    return count


def rows_of_linear(module: GraphModule) -> int:
    """Let linears read matrices where their input has too many dimensions; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        x = operand(node, "input") if node.target is _ATEN.linear.default else None
        if x is None or len(shape_of(x)) <= MOST_DIMENSIONS:
            continue
        last = len(shape_of(x)) - 1
        rows = _reshaped(node, x, [(x, *range(last)), (x, last)])
        product = emit(node, node.target, rows, *node.args[1:])
        replace(node, _reshaped(node, product, [*((x, dim) for dim in range(last)), (product, 1)]))
        count += 1
    return count


_MATRICES: dict[Any, tuple[str, str]] = {
    _ATEN.matmul.default: ("self", "other"),
    _ATEN.mm.default: ("self", "mat2"),
    _ATEN.linear.default: ("input", "weight"),
    _ATEN.addmm.default: ("mat1", "mat2"),
}
"""Op → names of its operands: rows, and a matrix."""
_BIAS: dict[Any, str] = {_ATEN.linear.default: "bias", _ATEN.addmm.default: "self"}


def _rows_times_matrix(like: Node, a: Node, b: Node) -> Node:
    """Product of rows, in any number of dimensions, with one matrix, through a batch of one."""
    last = len(shape_of(a)) - 1
    left = _reshaped(like, a, [(a,), (a, *range(last)), (a, last)])
    right = _reshaped(like, b, [(b,), (b, 0), (b, 1)])
    result = emit(like, _ATEN.bmm.default, left, right)
    return _reshaped(like, result, [*((a, dim) for dim in range(last)), (b, 1)])
