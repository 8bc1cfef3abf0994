"""Fusion: what an int8 kernel computes behind a product, so that its result is written once, as integers.

    quantize(f(op(dq(x), dq(w))))        =>        one kernel

A kernel knows some activations ``f`` (`kernels.post_ops`). In three dimensions it knows none; relu is what quantizing
to unsigned integers does anyway. A sum behind a product is computed by the loop of what reads it: the kernels would add
into the memory of the other operand, which is sound for a buffer that nothing else reads, and not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.inductor.kernels.post_ops import LINEAR_ONLY, NONE, PostOp, post_op_of
from lowering.inductor.rewrites.weights import dequantized, weight_of
from quant2e.annotation.pattern import Arg, Op
from quant2e.graph.dataflow import operand, operands
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import qd
from quant2e.passes.rewrite import Rewrite

aten = torch.ops.aten

_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})


def _is_idle(node: Node) -> bool | str:
    return operand(node, "train") is False or f"'{node.name}' is training"


idle_dropouts = Rewrite(
    "idle_dropouts", Op(_DROPOUTS, (Arg("x"),), when=_is_idle), lambda _, match: match.edges["x"][0]
)
"""``dropout(x)``, not training => ``x``: a kernel does not look through it for what stands behind."""


@dataclass(frozen=True, slots=True)
class Fused:
    """A product with what its kernel computes as well, in order: the kernel returns what the last of ``nodes`` does.

    ``quantize``: None where the result is float.
    """

    nodes: tuple[Node, ...]
    post_op: PostOp = NONE
    quantize: Node | None = None

    def output(self, dtype: torch.dtype) -> tuple[float, int, torch.dtype]:
        """Scale, zero point and dtype of the result; ``dtype``: of a float one."""
        if self.quantize is None:
            return 1.0, 0, dtype
        args = operands(self.quantize)
        return args["scale"], args["zero_point"], torch.uint8


def fused_with(node: Node) -> Fused:
    """The activation and the quantize op behind a product that its kernel computes as well."""
    nodes: tuple[Node, ...] = (node,)
    post_op = NONE
    activation = _only_reader(node)
    found = None if activation is None else post_op_of(activation)
    if activation is not None and found is not None and _takes(node, found):
        nodes, post_op = (node, activation), found
    elif activation is not None and found is not None and found.name == "relu" and _clamps_at_zero(activation):
        nodes = (node, activation)
    quantize = _quantize_behind(nodes[-1])
    return Fused(nodes if quantize is None else (*nodes, quantize), post_op, quantize)


def spatial(node: Node) -> int:
    """Dimensions of the image that a convolution reads, by its weight, which is dequantized."""
    weight = dequantized(weight_of(node))
    value = None if weight is None else node_tensor(operands(weight)["input"])
    assert value is not None, "a constant weight"
    return value.dim() - 2


def _clamps_at_zero(relu: Node) -> bool:
    """Whether quantization does what relu does: no integer stands for a negative number."""
    quantize = _quantize_behind(relu)
    return quantize is not None and operands(quantize)["zero_point"] == 0


def _quantize_behind(node: Node) -> Node | None:
    """The quantize op that alone reads a result, to the unsigned integers that kernels write."""
    user = _only_reader(node)
    if user is None or user.target is not qd.quantize_per_tensor.default:
        return None
    return user if operands(user)["dtype"] is torch.uint8 else None


def _only_reader(node: Node) -> Node | None:
    """The one op that reads a result, as its first operand."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.args and user.args[0] is node else None


def _takes(node: Node, post_op: PostOp) -> bool:
    return node.target is aten.linear.default or (spatial(node) < 3 and post_op.name not in LINEAR_ONLY)
