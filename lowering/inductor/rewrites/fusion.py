"""Fusion: what an int8 kernel computes behind a product, so that its result is written once, as integers.

    quantize(f(op(dq(x), dq(w)) + dq(y)))        =>        one kernel

A kernel knows some activations ``f`` (`kernels.post_ops`). In three dimensions it knows none; relu is what quantizing
to unsigned integers does anyway. A convolution in one or two dimensions adds integers ``y`` where the sum is quantized
again (`kernels.convolution_sum`); any other sum is computed by the loop of what reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.inductor.kernels.post_ops import LINEAR_ONLY, NONE, PostOp, post_op_of
from lowering.inductor.kernels.transposed import is_transposed
from lowering.inductor.rewrites.weights import dequantized, weight_of
from quant2e.annotation.pattern import Arg, Op
from quant2e.graph.dataflow import operand, operands
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import qd
from quant2e.passes.rewrite import Rewrite

aten = torch.ops.aten

_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})
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

    ``added``: the dequantize op of the integers that are added; None without. ``quantize``: None where the result is
    float.
    """

    nodes: tuple[Node, ...]
    post_op: PostOp = NONE
    quantize: Node | None = None
    added: Node | None = None

    def output(self, dtype: torch.dtype) -> tuple[float, int, torch.dtype]:
        """Scale, zero point and dtype of the result; ``dtype``: of a float one."""
        if self.quantize is None:
            return 1.0, 0, dtype
        args = operands(self.quantize)
        return args["scale"], args["zero_point"], torch.uint8


def fused_with(node: Node) -> Fused:
    """The addition, the activation and the quantize op behind a product that its kernel computes as well."""
    return _with_addition(node) or _without_addition(node)


def _without_addition(node: Node) -> Fused:
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


def _with_addition(node: Node) -> Fused | None:
    """``quantize(relu(conv + dq(y)))``, with or without the relu; None where it is anything else."""
    total = next(iter(node.users)) if len(node.users) == 1 else None
    if total is None or total.target not in _SUMS or operand(total, "alpha") != 1:
        return None
    if node.target is aten.linear.default or is_transposed(node) or spatial_arguments(node) > 2:
        return None
    first, second = operand(total, 0), operand(total, 1)
    added = second if first is node else first
    if not isinstance(added, Node) or not _is_of_bytes(added) or not _are_alike(node, added):
        return None
    nodes: tuple[Node, ...] = (node, total)
    relu, post_op = _only_reader(total), NONE
    if relu is not None and (found := post_op_of(relu)) is not None and found.name == "relu":
        nodes, post_op = (node, total, relu), found
    quantize = _quantize_behind(nodes[-1])
    return None if quantize is None else Fused((*nodes, quantize), post_op, quantize, added)


def _is_of_bytes(node: Node) -> bool:
    if node.target is not qd.dequantize_per_tensor.default:
        return False
    args = operands(node)
    return args["dtype"] is torch.uint8 and args["out_dtype"] in (None, torch.float32)


def _are_alike(node: Node, added: Node) -> bool:
    """Whether what is added has as many numbers as the result of a convolution, in each dimension."""
    value, other = node_tensor(node), node_tensor(added)
    if value is None or other is None or value.dtype is not torch.float32 or value.dim() != other.dim():
        return False
    return all(str(a) == str(b) for a, b in zip(value.shape, other.shape, strict=True))


def spatial_arguments(node: Node) -> int:
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
    return node.target is aten.linear.default or (spatial_arguments(node) < 3 and post_op.name not in LINEAR_ONLY)
