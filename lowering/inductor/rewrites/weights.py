"""Constant rewrites: weights, biases and embedding tables, in the form that int8 kernels take them.

They run on a private copy, in the order of `pipeline.REWRITES`. Each keeps the eager result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.kernels.transposed import is_transposed
from lowering.inductor.rewrites.graph import call
from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit_constant, replace, take_over
from quant2e.graph.qdq_ops import QUANTIZE, qd

aten = torch.ops.aten

LINEAR = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default})
TRANSPOSES = movements(Effect.PERMUTE)
_PRODUCTS = LINEAR - {aten.linear.default}
CONVOLUTION = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.convolution.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    }
)


def weight_of(node: Node) -> Node | None:
    """The second operand of a convolution, linear or matrix product, where a weight sits; None for other ops."""
    names = {"weight", "mat2", "other"}
    if node.target in CONVOLUTION or node.target in LINEAR:
        for name, value in operands(node).items():
            if name in names and isinstance(value, Node):
                return value
    return None


def activation_of(node: Node) -> Node | None:
    """The operand that the weight of `weight_of` is applied to."""
    names = {"input", "mat1", "self"} if node.target is not aten.addmm.default else {"mat1"}
    for name, value in operands(node).items():
        if name in names and isinstance(value, Node):
            return value
    return None


def folded_weights(gm: GraphModule) -> int:
    """``quantize(get_attr float, …)`` => ``get_attr int8``: what ``fold_quantize=False`` leaves in the graph."""
    constants = Constants(gm.graph)
    found = [n for n in constants if n.target in QUANTIZE and tensor_at(gm, n.args[0]) is not None]
    for node in found:
        replace(node, emit_constant(gm, node, "_integers", evaluate(gm, node)))
    return len(found)


def explicit_zero_points(gm: GraphModule) -> int:
    """``dequantize_per_channel(w, scales, None, …)`` => ``dequantize_per_channel(w, scales, zeros, …)``."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not qd.dequantize_per_channel.default or operands(node)["zero_points"] is not None:
            continue
        scales = tensor_at(gm, operands(node)["scales"])
        if scales is None:
            continue
        zeros = emit_constant(gm, node, "_zero_points", torch.zeros(scales.shape, dtype=torch.int64))
        node.args = (*node.args[:2], zeros, *node.args[3:])
        count += 1
    return count


def float_biases(gm: GraphModule) -> int:
    """``dequantize(get_attr int32)`` => ``get_attr float``: int8 kernels take a float bias, and it is small."""
    kinds = (qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default)
    found = [n for n in Constants(gm.graph) if n.target in kinds and _is_int32(tensor_at(gm, n.args[0]))]
    for node in found:
        replace(node, emit_constant(gm, node, "_float_bias", evaluate(gm, node)))
    return len(found)


def _is_int32(value: Tensor | None) -> bool:
    return value is not None and value.dtype is torch.int32


def per_channel_weights(gm: GraphModule) -> int:
    """``dequantize_per_tensor(w, s, z)`` => ``dequantize_per_channel(w, [s, …], [z, …])`` for constant weights.

    Exact: both subtract the same integer and multiply by the same float32.
    """
    count = 0
    for node in list(gm.graph.nodes):
        user, weight = node, weight_of(node)
        axis = int(node.target in _PRODUCTS or is_transposed(node))
        if weight is not None and weight.target in TRANSPOSES:
            user, axis = weight, 1 - axis
            weight = weight.args[0] if isinstance(weight.args[0], Node) else None
        if weight is None or weight.target is not qd.dequantize_per_tensor.default:
            continue
        args = operands(weight)
        value = tensor_at(gm, args["input"])
        if value is None or value.dim() < 2 or value.dtype is not torch.int8:
            continue
        if node.target in _PRODUCTS and value.dim() != 2:
            continue
        shape = (value.shape[axis],)
        scales = emit_constant(gm, weight, "_scales", torch.full(shape, args["scale"], dtype=torch.float32))
        points = emit_constant(gm, weight, "_zero_points", torch.full(shape, args["zero_point"], dtype=torch.int64))
        with gm.graph.inserting_before(weight):
            channels = (args["input"], scales, points, axis, *weight.args[3:])
            wide = call(gm, weight, qd.dequantize_per_channel.default, *channels, **weight.kwargs)
        take_over(wide, weight)
        user.replace_input_with(weight, wide)
        count += 1
        if not weight.users:
            gm.graph.erase_node(weight)
    return count


def weights_by_output(gm: GraphModule) -> int:
    """``matmul(x, dq(w, axis=1))`` => ``matmul(x, dq(wᵀ, axis=0)ᵀ)``: weights as ``linear`` keeps them."""
    count = 0
    for node in list(gm.graph.nodes):
        weight = weight_of(node)
        if node.target not in _PRODUCTS or weight is None or weight.target is not qd.dequantize_per_channel.default:
            continue
        args = operands(weight)
        value = tensor_at(gm, args["input"])
        if value is None or value.dim() != 2 or args["axis"] != 1:
            continue
        turned = emit_constant(gm, node, "_weight", value.t().contiguous())
        with gm.graph.inserting_before(node):
            rows = call(gm, weight, weight.target, turned, *weight.args[1:3], 0, *weight.args[4:], **weight.kwargs)
            found = call(gm, weight, aten.permute.default, rows, [1, 0])
        node.replace_input_with(weight, found)
        count += 1
        if not weight.users:
            gm.graph.erase_node(weight)
    return count


def float_weight(gm: GraphModule, node: Node) -> None:
    """``op(x, dq(w))`` => ``op(x, w')`` with ``w'`` a float constant.

    Inductor keeps a weight that is dequantized in the graph as integers, and dequantizes it at every call. Raises
    `PassError` where the weight is not constant.
    """
    weight = weight_of(node)
    assert weight is not None, f"'{node.name}' has a weight"
    node.replace_input_with(weight, emit_constant(gm, node, "_float_weight", evaluate(gm, weight)))
