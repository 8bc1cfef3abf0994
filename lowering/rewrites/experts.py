"""Mixtures of experts in plain ops: counts of tokens, the order by expert, and a product for each expert's rows.

    histc(x, n, low, high)     =  sum(place(x) == 0 … n-1)             place(x) = ⌊(x - low) / (high - low) · n⌋
    argsort(ids)               =  indices of topk(ids · N ± (0 … N-1), N)
    grouped_mm(a, b, ends)     =  Σ_g [row belongs to g] · (a @ b_g)     a row belongs to the first g with row < ends_g

Runtimes for devices have comparisons, products and a topk, but none of the three. The product computes every row with
every expert: right for few experts, and said here because it costs that many times the work.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import Match, Op
from quant2e.graph.dataflow import literal, operand
from quant2e.graph.edit import emit, emit_constant, emit_number
from quant2e.graph.fake_values import node_tensor
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten


def _histc(gm: GraphModule, match: Match) -> Node:
    node = match.root
    bins, low, high = (literal(node, name) for name in ("bins", "min", "max"))
    x = emit(node, _ATEN.flatten.using_ints, operand(node, "self"))
    inside = emit(
        node, _ATEN.logical_and.default, emit(node, _ATEN.ge.Scalar, x, low), emit(node, _ATEN.le.Scalar, x, high)
    )
    share = emit(node, _ATEN.div.Scalar, emit(node, _ATEN.sub.Scalar, x, low), high - low)
    place = emit(node, _ATEN.floor.default, emit(node, _ATEN.mul.Scalar, share, bins))
    place = emit(node, _ATEN.clamp.default, place, None, bins - 1)  # the upper bound belongs to the last bin
    dtype = node.meta["val"].dtype
    numbers = emit_constant(gm, node, "bins", torch.arange(bins, dtype=dtype))
    found = emit(node, _ATEN.eq.Tensor, emit(node, _ATEN.unsqueeze.default, place, 1), numbers)
    found = emit(node, _ATEN.logical_and.default, found, emit(node, _ATEN.unsqueeze.default, inside, 1))
    return emit(node, _ATEN.sum.dim_IntList, emit(node, _ATEN.to.dtype, found, dtype), [0])


def _has_bounds(node: Node) -> bool | str:
    low, high = literal(node, "min"), literal(node, "max")
    return (low is not None and high is not None and low < high) or f"'{node.name}' takes its bounds from the data"


def _argsort(gm: GraphModule, match: Match) -> Node:
    node = match.root
    x, descending = operand(node, "self"), bool(operand(node, "descending"))
    value = x.meta["val"]
    dim = operand(node, "dim") % value.dim()
    size = int(value.shape[dim])
    shape = [1] * value.dim()
    shape[dim] = size
    numbers = emit_constant(gm, node, "places", torch.arange(size).reshape(shape))
    keys = emit(node, _ATEN.mul.Scalar, emit(node, _ATEN.to.dtype, x, torch.int64), size)
    keys = emit(node, _ATEN.sub.Tensor if descending else _ATEN.add.Tensor, keys, numbers)
    return emit(node, operator.getitem, emit(node, _ATEN.topk.default, keys, size, dim, descending, True), 1)


def _sorts_integers(node: Node) -> bool | str:
    value = node_tensor(operand(node, "self"))
    if value is None or value.dim() == 0 or value.is_floating_point() or value.dtype == torch.bool:
        return f"'{node.name}' sorts no integers"
    size = value.shape[operand(node, "dim") % value.dim()]
    return type(size) is int or f"'{node.name}' sorts a number of values that varies"


def _grouped_mm(gm: GraphModule, match: Match) -> Node:
    node = match.root
    a, b, ends = (operand(node, name) for name in ("self", "mat2", "offs"))
    rows, groups = (int(operand_of.meta["val"].shape[0]) for operand_of in (a, b))
    wide = [emit(node, _ATEN.to.dtype, tensor, torch.float32) for tensor in (a, b)]
    each = emit(node, _ATEN.expand.default, emit(node, _ATEN.unsqueeze.default, wide[0], 0), [groups, -1, -1])
    products = emit(node, _ATEN.bmm.default, each, wide[1])
    numbers = emit_constant(gm, node, "rows", torch.arange(rows, dtype=ends.meta["val"].dtype).reshape(-1, 1))
    passed = emit(node, _ATEN.to.dtype, emit(node, _ATEN.ge.Tensor, numbers, ends), torch.int64)
    expert = emit(node, _ATEN.sum.dim_IntList, passed, [1])
    names = emit_constant(gm, node, "experts", torch.arange(groups).reshape(-1, 1))
    own = emit(node, _ATEN.unsqueeze.default, emit(node, _ATEN.eq.Tensor, names, expert), -1)
    kept = emit(node, _ATEN.where.self, own, products, emit_number(gm, node, 0.0))
    total = emit(node, _ATEN.sum.dim_IntList, kept, [0])
    return emit(node, _ATEN.to.dtype, total, node.meta["val"].dtype)


def _rows_of_experts(node: Node) -> bool | str:
    values = [node_tensor(operand(node, name)) for name in ("self", "mat2", "offs")]
    if any(value is None for value in values) or [v.dim() for v in values if v is not None] != [2, 3, 1]:
        return f"'{node.name}' does not multiply the rows of one matrix by one matrix per expert"
    if operand(node, "bias") is not None:
        return f"'{node.name}' has a bias"
    sizes: list[Any] = [size for value in values if value is not None for size in value.shape]
    return all(type(size) is int for size in sizes) or f"'{node.name}' has sizes that vary"


def _named(*names: str) -> frozenset[Any]:
    """The overloads of these names that this torch has."""
    found = (getattr(getattr(_ATEN, name.partition(".")[0], None), name.partition(".")[2], None) for name in names)
    return frozenset(target for target in found if target is not None)


count_by_comparison = Rewrite("count_by_comparison", Op(_named("histc.default"), (), when=_has_bounds), _histc)
order_by_topk = Rewrite(
    "order_by_topk", Op(_named("argsort.default", "argsort.stable"), (), when=_sorts_integers), _argsort
)
product_of_every_expert = Rewrite(
    "product_of_every_expert", Op(_named("_grouped_mm.default"), (), when=_rows_of_experts), _grouped_mm
)

EXPERTS = (count_by_comparison, order_by_topk, product_of_every_expert)
"""What a mixture of experts is made of, for targets that have no such kernels."""
