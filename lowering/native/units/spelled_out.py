"""What a graph spells out: activations made of several ops become one, and ops that do nothing are left out.

0.5 * x * (1 + tanh(√(2/π) * (x + 0.044715 * x³)))        =>        gelu(x, approximate="tanh")
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.data_movement import When, movement
from quant2e.graph.dataflow import operand
from quant2e.passes.dead_code import remove_dead_code

aten = torch.ops.aten

_CLOSE = 1e-6
"""Relative: constants are float32's nearest to what they stand for, or written with seven digits."""


def read_spelled_out(gm: GraphModule) -> None:
    """Put one op in the place of several where they are an activation, and none where they do nothing."""
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default and _holds(node):
            gm.graph.erase_node(node)
        elif _keeps(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.mul.Tensor and (x := _gelu(node)) is not None:
            node.target, node.args, node.kwargs = aten.gelu.default, (x,), {"approximate": "tanh"}
    remove_dead_code(gm)


def _holds(node: Node) -> bool:
    """Whether an assertion about a tensor's dtype and device is true, as far as the graph knows the tensor."""
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(value, Tensor):
        return False
    dtype, device = operand(node, "dtype"), operand(node, "device")
    strided = operand(node, "layout") in (None, torch.strided) and value.layout is torch.strided
    unsized = operand(node, "size") is None and operand(node, "stride") is None
    return strided and unsized and dtype in (None, value.dtype) and device in (None, value.device)


def _keeps(node: Node) -> bool:
    """Whether a conversion changes neither dtype nor device."""
    row = movement(node.target)
    if row is None or row.when is not When.SAME_DTYPE or not isinstance(node.args[0], Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dtype is after.dtype and before.device == after.device and before.stride() == after.stride()


def _gelu(node: Node) -> Node | None:
    """What the tanh form of gelu is computed of, where ``node`` is its last product; None elsewhere."""
    for half, rest in _both(node):
        x = _times(half, 0.5)
        tanh = _plus(rest, 1.0)
        if x is None or tanh is None or tanh.target is not aten.tanh.default:
            continue
        inner = _times(tanh.args[0], math.sqrt(2 / math.pi))
        if inner is None or inner.target is not aten.add.Tensor or operand(inner, "alpha") != 1:
            continue
        for one, other in _both(inner):
            cube = _times(other, 0.044715)
            if one is x and cube is not None and cube.target is aten.pow.Tensor_Scalar and cube.args == (x, 3.0):
                return x
    return None


def _both(node: Node) -> Sequence[tuple[Node, Node]]:
    """The operands of a node in both orders; none where one of them is a number."""
    one, other = node.args[:2]
    return [(one, other), (other, one)] if isinstance(one, Node) and isinstance(other, Node) else []


def _times(node: object, number: float) -> Node | None:
    return _with_number(node, aten.mul.Tensor, number)


def _plus(node: object, number: float) -> Node | None:
    return _with_number(node, aten.add.Tensor, number)


def _with_number(node: object, target: object, number: float) -> Node | None:
    """The operand of ``node`` where it is ``target`` of a tensor and ``number``."""
    if not isinstance(node, Node) or node.target is not target or len(node.args) != 2 or node.kwargs:
        return None
    source, given = node.args
    near = isinstance(given, int | float) and math.isclose(given, number, rel_tol=_CLOSE)
    return source if near and isinstance(source, Node) else None
