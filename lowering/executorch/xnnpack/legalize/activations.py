"""Activations that XNNPACK has no kernel for, or a kernel that computes another function, in terms of its kernels.

hardsigmoid(x) = clamp(x + 3, 0, 6) / 6
gelu(x, "tanh") = x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))     XNNPACK's gelu is the exact one
prelu(x, w)    = relu(x) - w·relu(-x)
elu(x, α)      = relu(x) + α·(exp(-relu(-x)) - 1)
softplus(x)    = relu(x) + log(1 + exp(-|x|))
mish(x)        = x·tanh(softplus(x))
softmax(x, d)  = softmax over the last dimension, between two permutations
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_number
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten


def decompose_activations(module: GraphModule) -> int:
    """Rewrite activations of float32 tensors; returns how many."""
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


def _hardsigmoid(module: GraphModule, node: Node, x: Node) -> Node:
    shifted = emit(node, _ATEN.add.Tensor, x, emit_number(module, node, 3.0))
    return emit(
        node, _ATEN.div.Tensor, emit(node, _ATEN.hardtanh.default, shifted, 0.0, 6.0), emit_number(module, node, 6.0)
    )


def _gelu(module: GraphModule, node: Node, x: Node) -> Node | None:
    if operand(node, "approximate") != "tanh":
        return None
    cube = emit(node, _ATEN.mul.Tensor, emit(node, _ATEN.mul.Tensor, x, x), x)
    cube = emit(node, _ATEN.mul.Tensor, cube, emit_number(module, node, 0.044715))
    inner = emit(
        node, _ATEN.mul.Tensor, emit(node, _ATEN.add.Tensor, x, cube), emit_number(module, node, math.sqrt(2 / math.pi))
    )
    gate = emit(node, _ATEN.add.Tensor, emit(node, _ATEN.tanh.default, inner), emit_number(module, node, 1.0))
    return emit(node, _ATEN.mul.Tensor, emit(node, _ATEN.mul.Tensor, x, emit_number(module, node, 0.5)), gate)


def _prelu(_: GraphModule, node: Node, x: Node) -> Node | None:
    weight, rank = operand(node, 1), len(shape_of(x))
    if not isinstance(weight, Node) or rank < 2:
        return None
    slopes = emit(node, _ATEN.reshape.default, weight, [-1, *[1] * (rank - 2)])
    below = emit(node, _ATEN.mul.Tensor, slopes, _below(node, x))
    return emit(node, _ATEN.sub.Tensor, emit(node, _ATEN.relu.default, x), below)


def _below(node: Node, x: Node) -> Node:
    return emit(node, _ATEN.relu.default, emit(node, _ATEN.neg.default, x))


def _elu(module: GraphModule, node: Node, x: Node) -> Node | None:
    alpha, scale, input_scale = (operand(node, name) for name in ("alpha", "scale", "input_scale"))
    if scale != 1 or input_scale != 1:
        return None
    fallen = emit(node, _ATEN.exp.default, emit(node, _ATEN.neg.default, _below(node, x)))
    fallen = emit(node, _ATEN.sub.Tensor, fallen, emit_number(module, node, 1.0))
    if alpha != 1:
        fallen = emit(node, _ATEN.mul.Tensor, fallen, emit_number(module, node, float(alpha)))
    return emit(node, _ATEN.add.Tensor, emit(node, _ATEN.relu.default, x), fallen)


def _softplus(module: GraphModule, node: Node, x: Node) -> Node | None:
    # beyond the threshold torch returns x itself; at 20 and above the two differ by less than the last bit
    if operand(node, "beta") not in (None, 1) or (operand(node, "threshold") or 20) < 20:
        return None
    decay = emit(node, _ATEN.exp.default, emit(node, _ATEN.neg.default, emit(node, _ATEN.abs.default, x)))
    tail = emit(node, _ATEN.log.default, emit(node, _ATEN.add.Tensor, decay, emit_number(module, node, 1.0)))
    return emit(node, _ATEN.add.Tensor, emit(node, _ATEN.relu.default, x), tail)


def _mish(module: GraphModule, node: Node, x: Node) -> Node | None:
    gate = _softplus(module, node, x)
    return emit(node, _ATEN.mul.Tensor, x, emit(node, _ATEN.tanh.default, gate)) if gate is not None else None


def _softmax(_: GraphModule, node: Node, x: Node) -> Node | None:
    rank, dim = len(shape_of(x)), operand(node, 1)
    if rank == 0 or not isinstance(dim, int) or dim % rank == rank - 1 or operand(node, "dtype") is not None:
        return None
    order = list(range(rank))
    order[dim], order[-1] = order[-1], order[dim]
    inner = emit(node, _ATEN.softmax.int, emit(node, _ATEN.permute.default, x, order), -1)
    return emit(node, _ATEN.permute.default, inner, order)


_RULES: Mapping[Any, Callable[[GraphModule, Node, Node], Node | None]] = {
    _ATEN.hardsigmoid.default: _hardsigmoid,
    _ATEN.gelu.default: _gelu,
    _ATEN.prelu.default: _prelu,
    _ATEN.elu.default: _elu,
    _ATEN.softplus.default: _softplus,
    _ATEN.mish.default: _mish,
    _ATEN.softmax.int: _softmax,
}
