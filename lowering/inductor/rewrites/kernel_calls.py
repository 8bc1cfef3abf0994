"""Kernel calls: int8 products for which oneDNN has a kernel and Inductor no pattern, as calls of that kernel.

    f(op(dq(x), dq(w)))        =>        dq(kernel(x, packed w, f))

Inductor's patterns know static convolutions in one and two dimensions and linear layers, with some of the activations.
The kernels know more: scales found at run time, three dimensions, and further activations behind a linear layer; and a
transposed convolution is a plain one (`kernels.transposed`). In three dimensions they take in no activation; relu is
what quantizing to unsigned integers does anyway. Weights are packed here, as Inductor's freezing does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.kernels.post_ops import LINEAR_ONLY, NONE, PostOp, post_op_of
from lowering.inductor.kernels.transposed import TransposedConvolution, is_transposed
from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.weights import CONVOLUTION, activation_of, weight_of
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit_constant
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_BY_PATTERN = frozenset({"none", "relu", "gelu"})
"""What Inductor's patterns fuse into a linear layer; into a convolution they fuse all that its kernel takes."""


@dataclass(frozen=True, slots=True)
class _Fused:
    """A product with what its kernel computes as well, in order: the kernel returns what the last of ``nodes`` does."""

    nodes: tuple[Node, ...]
    post_op: PostOp = NONE
    quantize: Node | None = None

    @property
    def output(self) -> tuple[float, int, torch.dtype]:
        """Scale, zero point and dtype of the result."""
        if self.quantize is None:
            return 1.0, 0, torch.float32
        args = operands(self.quantize)
        return args["scale"], args["zero_point"], torch.uint8


def is_called(node: Node) -> bool:
    """Whether a quantized product is one that its kernel is called for; of others, Inductor's patterns take care."""
    activation, weight = activation_of(node), weight_of(node)
    if activation is None or weight is None or weight.target is not qd.dequantize_per_channel.default:
        return False
    dynamic = activation.target is qd.dequantize_per_tensor.tensor
    if not dynamic and activation.target is not qd.dequantize_per_tensor.default:
        return False
    if node.target is aten.linear.default:
        return _fused(node).post_op.name not in _BY_PATTERN
    if node.target not in CONVOLUTION or not (dynamic or is_transposed(node) or _spatial(weight) == 3):
        return False
    return not isinstance(operands(node).get("padding"), str)  # by name: what `padding` could not write as numbers


def kernel_calls(gm: GraphModule) -> int:
    """Every quantized product that `is_called` as a call of its kernel; returns how many."""
    found = [node for node in gm.graph.nodes if is_called(node)]
    for node in found:
        fused = _fused(node)
        made = (_linear if node.target is aten.linear.default else _convolution)(gm, node, fused)
        last = fused.nodes[-1]
        if "val" in last.meta:
            made.meta["val"] = last.meta["val"]
        last.replace_all_uses_with(made)
        for each in reversed(fused.nodes):
            gm.graph.erase_node(each)
    return len(found)


def _shape(weight: Node) -> tuple[int, ...]:
    """The sizes of a weight that is dequantized."""
    known = next(node.meta["val"] for node in (weight, operands(weight)["input"]) if "val" in node.meta)
    return tuple(known.shape)


def _spatial(weight: Node) -> int:
    """Dimensions of the image that a convolution with this weight reads."""
    return len(_shape(weight)) - 2


def _fused(node: Node) -> _Fused:
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
    return _Fused(nodes if quantize is None else (*nodes, quantize), post_op, quantize)


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
    if node.target is aten.linear.default:
        return True
    weight = weight_of(node)
    return weight is not None and _spatial(weight) < 3 and post_op.name not in LINEAR_ONLY


def _linear(gm: GraphModule, node: Node, fused: _Fused) -> Node:
    """A call of ``onednn.qlinear_pointwise``.

    Inductor's patterns would look at what stands behind it, and fail on a kernel that has a post op: a dimension of
    size one, which is taken away again, is what they do not look through.
    """
    x, scale, point = _activation(node)
    weight, scales, points = _weight(gm, node)
    packed = emit_constant(gm, node, f"{node.name}_packed", torch.ops.onednn.qlinear_prepack(weight, None))
    kernels = torch.ops.onednn.qlinear_pointwise
    kernel = kernels.tensor if isinstance(scale, Node) else kernels.default
    emit = _emitter(gm, node, fused)
    rows = emit(aten.unsqueeze.default, x, 0)
    arguments = (scale, point, packed, scales, points, operands(node)["bias"], *fused.output, *fused.post_op.args)
    made: Node = emit(aten.squeeze.dim, emit(kernel, rows, *arguments), 0)
    return made


def _convolution(gm: GraphModule, node: Node, fused: _Fused) -> Node:
    """A call of ``onednn.qconv_pointwise``, with its scale in a tensor: Inductor's patterns know the other overload."""
    x, scale, point = _activation(node)
    if not isinstance(scale, Node):
        scale = emit_constant(gm, node, f"{node.name}_scale", torch.tensor([scale], dtype=torch.float32))
        point = emit_constant(gm, node, f"{node.name}_zero_point", torch.tensor([point], dtype=torch.int32))
    weight, scales, points = _weight(gm, node)
    args, emit = operands(node), _emitter(gm, node, fused)
    bias, transposed = args["bias"], None
    n = weight.dim() - 2
    if is_transposed(node):
        transposed = TransposedConvolution.of(node, tuple(weight.shape))
        x = emit(aten.unsqueeze.default, x, 2) if n == 1 else x
        weight, values = (
            transposed.plain_weight(weight),
            transposed.plain_channels(_constant(gm, scales).repeat(transposed.groups)),
        )
        scales = emit_constant(gm, node, f"{node.name}_scales", values)
        points = emit_constant(gm, node, f"{node.name}_zero_points", torch.zeros(values.shape, dtype=torch.int64))
        if isinstance(bias, Node):
            bias = emit(
                aten.expand.default,
                emit(aten.view.default, bias, [transposed.groups, 1, -1]),
                [-1, transposed.phases, -1],
            )
            bias = emit(aten.reshape.default, bias, [-1])
        shape: tuple[Any, ...] = transposed.plain_shape
    else:
        stride, dilation = (_each(args[name], n) for name in ("stride", "dilation"))
        shape = (stride, _each(args["padding"], n), dilation, args["groups"])
    packing = (_constant(gm, scales), 1.0, 128, *shape, None)
    packed = emit_constant(gm, node, f"{node.name}_packed", torch.ops.onednn.qconv_prepack(weight, *packing))
    arguments = (scale, point, packed, scales, points, bias, *shape, *fused.output, *fused.post_op.args)
    made: Node = emit(torch.ops.onednn.qconv_pointwise.tensor, x, *arguments)
    if transposed is not None:
        made = transposed.interleave(made, emit)
        made = emit(aten.squeeze.dim, made, 2) if n == 1 else made
    return made


def _emitter(gm: GraphModule, node: Node, fused: _Fused) -> Callable[..., Node]:
    """Makes calls on behalf of ``node``, where the kernel returns its result."""

    def emit(target: Any, *args: Any) -> Node:
        with gm.graph.inserting_before(fused.nodes[-1]):
            return call(gm, node, target, *args)

    return emit


def _activation(node: Node) -> tuple[Node, Any, Any]:
    """The integers that a product reads, with their scale and zero point: numbers, or nodes."""
    dequantized = activation_of(node)
    assert dequantized is not None, "called"
    args = operands(dequantized)
    return args["input"], args["scale"], args["zero_point"]


def _weight(gm: GraphModule, node: Node) -> tuple[Tensor, Node, Node]:
    """The integers of a weight, and the nodes of its scales and zero points."""
    dequantized = weight_of(node)
    assert dequantized is not None, "called"
    args = operands(dequantized)
    return _constant(gm, args["input"]), args["scales"], args["zero_points"]


def _constant(gm: GraphModule, node: Any) -> Tensor:
    value = tensor_at(gm, node)
    assert value is not None, "the guard refuses weights that are not constant"
    return value


def _each(value: Any, spatial: int) -> list[int]:
    return [*value] * spatial if len(value) == 1 else [*value]
