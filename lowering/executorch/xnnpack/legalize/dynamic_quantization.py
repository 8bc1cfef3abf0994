"""Dynamic quantization as XNNPACK computes it: a scale for each row of an activation, or for each image.

    choose_qparams(x) → quantize → dequantize → linear(·, W)
        =  choose_qparams_per_token(x) → quantize → dequantize → linear(·, W)

XNNPACK gives every row (token) that a linear reads, and every image that a convolution reads, a scale of its own,
whatever the graph says. Graphs of `XNNPACKQuantizer` say so. Of those by others, the graph that is handed over says it
for linears: a finer grid than the per-tensor one, with other numbers. Images have one spelling, that of a tensor.
A weight with one scale becomes a weight with that scale in every channel, the only kind XNNPACK takes here.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.qdq_ops import CHOOSE_PER_TENSOR, CHOOSE_QPARAMS, qd

_ATEN = torch.ops.aten
DYNAMIC_CONSUMERS = {_ATEN.linear.default: 0, _ATEN.conv2d.default: 0, _ATEN.conv_transpose2d.input: 1}
"""Ops that XNNPACK computes on activations quantized at run time, and the axis of their weight's output channels."""
DYNAMIC_CONVOLUTIONS = (_ATEN.conv2d.default, _ATEN.conv_transpose2d.input)
"""Those that read images, and find a scale for each."""

_DYNAMIC = (
    qd.quantize_per_tensor.tensor,
    qd.dequantize_per_tensor.tensor,
    qd.dequantize_per_token.default,
    qd.dequantize_per_channel.default,
)
_FLAT = movements(Effect.RESHAPE)
_GROUPS = qd.dequantize_per_channel_group.default
_WEIGHTS = (qd.dequantize_per_channel.default, _GROUPS)


def chooser_of(node: object) -> Node | None:
    """The ``choose_qparams`` node behind a quantized or dequantized activation; None for a static one."""
    if not isinstance(node, Node) or node.target not in _DYNAMIC:
        return None
    scale = operand(node, 1)
    while isinstance(scale, Node) and scale.target in _FLAT:
        scale = scale.args[0]
    if not isinstance(scale, Node) or scale.target is not operator.getitem:
        return None
    chooser = scale.args[0]
    return chooser if isinstance(chooser, Node) and chooser.target in CHOOSE_QPARAMS else None


def spread_weight_scale(module: GraphModule) -> int:
    """Give per-tensor weights of dynamic linears and convolutions their scale per channel. Bit-equal."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in DYNAMIC_CONSUMERS or chooser_of(operand(node, 0)) is None:
            continue
        weight = operand(node, "weight")
        if not isinstance(weight, Node) or weight.target is not qd.dequantize_per_tensor.default:
            continue
        stored, scale, zero_point, low, high, dtype = (operand(weight, place) for place in range(6))
        values = tensor_at(module, stored)
        if values is None or zero_point != 0 or not isinstance(scale, int | float):
            continue
        axis = DYNAMIC_CONSUMERS[node.target]
        channels = values.shape[axis]
        scales = emit_constant(module, node, "weight_scales", torch.full((channels,), float(scale)))
        zeros = emit_constant(module, node, "weight_zero_points", torch.zeros(channels, dtype=torch.int64))
        spread = emit(
            node, qd.dequantize_per_channel.default, stored, scales, zeros, axis, low, high, dtype, **weight.kwargs
        )
        node.replace_input_with(weight, spread)
        count += 1
    return count


def per_row(module: GraphModule) -> int:
    """Rewrite dynamic quantization in front of linears to one scale per row; returns how many chains.

    Uses of one tensor by several linears share one chain, so that XNNPACK quantizes it once. A linear whose weight
    is not in integers keeps the chain it had: XNNPACK would not take it.
    """
    chains: dict[Node, tuple[Node, Node, Node]] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.linear.default:
            continue
        dequantize, weight = operand(node, "input"), operand(node, "weight")
        chooser = chooser_of(dequantize)
        if chooser is None or chooser.target not in CHOOSE_PER_TENSOR or not _int8(chooser):
            continue
        if weight.target not in _WEIGHTS:
            continue
        x = chooser.all_input_nodes[0]
        if x not in chains:
            chains[x] = _chain(x, node)
        scale, zero_point, quantized = chains[x]
        row = emit(
            node, qd.dequantize_per_token.default, quantized, scale, zero_point, -128, 127, torch.int8, torch.float32
        )
        node.replace_input_with(dequantize, row)
    return len(chains)


def per_image(module: GraphModule) -> int:
    """Spell a scale for each image as one scale for the tensor, as XNNPACK's partitioner wants it; returns how many.

    ``dequantize_per_channel(q, scale[N], 0)`` in front of a convolution becomes ``choose_qparams`` and the ops of a
    whole tensor: XNNPACK finds a scale for each image whatever the graph says, and reads this spelling only.
    """
    chains: dict[Node, tuple[Node, Node, Node]] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in DYNAMIC_CONVOLUTIONS:
            continue
        dequantize = operand(node, "input")
        if dequantize.target is not qd.dequantize_per_channel.default or chooser_of(dequantize) is None:
            continue
        quantized = operand(dequantize, "input")
        if quantized not in chains:
            chains[quantized] = _whole_chain(operand(quantized, "input"), quantized)
        scale, zero_point, whole = chains[quantized]
        arguments = (whole, scale, zero_point, -128, 127, torch.int8)
        own = emit(node, qd.dequantize_per_tensor.tensor, *arguments, **dequantize.kwargs)
        node.replace_input_with(dequantize, own)
    return len(chains)


def short_group_scales(module: GraphModule) -> int:
    """Round the scales of weights in groups to bfloat16, which is how a program file stores them; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.linear.default:
            continue
        weight = operand(node, "weight")
        if not isinstance(weight, Node) or weight.target is not _GROUPS or chooser_of(operand(node, "input")) is None:
            continue
        scales = tensor_at(module, operand(weight, "scales"))
        if scales is None or torch.equal(scales, scales.bfloat16().to(scales.dtype)):
            continue
        short = emit_constant(module, weight, "group_scales", scales.detach().bfloat16().to(scales.dtype))
        set_operand(weight, "scales", short)
        count += 1
    return count


def _int8(chooser: Node) -> bool:
    return operand(chooser, "dtype") is torch.int8


def _chain(x: Node, before: Node) -> tuple[Node, Node, Node]:
    chosen = emit(before, qd.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    scale = emit(before, operator.getitem, chosen, 0)
    zero_point = emit(before, operator.getitem, chosen, 1)
    quantized = emit(before, qd.quantize_per_token.default, x, scale, zero_point, -128, 127, torch.int8)
    return scale, zero_point, quantized


def _whole_chain(x: Node, before: Node) -> tuple[Node, Node, Node]:
    smallest = torch.finfo(torch.float32).eps
    chosen = emit(before, qd.choose_qparams.tensor, x, -128, 127, smallest, torch.int8)
    scale = emit(before, operator.getitem, chosen, 0)
    zero_point = emit(before, operator.getitem, chosen, 1)
    arguments = (x, scale, zero_point, -128, 127, torch.int8)
    return scale, zero_point, emit(before, qd.quantize_per_tensor.tensor, *arguments)
