"""Additions that Inductor fuses into an int8 kernel, and those it must not. Each rewrite keeps the eager result.

A residual addition behind an int8 linear or convolution becomes a part of that kernel, which adds into the memory
of the other operand. That is sound where the other operand is a buffer of the program that nothing reads any more.
It is not where the operand is an input (the caller's tensor would change), a constant (the second call would see
what the first one wrote), or memory that a view still shows to a later op; and Inductor does not ask.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.weights import weight_of
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import replace
from quant2e.graph.effects import aliases
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_ADDITIONS = {
    aten.add.Tensor: (aten.mul.Tensor, aten.sub.Tensor),
    aten.add_.Tensor: (aten.mul_.Tensor, aten.sub_.Tensor),
}
_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})
_LEFT_OUT = frozenset({aten._to_copy.default, aten.clone.default})
"""Copies that Inductor leaves out in some cases: their result is then their operand's memory."""


def idle_dropouts(gm: GraphModule) -> int:
    """``dropout(x)``, not training => ``x``: the patterns do not look through it for what is added behind it."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target in _DROPOUTS and operands(node)["train"] is False and isinstance(node.args[0], Node):
            replace(node, node.args[0])
            count += 1
    return count


def plain_additions(gm: GraphModule) -> int:
    """``add(x, y, alpha=k)`` => ``add(x, y * k)`` and ``add(x, x)`` => ``x * 2``.

    The patterns do not look at ``alpha``, and fail on equal operands.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in _ADDITIONS or not isinstance(node.args[1], Node):
            continue
        alpha = operands(node)["alpha"]
        if node.args[0] is node.args[1]:
            node.target, node.args, node.kwargs = _ADDITIONS[node.target][0], (node.args[0], 1 + alpha), {}
        elif alpha != 1:
            with gm.graph.inserting_before(node):
                scaled = call(gm, node, aten.mul.Tensor, node.args[1], alpha)
            node.args, node.kwargs = (node.args[0], scaled), {}
        else:
            continue
        count += 1
    return count


def separate_additions(gm: GraphModule) -> int:
    """``add(op, y)`` => ``sub(op, -y)`` where ``op`` may become an int8 kernel and ``y`` is not free to write to."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in _ADDITIONS or not isinstance(node.args[1], Node):
            continue
        first, second = node.args
        if not (_free(first) if weight_of(_origin(second)) else True) or not (
            _free(second) if weight_of(_origin(first)) else True
        ):
            with gm.graph.inserting_before(node):
                negated = call(gm, node, aten.neg.default, second)
            node.target, node.args = _ADDITIONS[node.target][1], (first, negated)
            count += 1
    return count


def _aliases(node: Node) -> bool:
    """Whether a call may return the memory of its first operand."""
    return node.target in _LEFT_OUT or bool(aliases(node))


def _origin(node: Node) -> Node:
    """The call that computed the numbers a node holds, through views and ops that may be left out."""
    while _aliases(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _free(node: Node) -> bool:
    """Whether a tensor is a buffer of the program that nobody else looks at through a view."""
    if node.op != "call_function" or _aliases(node) or any(map(_aliases, node.users)):
        return False
    # Where the sum is quantized again, it is added into the integers.
    behind = node.args[0] if node.target is qd.dequantize_per_tensor.default else None
    return _free(behind) if isinstance(behind, Node) else True
