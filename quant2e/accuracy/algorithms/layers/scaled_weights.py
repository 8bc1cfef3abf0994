"""Scaled weights: a factor for each output channel goes into a quantized weight, whose integers stay as they are.

w_c ← r_c w_c        scale_c ← r_c scale_c
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.layers.biased_layers import CONVOLUTIONS, BiasedLayer, weight_operand
from quant2e.graph.attributes import register_tensor
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import operand
from quant2e.observers.base import is_observer_call, observed
from quant2e.observers.encodings import PerChannelEncoding, PerGroupEncoding, encode
from quant2e.observers.given import give_encoding, give_integers, integers_given, parameters_along
from quant2e.observers.straight_through import fake_quantize
from quant2e.passes.fold_batch_norm import GENERAL, TRANSPOSED

aten = torch.ops.aten


def takes_factors(gm: GraphModule, layer: BiasedLayer) -> bool:
    """Whether each output channel of a layer's weight has scales of its own, and nothing else reads them."""
    call = weight_operand(layer.op)
    source = observed(call)
    axis = _output_axis(layer.op)
    if axis is None or source.op != "get_attr" or source not in Constants(gm.graph):
        return False
    if not is_observer_call(call):
        return len(source.users) == 1
    alone = call.all_input_nodes == [source] and len(source.users) == len(call.users) == 1
    if not alone or sum(node.target == call.target for node in gm.graph.nodes) != 1:
        return False
    encoding = encode(gm.get_submodule(str(call.target)))
    if isinstance(encoding, PerGroupEncoding):
        return axis == 0
    return isinstance(encoding, PerChannelEncoding) and encoding.axis == axis


def _output_axis(op: Node) -> int | None:
    """The axis of the weight along which the output channels lie; None where they do not lie along one."""
    if op.target is aten.linear.default:
        return 0
    if op.target not in CONVOLUTIONS:
        return None
    if op.target in TRANSPOSED or (op.target in GENERAL and operand(op, "transposed")):
        return 1 if operand(op, "groups") == 1 else None
    return 0


def scale_weight(gm: GraphModule, layer: BiasedLayer, factors: Tensor) -> None:
    """Multiply the output channels of a weight of which `takes_factors` by ``factors``, ``[channels]``, in place."""
    call, axis = weight_operand(layer.op), _output_axis(layer.op)
    assert axis is not None, "the weight takes factors"
    source = observed(call)
    value: Tensor = evaluate(gm, source).detach()
    shape = [1] * value.dim()
    shape[axis] = -1
    integers = integers_given(gm, call) if is_observer_call(call) else None
    source.target = register_tensor(gm, str(source.target), (value.double() * factors.reshape(shape)).to(value.dtype))
    if not is_observer_call(call):
        return
    encoding = encode(gm.get_submodule(str(call.target)))
    assert isinstance(encoding, PerChannelEncoding | PerGroupEncoding), "the weight takes factors"
    if integers is None:
        integers = _nearest(value, encoding)
    scale = encoding.scale.double()
    rows = scale.reshape(len(factors), -1) * factors.reshape(-1, 1)
    give_encoding(gm, str(call.target), replace(encoding, scale=rows.reshape(scale.shape).to(encoding.scale.dtype)))
    give_integers(gm, call, integers)


def _nearest(value: Tensor, encoding: PerChannelEncoding | PerGroupEncoding) -> Tensor:
    """The integers that conversion makes of a weight."""
    groups = encoding.group_size if isinstance(encoding, PerGroupEncoding) else None
    rounded = fake_quantize(
        value.float(),
        encoding.scale.reshape(-1).to(torch.float32),
        encoding.zero_point.reshape(-1),
        encoding.quant_min,
        encoding.quant_max,
        axis=encoding.axis if isinstance(encoding, PerChannelEncoding) else None,
        group_size=groups,
    )
    scale, zero_point = parameters_along(encoding, value)
    return (torch.round(rounded / scale) + zero_point).to(encoding.dtype)
