"""layer_norm(x)  =  (x - m) · rsqrt(v + eps) · w + b,  with m and v as products with a vector of 1/n.

    rms_norm(x)       =  x · rsqrt(mean(x²) + eps) · w
    group_norm(x, g)  =  layer_norm of x seen as [batch, g, rest], then · w + b per channel

XNNPACK has none of them and no mean over one dimension; it has everything on the right. A model whose blocks are
joined by normalizations becomes one delegate instead of a pair per block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.reductions import reduced
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_number
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten


def decompose_normalizations(module: GraphModule) -> int:
    """Rewrite normalizations of float32 tensors over dimensions of fixed size; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        x = operand(node, 0) if rule else None
        if rule is None or not isinstance(x, Node) or x.meta["val"].dtype is not torch.float32:
            continue
        result = rule(module, node, x)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            count += 1
    return count


def _layer_norm(module: GraphModule, node: Node, x: Node) -> Node | None:
    rows = _flat_rows(node, x, operand(node, "normalized_shape"))
    if rows is None:
        return None
    flat, restored = rows
    return _scaled(node, restored(_normalised(module, node, flat, operand(node, "eps"))))


def _rms_norm(module: GraphModule, node: Node, x: Node) -> Node | None:
    rows = _flat_rows(node, x, operand(node, "normalized_shape"))
    if rows is None:
        return None
    flat, restored = rows
    eps = operand(node, "eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    squares = emit(node, _ATEN.mul.Tensor, flat, flat)
    size = int(shape_of(flat)[-1])
    spread = _spread(module, node, reduced(module, node, squares, len(shape_of(flat)) - 1, 1 / size), eps)
    return _scaled(node, restored(emit(node, _ATEN.mul.Tensor, flat, spread)))


def _group_norm(module: GraphModule, node: Node, x: Node) -> Node | None:
    return _by_channel(module, node, x, operand(node, "num_groups"))


def _instance_norm(module: GraphModule, node: Node, x: Node) -> Node | None:
    if not operand(node, "use_input_stats"):
        return None
    return _by_channel(module, node, x, int(shape_of(x)[1]))


def _by_channel(module: GraphModule, node: Node, x: Node, groups: int) -> Node | None:
    shape = shape_of(x)
    if len(shape) < 3 or not all(isinstance(size, int) for size in shape[1:]):
        return None
    rest = [int(size) for size in shape[1:]]
    flat = emit(node, _ATEN.reshape.default, x, [-1, groups, math.prod(rest) // groups])
    result = emit(node, _ATEN.reshape.default, _normalised(module, node, flat, operand(node, "eps")), [-1, *rest])
    return _scaled(node, result, [-1, *[1] * (len(rest) - 1)])


def _flat_rows(node: Node, x: Node, sizes: Sequence[int] | None) -> tuple[Node, Callable[[Node], Node]] | None:
    """``x`` with the normalized dimensions as one, and the way back; None where a size is not fixed."""
    shape = shape_of(x)
    if not sizes or len(shape) < 2 or not all(isinstance(size, int) for size in shape[len(shape) - len(sizes) :]):
        return None
    if len(sizes) == 1:
        return x, lambda rows: rows
    lead = [size if isinstance(size, int) else -1 for size in shape[: len(shape) - len(sizes)]]
    if lead.count(-1) > 1:
        return None
    flat = emit(node, _ATEN.reshape.default, x, [*(lead or [1]), math.prod(sizes)])
    return flat, lambda rows: emit(node, _ATEN.reshape.default, rows, [*lead, *sizes])


def _normalised(module: GraphModule, node: Node, x: Node, eps: float) -> Node:
    last, size = len(shape_of(x)) - 1, int(shape_of(x)[-1])
    centred = emit(node, _ATEN.sub.Tensor, x, reduced(module, node, x, last, 1 / size))
    variance = reduced(module, node, emit(node, _ATEN.mul.Tensor, centred, centred), last, 1 / size)
    return emit(node, _ATEN.mul.Tensor, centred, _spread(module, node, variance, eps))


def _spread(module: GraphModule, node: Node, variance: Node, eps: float) -> Node:
    epsilon = emit_number(module, node, eps)
    return emit(node, _ATEN.rsqrt.default, emit(node, _ATEN.add.Tensor, variance, epsilon))


def _scaled(node: Node, x: Node, shape: list[int] | None = None) -> Node:
    """Times the weight, plus the bias, where there are any; ``shape``: how they lie in ``x``."""
    for target, name in ((_ATEN.mul.Tensor, "weight"), (_ATEN.add.Tensor, "bias")):
        factor = operand(node, name)
        if isinstance(factor, Node):
            factor = emit(node, _ATEN.reshape.default, factor, shape) if shape else factor
            x = emit(node, target, x, factor)
    return x


_RULES: Mapping[Any, Callable[[GraphModule, Node, Node], Node | None]] = {
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.rms_norm.default: _rms_norm,
    _ATEN.group_norm.default: _group_norm,
    _ATEN.instance_norm.default: _instance_norm,
}
