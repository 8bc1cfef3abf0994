"""mean(x, d)  =  x · [1/n, …, 1/n],  sum(x, d)  =  x · [1, …, 1],  and what is made of them.

    var(x, d)      = mean((x - mean(x, d))², d) · n/(n - correction)
    std(x, d)      = √var(x, d)
    norm(x, 2, d)  = √sum(x², d)

XNNPACK averages over height and width only; a product with a vector it has. A reduction over another dimension than the
last is permuted there first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import QUANTIZE

_ATEN = torch.ops.aten


def decompose_reductions(module: GraphModule) -> int:
    """Rewrite reductions of float32 tensors over one dimension of fixed size; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        x = operand(node, 0) if rule else None
        if rule is None or not isinstance(x, Node) or x.meta["val"].dtype is not torch.float32:
            continue
        dim = _dimension(node, x)
        # an integer pipeline has its own means; see pooling
        if dim is None or any(user.target in QUANTIZE for user in node.users):
            continue
        result = rule(module, node, x, dim)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            count += 1
    return count


def _dimension(node: Node, x: Node) -> int | None:
    dims, shape = operand(node, "dim"), shape_of(x)
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple) or len(dims) != 1 or not isinstance(dims[0], int) or len(shape) < 2:
        return None
    dim = dims[0] % len(shape)
    return dim if isinstance(shape[dim], int) and operand(node, "dtype") is None else None


def reduced(module: GraphModule, node: Node, x: Node, dim: int, weight: float) -> Node:
    """``weight`` times the sum over ``dim``, which keeps size 1."""
    rank, size = len(shape_of(x)), shape_of(x)[dim]
    assert isinstance(size, int)
    row = emit_constant(module, node, "reduction", torch.full((1, size), weight))
    order = [*(d for d in range(rank) if d != dim), dim]
    if dim == rank - 1:
        return emit(node, _ATEN.linear.default, x, row)
    total = emit(node, _ATEN.linear.default, emit(node, _ATEN.permute.default, x, order), row)
    return emit(node, _ATEN.permute.default, total, [order.index(d) for d in range(rank)])


def _squeezed(node: Node, x: Node, dim: int) -> Node:
    return x if operand(node, "keepdim") else emit(node, _ATEN.squeeze.dims, x, [dim])


def _mean(module: GraphModule, node: Node, x: Node, dim: int) -> Node:
    return _squeezed(node, reduced(module, node, x, dim, 1 / int(shape_of(x)[dim])), dim)


def _sum(module: GraphModule, node: Node, x: Node, dim: int) -> Node:
    return _squeezed(node, reduced(module, node, x, dim, 1.0), dim)


def _variance(module: GraphModule, node: Node, x: Node, dim: int) -> Node | None:
    correction = operand(node, "correction")
    if node.target in (_ATEN.var.dim, _ATEN.std.dim):
        correction = 1 if operand(node, "unbiased") else 0
    size, correction = int(shape_of(x)[dim]), 1 if correction is None else correction
    if size <= correction:
        return None
    centred = emit(node, _ATEN.sub.Tensor, x, reduced(module, node, x, dim, 1 / size))
    squares = emit(node, _ATEN.mul.Tensor, centred, centred)
    spread = reduced(module, node, squares, dim, 1 / (size - correction))
    if node.target in (_ATEN.std.correction, _ATEN.std.dim):
        spread = emit(node, _ATEN.sqrt.default, spread)
    return _squeezed(node, spread, dim)


def _norm(module: GraphModule, node: Node, x: Node, dim: int) -> Node | None:
    if operand(node, "ord") not in (None, 2):
        return None
    total = reduced(module, node, emit(node, _ATEN.mul.Tensor, x, x), dim, 1.0)
    return _squeezed(node, emit(node, _ATEN.sqrt.default, total), dim)


_RULES: Mapping[Any, Callable[[GraphModule, Node, Node, int], Node | None]] = {
    _ATEN.mean.dim: _mean,
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.var.correction: _variance,
    _ATEN.var.dim: _variance,
    _ATEN.std.correction: _variance,
    _ATEN.std.dim: _variance,
    _ATEN.linalg_vector_norm.default: _norm,
}
