"""Biased layers: the products of a prepared graph, each with the bias that can make up for a shift of its output.

    y = product(x, w) + b        b: an operand of the op, or a constant that the next op adds

A shift of the mean that quantization causes, one number for each output channel, is taken out by such a bias exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import module_path
from quant2e.graph.attributes import register_tensor
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit_constant, take_over
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.base import inner_observer, is_observer_call, observed

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.convolution.default,
    }
)
_PLAIN = frozenset({aten.mm.default, aten.matmul.default, aten.bmm.default})
_OPERANDS: Mapping[Any, tuple[str, str]] = {
    aten.addmm.default: ("mat1", "mat2"),
    aten.mm.default: ("self", "mat2"),
    aten.bmm.default: ("self", "mat2"),
    aten.matmul.default: ("self", "other"),
}


@dataclass(frozen=True, slots=True)
class BiasedLayer:
    """One product. ``op``: the product; ``adds``: the op that adds the bias, itself or the next one.

    ``name``: of the operand that is the bias, in the schema of ``adds``; ``axis``: of the output's channels.
    ``reason``: why its bias cannot be changed; empty where it can.
    """

    op: Node
    adds: Node
    name: str
    axis: int
    reason: str = ""

    @property
    def channels(self) -> int:
        """Of the output."""
        value = node_tensor(self.adds)
        assert value is not None, "a product has a tensor"
        return int(value.shape[self.axis])

    @property
    def place(self) -> str:
        """Name and module, for lines of a report."""
        path = module_path(self.op)
        return f"'{self.op.name}'" + (f" in '{path}'" if path else "")


def input_operand(op: Node) -> Node:
    """The operand of a product that is no weight."""
    found: Node = operand(op, _OPERANDS.get(op.target, ("input", "weight"))[0])
    return found


def weight_operand(op: Node) -> Node:
    """The second operand of a product: a weight, where it is a constant."""
    found: Node = operand(op, _OPERANDS.get(op.target, ("input", "weight"))[1])
    return found


def biased_layers(gm: GraphModule) -> list[BiasedLayer]:
    """The quantized products of a prepared graph, in the order in which they run."""
    constants = Constants(gm.graph)
    found = [layer for node in gm.graph.nodes if (layer := _layer(node, constants)) is not None]
    integers: set[Any] = {layer.op.target for layer in found if _is_integer(gm, operand(layer.adds, layer.name))}
    return [_judged(gm, layer, integers) for layer in found]


def _layer(node: Node, constants: Constants) -> BiasedLayer | None:
    output = node_tensor(node)
    if node.op != "call_function" or output is None or not output.is_floating_point():
        return None
    if not any(is_observer_call(source) for source in node.all_input_nodes):
        return None
    if node.target in CONVOLUTIONS:
        weight = node_tensor(operand(node, "weight"))
        return None if weight is None else BiasedLayer(node, node, "bias", output.dim() - weight.dim() + 1)
    if node.target is aten.linear.default:
        return BiasedLayer(node, node, "bias", output.dim() - 1)
    if node.target is aten.addmm.default:
        plain = (operand(node, "beta"), operand(node, "alpha")) == (1, 1)
        return BiasedLayer(node, node, "self", 1, "" if plain else "it multiplies what it adds")
    return _next_adds(node, constants) if node.target in _PLAIN and output.dim() else None


def _next_adds(node: Node, constants: Constants) -> BiasedLayer:
    """A product without a bias of its own, and the op right behind it that adds a constant to each channel."""
    axis = node.meta["val"].dim() - 1
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is not None and user.target is aten.add.Tensor and operand(user, "alpha") == 1:
        for name, other in (("other", "self"), ("self", "other")):
            value = operand(user, name)
            if operand(user, other) is node and isinstance(value, Node) and observed(value) in constants:
                return BiasedLayer(node, user, name, axis)
    return BiasedLayer(node, node, "bias", axis, "the op has no bias, and nothing that could be one is added behind it")


def _judged(gm: GraphModule, layer: BiasedLayer, integers: set[Any]) -> BiasedLayer:
    if layer.reason:
        return layer
    source = operand(layer.adds, layer.name)
    reason = ""
    if source is None:
        written = layer.op.target in integers
        reason = "it has no bias, and this quantizer stores those as integers, for which it has no scale" * written
    elif not isinstance(source, Node) or observed(source) not in Constants(gm.graph):
        reason = "its bias is no constant"
    elif _has_own_range(gm, source):
        reason = "its bias is quantized with a range of its own"
    elif _layout(observed(source), layer) is None:
        reason = "its bias is not one number for each channel"
    return BiasedLayer(layer.op, layer.adds, layer.name, layer.axis, reason)


def _layout(source: Node, layer: BiasedLayer) -> tuple[int, ...] | None:
    """The shape of a bias that holds a number for each channel and nothing else; None for another."""
    value, output = node_tensor(source), node_tensor(layer.adds)
    if value is None or output is None or value.numel() != layer.channels:
        return None
    if layer.adds is layer.op:
        return tuple(value.shape) if value.dim() == 1 else None
    return tuple(value.shape) if value.dim() and value.shape[-1] == layer.channels else None


def _observers(gm: GraphModule, source: object) -> Iterator[object]:
    while isinstance(source, Node) and is_observer_call(source):
        yield gm.get_submodule(str(source.target))
        source = source.all_input_nodes[0]


def _is_integer(gm: GraphModule, source: object) -> bool:
    return any(getattr(observer, "dtype", None) in INTEGER_BOUNDS for observer in _observers(gm, source))


def _has_own_range(gm: GraphModule, source: object) -> bool:
    """Whether the observer of a bias has measured it: one whose numbers are derived from those of others has not."""
    return any(
        getattr(observer, "dtype", None) in INTEGER_BOUNDS and not isinstance(getattr(observer, "sources", None), list)
        for observer in map(inner_observer, _observers(gm, source))
    )


def bias_of(gm: GraphModule, layer: BiasedLayer) -> Tensor:
    """The bias of a layer that can be changed, float64 ``[channels]``; zeros where there is none."""
    source = operand(layer.adds, layer.name)
    if source is None:
        return torch.zeros(layer.channels, dtype=torch.float64)
    value: Tensor = evaluate(gm, observed(source))
    return value.detach().double().reshape(-1)


def shift_bias(gm: GraphModule, layer: BiasedLayer, shift: Tensor) -> bool:
    """Add ``shift``, one number for each output channel, to the bias of a layer of ``gm``, in place.

    The old tensor stays as it is: others may read it. Returns whether there was a bias before; else one is added.
    """
    source = operand(layer.adds, layer.name)
    if source is None:
        weight = observed(weight_operand(layer.op))
        owner = str(weight.target).rpartition(".")[0] if weight.op == "get_attr" else ""
        value = shift.to(layer.adds.meta["val"].dtype)
        new = emit_constant(gm, layer.adds, f"{owner}.bias".removeprefix("."), value)
        set_operand(layer.adds, layer.name, new)
        return False
    constant = observed(source)
    old: Tensor = evaluate(gm, constant).detach()
    value = (old.double() + shift.double().reshape(old.shape)).to(old.dtype)
    chain = [source] if source is not constant else []
    while chain and chain[-1].all_input_nodes[0] is not constant:
        chain.append(chain[-1].all_input_nodes[0])
    alone = all(len(node.users) == 1 for node in (constant, *chain))
    if alone and constant.op == "get_attr":
        constant.target = register_tensor(gm, str(constant.target), value)
        return True
    new = emit_constant(gm, layer.adds, f"{layer.op.name}_bias", value)
    for call in reversed(chain):
        with gm.graph.inserting_before(layer.adds):
            again = gm.graph.call_module(str(call.target), (new,))
        take_over(again, call)
        new = again
    set_operand(layer.adds, layer.name, new)
    for call in chain:
        if not call.users:
            gm.graph.erase_node(call)
    return True
