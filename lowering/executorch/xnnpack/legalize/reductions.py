"""Reductions as products.

mean(x, d)  =  x · [1/n, …, 1/n],  sum(x, d)  =  x · [1, …, 1],  and what is made of them.

    var(x, d)         = mean((x - mean(x, d))², d) · n/(n - correction)
    std(x, d)         = √var(x, d)
    norm(x, 2, d)     = √sum(x², d)

    layer_norm(x)     =  (x - m) · rsqrt(v + eps) · w + b,  with m and v as products with a vector of 1/n
    rms_norm(x)       =  x · rsqrt(mean(x²) + eps) · w
    group_norm(x, g)  =  layer_norm of x seen as [batch, g, rest], then · w + b per channel

XNNPACK averages over height and width only; a product with a vector it has. A reduction over another dimension than
the last is permuted there first. It has no normalization either: a model whose blocks are joined by them becomes one
delegate instead of a pair per block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import all_of, argument_is, dimensions, fixed, float32, unary
from quant2e.annotation.pattern import Match
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant, emit_number
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import QUANTIZE
from quant2e.passes.rewrite import Rewrite, RewriteTable

_ATEN = torch.ops.aten


# ---------------------------------------------------------------- over one dimension


def _dimension(node: Node) -> int | None:
    """The dimension that a node reduces over; None when it is not one of fixed size."""
    dims, shape = operand(node, "dim"), shape_of(operand(node, 0))
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple) or len(dims) != 1 or not isinstance(dims[0], int) or len(shape) < 2:
        return None
    dim = dims[0] % len(shape)
    return dim if fixed(shape[dim]) else None


def _one_dimension(node: Node) -> bool | str:
    if _dimension(node) is None:
        return f"'{node.name}' does not reduce over one dimension of fixed size"
    # an integer pipeline has its own means; see pooling
    return not any(user.target in QUANTIZE for user in node.users) or f"the result of '{node.name}' is quantized"


def _over(node: Node, x: Node) -> tuple[int, int]:
    """The dimension that a node reduces over, and its size."""
    dim = _dimension(node)
    assert dim is not None, "matched"
    return dim, int(shape_of(x)[dim])


def reduced(gm: GraphModule, node: Node, x: Node, dim: int, weight: float) -> Node:
    """``weight`` times the sum over ``dim``, which keeps size 1."""
    dims, size = dimensions(x), int(shape_of(x)[dim])
    row = emit_constant(gm, node, "reduction", torch.full((1, size), weight))
    order = [*(d for d in range(dims) if d != dim), dim]
    if dim == dims - 1:
        return emit(node, _ATEN.linear.default, x, row)
    total = emit(node, _ATEN.linear.default, emit(node, _ATEN.permute.default, x, order), row)
    return emit(node, _ATEN.permute.default, total, [order.index(d) for d in range(dims)])


def _squeezed(node: Node, x: Node, dim: int) -> Node:
    return x if operand(node, "keepdim") else emit(node, _ATEN.squeeze.dims, x, [dim])


def _mean(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    dim, size = _over(node, x)
    return _squeezed(node, reduced(gm, node, x, dim, 1 / size), dim)


def _sum(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    dim, _ = _over(node, x)
    return _squeezed(node, reduced(gm, node, x, dim, 1.0), dim)


def _correction(node: Node) -> Any:
    if node.target in (_ATEN.var.dim, _ATEN.std.dim):
        return 1 if operand(node, "unbiased") else 0
    correction = operand(node, "correction")
    return 1 if correction is None else correction


def _enough(node: Node) -> bool | str:
    _, size = _over(node, operand(node, 0))
    return size > _correction(node) or f"'{node.name}' corrects {size} values by {_correction(node)}"


def _variance(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    dim, size = _over(node, x)
    centred = emit(node, _ATEN.sub.Tensor, x, reduced(gm, node, x, dim, 1 / size))
    squares = emit(node, _ATEN.mul.Tensor, centred, centred)
    spread = reduced(gm, node, squares, dim, 1 / (size - _correction(node)))
    if node.target in (_ATEN.std.correction, _ATEN.std.dim):
        spread = emit(node, _ATEN.sqrt.default, spread)
    return _squeezed(node, spread, dim)


def _norm(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    dim, _ = _over(node, x)
    total = reduced(gm, node, emit(node, _ATEN.mul.Tensor, x, x), dim, 1.0)
    return _squeezed(node, emit(node, _ATEN.sqrt.default, total), dim)


_REDUCED = all_of(float32, _one_dimension, argument_is("dtype", None))
_SPREADS = (_ATEN.var.correction, _ATEN.var.dim, _ATEN.std.correction, _ATEN.std.dim)

decompose_reductions = RewriteTable(
    "decompose_reductions",
    (
        Rewrite("mean", unary(_ATEN.mean.dim, when=_REDUCED), _mean),
        Rewrite("sum", unary(_ATEN.sum.dim_IntList, when=_REDUCED), _sum),
        Rewrite("variance", unary(*_SPREADS, when=all_of(_REDUCED, _enough)), _variance),
        Rewrite(
            "norm", unary(_ATEN.linalg_vector_norm.default, when=all_of(_REDUCED, argument_is("ord", None, 2))), _norm
        ),
    ),
)
"""Reductions of float32 tensors over one dimension of fixed size."""


# ---------------------------------------------------------------- normalizations


def _rows(node: Node) -> bool | str:
    """Whether the normalized dimensions can be seen as one."""
    shape, sizes = shape_of(operand(node, 0)), operand(node, "normalized_shape")
    lead = shape[: len(shape) - len(sizes)]
    varying = sum(not isinstance(size, int) for size in lead)
    if not sizes or len(shape) < 2 or not fixed(*shape[len(lead) :]) or (len(sizes) > 1 and varying > 1):
        return f"'{node.name}' does not normalize rows of fixed size"
    return True


def _flat_rows(node: Node, x: Node) -> tuple[Node, Callable[[Node], Node]]:
    """``x`` with the normalized dimensions as one, and the way back."""
    shape, sizes = shape_of(x), operand(node, "normalized_shape")
    if len(sizes) == 1:
        return x, lambda rows: rows
    lead = [size if isinstance(size, int) else -1 for size in shape[: len(shape) - len(sizes)]]
    flat = emit(node, _ATEN.reshape.default, x, [*(lead or [1]), math.prod(sizes)])
    return flat, lambda rows: emit(node, _ATEN.reshape.default, rows, [*lead, *sizes])


def _layer_norm(gm: GraphModule, match: Match) -> Node:
    node = match.root
    flat, restored = _flat_rows(node, match.edges["x"][0])
    return _scaled(node, restored(_normalised(gm, node, flat)))


def _rms_norm(gm: GraphModule, match: Match) -> Node:
    node = match.root
    flat, restored = _flat_rows(node, match.edges["x"][0])
    eps = operand(node, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    squares = emit(node, _ATEN.mul.Tensor, flat, flat)
    mean = reduced(gm, node, squares, dimensions(flat) - 1, 1 / int(shape_of(flat)[-1]))
    return _scaled(node, restored(emit(node, _ATEN.mul.Tensor, flat, _spread(gm, node, mean, eps))))


def _channels(node: Node) -> bool | str:
    shape = shape_of(operand(node, 0))
    return (len(shape) >= 3 and fixed(*shape[1:])) or f"the operand of '{node.name}' is not an image of fixed size"


def _by_channel(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    rest = [int(size) for size in shape_of(x)[1:]]
    groups = operand(node, "num_groups") if node.target is _ATEN.group_norm.default else rest[0]
    flat = emit(node, _ATEN.reshape.default, x, [-1, groups, math.prod(rest) // groups])
    result = emit(node, _ATEN.reshape.default, _normalised(gm, node, flat), [-1, *rest])
    return _scaled(node, result, [-1, *[1] * (len(rest) - 1)])


def _normalised(gm: GraphModule, node: Node, x: Node) -> Node:
    last, size = dimensions(x) - 1, int(shape_of(x)[-1])
    centred = emit(node, _ATEN.sub.Tensor, x, reduced(gm, node, x, last, 1 / size))
    variance = reduced(gm, node, emit(node, _ATEN.mul.Tensor, centred, centred), last, 1 / size)
    return emit(node, _ATEN.mul.Tensor, centred, _spread(gm, node, variance, operand(node, "eps")))


def _spread(gm: GraphModule, node: Node, variance: Node, eps: float) -> Node:
    epsilon = emit_number(gm, node, eps)
    return emit(node, _ATEN.rsqrt.default, emit(node, _ATEN.add.Tensor, variance, epsilon))


def _scaled(node: Node, x: Node, shape: list[int] | None = None) -> Node:
    """Times the weight, plus the bias, where there are any; ``shape``: how they lie in ``x``."""
    for target, name in ((_ATEN.mul.Tensor, "weight"), (_ATEN.add.Tensor, "bias")):
        factor = operand(node, name)
        if isinstance(factor, Node):
            factor = emit(node, _ATEN.reshape.default, factor, shape) if shape else factor
            x = emit(node, target, x, factor)
    return x


_BY_ROW, _BY_CHANNEL = all_of(float32, _rows), all_of(float32, _channels)

decompose_normalizations = RewriteTable(
    "decompose_normalizations",
    (
        Rewrite("layer_norm", unary(_ATEN.layer_norm.default, when=_BY_ROW), _layer_norm),
        Rewrite("rms_norm", unary(_ATEN.rms_norm.default, when=_BY_ROW), _rms_norm),
        Rewrite("group_norm", unary(_ATEN.group_norm.default, when=_BY_CHANNEL), _by_channel),
        Rewrite(
            "instance_norm",
            unary(_ATEN.instance_norm.default, when=all_of(_BY_CHANNEL, argument_is("use_input_stats", True))),
            _by_channel,
        ),
    ),
)
"""Normalizations of float32 tensors over dimensions of fixed size."""
