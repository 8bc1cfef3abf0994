"""Kernel calls: every int8 product as a call of oneDNN's kernel, with what the kernel computes behind it.

    f(op(dq(x), dq(w)))        =>        dq(kernel(x, packed w, f))

Nothing is left to patterns: Inductor of torch 2.13 has some for these products, that of torch 2.14 none, and torchao
adds its own once it is imported. The kernels take scales that are constant or found at run time, linear layers,
convolutions in one to three dimensions, and transposed ones, which are plain ones of another form
(`kernels.transposed`). Weights are packed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.kernels import convolution_sum
from lowering.inductor.kernels.transposed import TransposedConvolution, is_transposed
from lowering.inductor.rewrites.fusion import Fused, fused_with, spatial_arguments
from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.weights import ACTIVATION_DQ, CONVOLUTION, activation_of, dequantized, weight_of
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand, operands, readers
from quant2e.graph.edit import emit_constant
from quant2e.graph.effects import is_view, writes
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.bfloat16)
"""What a kernel returns, where it is not integers."""


def not_called(node: Node) -> str | None:
    """Why no kernel can be called for a quantized product; None where one can."""
    activation, weight = dequantized(activation_of(node)), dequantized(weight_of(node))
    if node.target is not aten.linear.default and node.target not in CONVOLUTION:
        return (
            "int8 kernels compute linear layers and convolutions, and this product is none that can be written as one"
        )
    if weight is None or weight.target is not qd.dequantize_per_channel.default:
        return "int8 kernels take a weight that is dequantized right in front of them"
    if activation is None or activation.target not in ACTIVATION_DQ:
        return "int8 kernels take an activation that is dequantized right in front of them"
    if (dtype := _dtype(node)) not in _FLOATS:
        return f"int8 kernels return float32 or bfloat16, not {dtype}"
    if isinstance(operands(node).get("padding"), str):  # by name: what `padding` could not write as numbers
        return "int8 kernels pad by numbers, and this image cannot be padded before"
    return None


def kernel_calls(gm: GraphModule) -> int:
    """Every quantized product as a call of its kernel; returns how many.

    Products that `not_called` has a reason for are not quantized any more by now (`lowering.inductor.guard`).
    """
    found = [node for node in gm.graph.nodes if _is_quantized(node) and not_called(node) is None]
    apart = _writes_through_views(gm)
    for node in found:
        fused = fused_with(node)
        made = (_linear if node.target is aten.linear.default else _convolution)(gm, node, fused)
        last = fused.nodes[-1]
        if apart and node.target is not aten.linear.default:
            made = _emitter(gm, node, fused)(aten.contiguous.default, made)
        if "val" in last.meta:
            made.meta["val"] = last.meta["val"]
        last.replace_all_uses_with(made)
        for each in reversed(fused.nodes):
            gm.graph.erase_node(each)
    return len(found)


def _is_quantized(node: Node) -> bool:
    return dequantized(activation_of(node)) is not None and dequantized(weight_of(node)) is not None


def _writes_through_views(gm: GraphModule) -> bool:
    """Whether something is written through a view: convolutions return channels last, of which a view may be a copy."""
    return any(is_view(node) and any(map(writes, readers(node, is_view))) for node in gm.graph.nodes)


def _dtype(node: Node) -> torch.dtype:
    """The dtype that a product returns, by the conversion in front of it: a rewritten product has no value."""
    x, dtype = activation_of(node), torch.float32
    if x is not None and x.target is aten.to.dtype:
        dtype = operand(x, "dtype")
    return dtype


def _packed_for(x: Node) -> list[int] | None:
    """The sizes that a weight is packed for; None where one varies, or is not known."""
    value = node_tensor(x)
    known = value is not None and all(type(size) is int for size in value.shape)
    return [*value.shape] if value is not None and known else None


def _linear(gm: GraphModule, node: Node, fused: Fused) -> Node:
    """A call of ``onednn.qlinear_pointwise``.

    Patterns of Inductor or torchao would look at what stands behind it, and fail on a kernel that has a post op: a
    dimension of size one, which is taken away again, is what they do not look through.
    """
    x, scale, point = _activation(node)
    weight, scales, points = _weight(gm, node)
    packed = torch.ops.onednn.qlinear_prepack(weight, _packed_for(x))
    packed_node = emit_constant(gm, node, f"{node.name}_packed", packed)
    kernels = torch.ops.onednn.qlinear_pointwise
    kernel = kernels.tensor if isinstance(scale, Node) else kernels.default
    emit = _emitter(gm, node, fused)
    rows = emit(aten.unsqueeze.default, x, 0)
    parameters = (scale, point, packed_node, scales, points, operands(node)["bias"])
    made: Node = emit(kernel, rows, *parameters, *fused.output(_dtype(node)), *fused.post_op.args)
    return emit(aten.squeeze.dim, made, 0)


def _convolution(gm: GraphModule, node: Node, fused: Fused) -> Node:
    """A call of ``onednn.qconv_pointwise``, with its scale in a tensor: patterns know the other overload.

    One dimension is computed in two, of which the first has size one.
    """
    x, scale, point = _activation(node)
    emit = _emitter(gm, node, fused)
    plain = _plain(gm, node, emit)
    line = spatial_arguments(node) == 1
    packing = (scale, point) if not isinstance(scale, Node) else (1.0, 128)
    sizes = None if line else _packed_for(x)
    packed = torch.ops.onednn.qconv_prepack(plain.weight, plain.channel_scales, *packing, *plain.shape, sizes)
    packed_node = emit_constant(gm, node, f"{node.name}_packed", packed)
    if not isinstance(scale, Node):
        scale = emit_constant(gm, node, f"{node.name}_scale", torch.tensor([scale], dtype=torch.float32))
        point = emit_constant(gm, node, f"{node.name}_zero_point", torch.tensor([point], dtype=torch.int32))
    image = emit(aten.unsqueeze.default, x, 2) if line else x
    parameters = (image, scale, point, packed_node, plain.scales, plain.points)
    output = fused.output(_dtype(node))
    if fused.added is None:
        kernel = torch.ops.onednn.qconv_pointwise.tensor
        made: Node = emit(kernel, *parameters, plain.bias, *plain.shape, *output, *fused.post_op.args)
    else:
        args = operands(fused.added)
        added = emit(aten.unsqueeze.default, args["input"], 2) if line else args["input"]
        others = (args["scale"], args["zero_point"], fused.post_op.name)
        made = emit(convolution_sum.load_sum_op(), *parameters, added, plain.bias, *plain.shape, *output, *others)
    if plain.transposed is not None:
        made = plain.transposed.interleave(made, emit)
    return emit(aten.squeeze.dim, made, 2) if line else made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """A plain convolution: its integers, the nodes of its scales and zero points and bias, its sizes.

    ``transposed``: the convolution whose phases it computes; None where it is one itself.
    """

    weight: Tensor
    channel_scales: Tensor
    scales: Node
    points: Node
    bias: Node | None
    shape: tuple[Any, ...]
    transposed: TransposedConvolution | None = None


def _plain(gm: GraphModule, node: Node, emit: Callable[..., Node]) -> _Plain:
    """The convolution that a kernel computes for ``node``, in two or three dimensions."""
    weight, scales, points = _weight(gm, node)
    args, n = operands(node), spatial_arguments(node)
    if is_transposed(node):
        return _phases(gm, node, TransposedConvolution.of(node, tuple(weight.shape)), emit)
    sizes = {name: _each(args[name], n) for name in ("stride", "padding", "dilation")}
    if n == 1:
        weight = weight.unsqueeze(2)
        sizes = {name: [int(name != "padding"), *each] for name, each in sizes.items()}
    return _Plain(
        weight=weight,
        channel_scales=_constant(gm, scales),
        scales=scales,
        points=points,
        bias=args["bias"],
        shape=(*sizes.values(), args["groups"]),
    )


def _phases(gm: GraphModule, node: Node, transposed: TransposedConvolution, emit: Callable[..., Node]) -> _Plain:
    """The plain convolution that computes all phases of a transposed one."""
    weight, scales, _ = _weight(gm, node)
    values, bias = transposed.plain_channels(_constant(gm, scales).repeat(transposed.groups)), operands(node)["bias"]
    points = torch.zeros(values.shape, dtype=torch.int64)
    if isinstance(bias, Node):
        bias = emit(aten.view.default, bias, [transposed.groups, 1, -1])
        bias = emit(aten.expand.default, bias, [-1, transposed.phases, -1])
        bias = emit(aten.reshape.default, bias, [-1])
    return _Plain(
        weight=transposed.plain_weight(weight),
        channel_scales=values,
        scales=emit_constant(gm, node, f"{node.name}_scales", values),
        points=emit_constant(gm, node, f"{node.name}_zero_points", points),
        bias=bias,
        shape=transposed.plain_shape,
        transposed=transposed,
    )


def _emitter(gm: GraphModule, node: Node, fused: Fused) -> Callable[..., Node]:
    """Makes calls on behalf of ``node``, where the kernel returns its result."""

    def emit(target: Any, *args: Any) -> Node:
        with gm.graph.inserting_before(fused.nodes[-1]):
            return call(gm, node, target, *args)

    return emit


def _activation(node: Node) -> tuple[Node, Any, Any]:
    """The integers that a product reads, with their scale and zero point: numbers, or nodes."""
    source = dequantized(activation_of(node))
    assert source is not None, "called"
    args = operands(source)
    return args["input"], args["scale"], args["zero_point"]


def _weight(gm: GraphModule, node: Node) -> tuple[Tensor, Node, Node]:
    """The integers of a weight, and the nodes of its scales and zero points."""
    source = dequantized(weight_of(node))
    assert source is not None, "called"
    args = operands(source)
    return _constant(gm, args["input"]), args["scales"], args["zero_points"]


def _constant(gm: GraphModule, node: Any) -> Tensor:
    value = tensor_at(gm, node)
    assert value is not None, "the guard refuses weights that are not constant"
    return value


def _each(value: Any, spatial_arguments: int) -> list[int]:
    return [*value] * spatial_arguments if len(value) == 1 else [*value]
