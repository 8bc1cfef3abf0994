"""x + 3  =  x + tensor(3),  x³ = x·x·x,  1/x = tensor(1)/x.

ExecuTorch makes tensors of numbers too, but integers of integers, and casts them on every call by an op that no
delegate takes. XNNPACK has squares and no other power.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_number

_ATEN = torch.ops.aten
_BINARY: Mapping[Any, Any] = {
    _ATEN.add.Tensor: _ATEN.add.Tensor,
    _ATEN.add.Scalar: _ATEN.add.Tensor,
    _ATEN.sub.Tensor: _ATEN.sub.Tensor,
    _ATEN.sub.Scalar: _ATEN.sub.Tensor,
    _ATEN.mul.Tensor: _ATEN.mul.Tensor,
    _ATEN.mul.Scalar: _ATEN.mul.Tensor,
    _ATEN.div.Tensor: _ATEN.div.Tensor,
    _ATEN.div.Scalar: _ATEN.div.Tensor,
}


def tensor_operands(module: GraphModule) -> int:
    """Rewrite arithmetic of float32 tensors with numbers; returns how many ops."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(x := operand(node, 0), Node) or not _float(node, x):
            continue
        result = _rewritten(module, node, x)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            count += 1
    return count


def _float(node: Node, x: Node) -> bool:
    values = node.meta.get("val"), x.meta.get("val")
    # a number beside a tensor without dimensions may decide on the dtype
    return all(isinstance(v, torch.Tensor) and v.dtype is torch.float32 and v.dim() > 0 for v in values)


def _rewritten(module: GraphModule, node: Node, x: Node) -> Node | None:
    target = node.target
    if target in _BINARY:
        value, alpha = operand(node, 1), operand(node, "alpha")
        if alpha not in (None, 1) or not isinstance(value, int | float):
            return None
        return emit(node, _BINARY[target], x, emit_number(module, node, float(value)))
    if target is _ATEN.rsub.Scalar and operand(node, "alpha") in (None, 1):
        value = operand(node, 1)
        return emit(node, _ATEN.sub.Tensor, emit_number(module, node, float(value)), x)
    if target is _ATEN.reciprocal.default:
        return emit(node, _ATEN.div.Tensor, emit_number(module, node, 1.0), x)
    if target is _ATEN.square.default:
        return emit(node, _ATEN.mul.Tensor, x, x)
    if target is _ATEN.pow.Tensor_Scalar:
        return _power(module, node, x, operand(node, 1))
    return None


def _power(module: GraphModule, node: Node, x: Node, exponent: float) -> Node | None:
    """Powers as torch computes them: x·x, (x·x)·x, the square root and their inverses."""
    if exponent == 2:
        return emit(node, _ATEN.mul.Tensor, x, x)
    if exponent == 3:
        return emit(node, _ATEN.mul.Tensor, emit(node, _ATEN.mul.Tensor, x, x), x)
    if exponent == 0.5:
        return emit(node, _ATEN.sqrt.default, x)
    if exponent == -0.5:
        return emit(node, _ATEN.rsqrt.default, x)
    if exponent == -1:
        return emit(node, _ATEN.div.Tensor, emit_number(module, node, 1.0), x)
    return None
