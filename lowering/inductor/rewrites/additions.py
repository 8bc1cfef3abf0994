"""Additions that Inductor fuses into an int8 kernel, and those it must not.

A residual addition behind an int8 linear or convolution becomes a part of that kernel, which adds into the memory
of the other operand. That is sound where the other operand is a buffer of the program that nothing reads any more.
It is not where the operand is an input (the caller's tensor would change), a constant (the second call would see
what the first one wrote), or memory that a view still shows to a later op; and Inductor does not ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.weights import weight_of
from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.dataflow import operand
from quant2e.graph.effects import aliases
from quant2e.graph.qdq_ops import qd
from quant2e.passes.rewrite import Rewrite, RewriteTable

aten = torch.ops.aten

_ADDITIONS: Mapping[Any, tuple[Any, Any]] = {
    aten.add.Tensor: (aten.mul.Tensor, aten.sub.Tensor),
    aten.add_.Tensor: (aten.mul_.Tensor, aten.sub_.Tensor),
}
_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})
_LEFT_OUT = frozenset({aten._to_copy.default, aten.clone.default})
"""Copies that Inductor leaves out in some cases: their result is then their operand's memory."""


def _is_idle(node: Node) -> bool | str:
    return operand(node, "train") is False or f"'{node.name}' is training"


idle_dropouts = Rewrite(
    "idle_dropouts", Op(_DROPOUTS, (Arg("x"),), when=_is_idle), lambda _, match: match.edges["x"][0]
)
"""``dropout(x)``, not training => ``x``: the patterns do not look through it for what is added behind it."""


def _has_a_factor(node: Node) -> bool | str:
    return operand(node, "alpha") != 1 or f"'{node.name}' is a plain sum"


def _doubled(_: GraphModule, match: Match) -> Node:
    node, alpha = match.root, operand(match.root, "alpha")
    node.target, node.args, node.kwargs = _ADDITIONS[node.target][0], (match.edges["x"][0], 1 + alpha), {}
    return node


def _scaled(gm: GraphModule, match: Match) -> Node:
    node, (x, y) = match.root, (match.edges[name][0] for name in ("x", "y"))
    with gm.graph.inserting_before(node):
        scaled = call(gm, node, aten.mul.Tensor, y, operand(node, "alpha"))
    node.args, node.kwargs = (x, scaled), {}
    return node


_X, _Y, _SUMS = Arg("x"), Arg("y"), frozenset(_ADDITIONS)

plain_additions = RewriteTable(
    "plain_additions",
    (
        Rewrite("doubled", Op(_SUMS, (_X, _X), aliased=True), _doubled),
        Rewrite("scaled", Op(_SUMS, (_X, _Y), when=_has_a_factor, aliased=True), _scaled),
    ),
)
"""``add(x, y, alpha=k)`` => ``add(x, y * k)`` and ``add(x, x)`` => ``x * 2``.

The patterns do not look at ``alpha``, and fail on equal operands.
"""


def _written_by_a_kernel(node: Node) -> bool | str:
    first, second = operand(node, 0), operand(node, 1)
    sound = (_free(first) or not weight_of(_origin(second))) and (_free(second) or not weight_of(_origin(first)))
    return not sound or f"no kernel adds into an operand of '{node.name}' that others see"


def _subtracted(gm: GraphModule, match: Match) -> Node:
    node, (x, y) = match.root, (match.edges[name][0] for name in ("x", "y"))
    with gm.graph.inserting_before(node):
        negated = call(gm, node, aten.neg.default, y)
    node.target, node.args = _ADDITIONS[node.target][1], (x, negated)
    return node


separate_additions = Rewrite(
    "separate_additions",
    Op(_SUMS, (_X, _Y), aliased=True),
    _subtracted,
    lambda match: _written_by_a_kernel(match.root),
)
"""``add(op, y)`` => ``sub(op, -y)`` where ``op`` may become an int8 kernel and ``y`` is not free to write to."""


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
