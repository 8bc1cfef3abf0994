"""Scalar operands as tensors.

x + 3  =  x + c,    3 - x  =  c - x      with a buffer ``c`` that holds the number.

An operand that is a tensor can be quantized. The node keeps its name and its metadata; only what it calls changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit_constant
from quant2e.passes.rewrite import Rewrite
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

aten = torch.ops.aten

_TENSOR_FORM: dict[Any, Any] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), aten.add.Tensor),
    **dict.fromkeys((aten.add_.Tensor, aten.add_.Scalar), aten.add_.Tensor),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor), aten.sub.Tensor),
    **dict.fromkeys((aten.sub_.Tensor, aten.sub_.Scalar), aten.sub_.Tensor),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), aten.mul.Tensor),
    **dict.fromkeys((aten.mul_.Tensor, aten.mul_.Scalar), aten.mul_.Tensor),
}
WITH_NUMBERS = frozenset(_TENSOR_FORM)
"""Sums, differences and products, whose second operand may be a number."""

_REVERSED = (aten.rsub.Scalar, aten.rsub.Tensor)


def scalars_as_tensors(wanted: Callable[[Node], bool]) -> Rewrite:
    """Sums, differences and products with a number, which ``wanted`` answers True for, with a tensor instead of it."""
    arithmetic = Op(WITH_NUMBERS, (Arg("x"),), when=_has_a_number, aliased=True)
    return Rewrite("scalars_as_tensors", arithmetic, _with_tensor, lambda m: wanted(m.root) or "it is not wanted")


def _has_a_number(node: Node) -> bool | str:
    return _number(node) is not None or f"'{node.name}' does not combine a float tensor with a number alone"


def _with_tensor(gm: GraphModule, match: Match) -> Node:
    node, x, number = match.root, match.edges["x"][0], _number(match.root)
    assert number is not None, "matched"
    other = emit_constant(gm, node, f"{node.name}_number", torch.tensor(number, dtype=node.meta["val"].dtype))
    node.meta[ORIGINAL_TARGET] = node.target
    target = _TENSOR_FORM[node.target]
    node.args = (other, x) if node.target in _REVERSED else (x, other)
    node.target, node.kwargs = target, {}
    return node


def _number(node: Node) -> float | None:
    """The number that a float tensor is combined with; None where there is none, or a factor in front of it."""
    number, value = operand(node, 1), node.meta.get("val")
    if isinstance(number, bool) or not isinstance(number, int | float) or not isinstance(operand(node, 0), Node):
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or operand(node, "alpha") not in (None, 1):
        return None
    x = operand(node, 0).meta.get("val")
    return float(number) if isinstance(x, Tensor) and x.dtype == value.dtype else None
