"""Constant rewrites: weights, biases and embedding tables, in the form that int8 kernels take them.

They run on a private copy, in the order of `pipeline.REWRITES`. Each keeps the eager result.
"""

from __future__ import annotations

from typing import Any

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
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE, qd

aten = torch.ops.aten

LINEAR = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default})
ACTIVATION_DQ = frozenset({qd.dequantize_per_tensor.default, qd.dequantize_per_tensor.tensor})
TRANSPOSES = movements(Effect.PERMUTE)
_COPIES = movements(Effect.SAME)
_TURNS = TRANSPOSES | _COPIES
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


def dequantized(operand: Node | None) -> Node | None:
    """The dequantize op that an operand of a product is, or a conversion of; None where it is neither."""
    if operand is not None and operand.target is aten.to.dtype:
        operand = operand.args[0] if isinstance(operand.args[0], Node) else None
    return operand if operand is not None and operand.target in DEQUANTIZE else None


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
    """``matmul(x, dq(w, axis=1))`` => ``linear(x, dq(wᵀ, axis=0))``, and so for ``mm`` and ``addmm``.

    However a weight is turned between its dequantize op and a product, it is stored so. One with scales along its
    inputs stays as it is.
    """
    nodes = list(gm.graph.nodes)
    bare = sum(_bare(gm, node) for node in nodes if node.target in CONVOLUTION)
    return bare + sum(_by_output(gm, node) for node in nodes if node.target in LINEAR)


def _bare(gm: GraphModule, node: Node) -> bool:
    """``conv(x, clone(dq(w)))`` => ``conv(x, dq(w))``."""
    chain, source = _chain(weight_of(node))
    copies = [move for move in chain if move.target in _COPIES]
    kept = [move for move in chain if move.target is aten.to.dtype]
    if source is None or not copies or len(copies) + len(kept) < len(chain):
        return False
    with gm.graph.inserting_before(node):
        node.replace_input_with(chain[0], _converted(gm, source, kept))
    return True


def _converted(gm: GraphModule, weight: Node, conversions: list[Node]) -> Node:
    """``weight`` with conversions, the last of which comes first."""
    for move in reversed(conversions):
        weight = call(gm, move, move.target, weight, *move.args[1:], **move.kwargs)
    return weight


def _by_output(gm: GraphModule, node: Node) -> bool:
    chain, source = _chain(weight_of(node))
    value = None if source is None else tensor_at(gm, source.args[0])
    turns = [move for move in chain if move.target is not aten.to.dtype]
    if source is None or value is None or value.dim() != 2 or (node.target is aten.linear.default and not turns):
        return False
    args = operands(source)
    outputs = (sum(map(_swaps, turns)) + (node.target is not aten.linear.default)) % 2
    if args["axis"] != outputs or not _has_bias_by_output(node, value.shape[outputs]):
        return False
    if outputs == 1:
        args["input"] = emit_constant(gm, node, "_weight", value.t().contiguous())
    bias = operands(node)["self"] if node.target is aten.addmm.default else operands(node).get("bias")
    with gm.graph.inserting_before(node):
        weight = call(gm, source, source.target, *(args[name] for name in ("input", "scales", "zero_points")), 0,
            *source.args[4:], **source.kwargs)  # fmt: skip
        weight = _converted(gm, weight, [move for move in chain if move.target is aten.to.dtype])
        found = call(gm, node, aten.linear.default, activation_of(node), weight, bias)
    take_over(found, node)
    replace(node, found)
    return True


def _chain(weight: Node | None) -> tuple[list[Node], Node | None]:
    """What moves or converts a weight of one scale per channel, the last first; and its dequantize op, None without."""
    chain: list[Node] = []
    while weight is not None and (weight.target in _TURNS or weight.target is aten.to.dtype):
        chain.append(weight)
        weight = weight.args[0] if isinstance(weight.args[0], Node) else None
    return chain, weight if weight is not None and weight.target is qd.dequantize_per_channel.default else None


def _swaps(move: Node) -> bool:
    """Whether a move of a matrix exchanges its two axes."""
    target: Any = move.target
    return bool(target(torch.empty(2, 3, device="meta"), *move.args[1:], **move.kwargs).shape == (3, 2))


def _has_bias_by_output(node: Node, outputs: int) -> bool:
    """Whether what a product adds, if anything, is the bias of a linear layer."""
    if node.target is not aten.addmm.default:
        return True
    args = operands(node)
    value = node_tensor(args["self"])
    return args["beta"] == 1 and args["alpha"] == 1 and value is not None and tuple(value.shape) == (outputs,)


def float_weight(gm: GraphModule, node: Node) -> None:
    """``op(x, dq(w))`` => ``op(x, w')`` with ``w'`` a float constant.

    Inductor keeps a weight that is dequantized in the graph as integers, and dequantizes it at every call. Raises
    `PassError` where the weight is not constant.
    """
    weight = weight_of(node)
    assert weight is not None, f"'{node.name}' has a weight"
    node.replace_input_with(weight, emit_constant(gm, node, "_float_weight", evaluate(gm, weight)))
