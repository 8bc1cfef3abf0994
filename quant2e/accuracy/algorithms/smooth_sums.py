"""Smoothed sums: a channel that owns the range of a residual sum is divided in front of it and restored behind it.

    y = linear(x, w, b) + r        =>        y = (linear(x, w / f, b / f) + r / f) / (1 / f)

The residual streams of transformers have a few channels of huge values (O. Kovaleva et al., BERT Busters, 2021;
T. Dettmers et al., LLM.int8(), 2022). Where a backend quantizes the sum, one scale for all channels loses the others.
``f`` is, for each channel, the power of two below its largest value over the median channel's, 1 where it is not above
it: the float result stays as it is. The divisions stay float and cost two ops for each sum, so they are only put in
where the range shrinks by 6 dB or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.smooth import calls_of
from quant2e.accuracy.shadow import FloatValues
from quant2e.annotation.quantizer import Quantizer
from quant2e.graph.attributes import tensor_at
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.dataflow import literal, operand, set_operand
from quant2e.graph.edit import emit, emit_behind, emit_constant
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.base import is_observer_call
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code
from quant2e.prepare.prepare import prepare_pt2e

aten = torch.ops.aten

_KEPT = frozenset({aten.dropout.default, aten.clone.default, aten.alias.default, aten.detach.default})
"""Ops behind a linear that keep each channel in its place and scale with it; dropout in evaluation mode."""

WORTH = 2.0
"""How much smaller the range of a sum must become."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothSums(Algorithm):
    """Smoothed residual sums, where the quantizer quantizes them."""

    name: ClassVar[str] = "smooth_sums"
    stage: ClassVar[Stage] = Stage.CAPTURED
    exact: ClassVar[bool] = True

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Smooth the sums of ``model`` by what they are on ``context.calls``."""
        return _smooth(model, context.quantizer, context.calls)


def smooth_sums(captured: GraphModule, quantizer: Quantizer, data: Iterable[Any]) -> GraphModule:
    """A captured graph with smoothed residual sums, which computes the same; ``captured`` stays as it is.

    ``quantizer``: that the graph will be prepared with: sums that it leaves float are left as they are. ``data``:
    batches of what the model takes; a few will do. Raises `CaptureError` for what is no captured graph, and
    `CalibrationError` for data that the model does not take.
    """
    model = as_graph_module(captured)
    _smooth(model, quantizer, calls_of(data, "smooth_sums", model))
    return model


@dataclass(frozen=True, slots=True)
class _Sum:
    """``total``: an add of two tensors of one shape; ``layer``: the linear whose result is one of them, through ops
    that nothing else reads; ``other``: the other operand, ``place`` its name.
    """

    total: Node
    layer: Node
    other: Node
    place: str


def _smooth(model: GraphModule, quantizer: Quantizer, calls: Sequence[Call]) -> list[str]:
    sums = _sums(model)
    if not sums or not calls:
        return []
    rounded = _rounded(model, quantizer)
    sums = [one for one in sums if one.total.name in rounded]
    largest = _largest(model, sums, calls)
    lines = []
    for one in sums:
        values = largest[one.total.name]
        factors = torch.exp2(torch.log2((values / values.median()).clamp(min=1.0)).floor())
        gain = float(values.amax() / (values / factors).amax()) if bool(values.median() > 0) else 1.0
        if gain >= WORTH:
            _divide(model, one, factors)
            channels = int((factors > 1).sum())
            lines.append(f"{one.total.name}: {channels} of {len(factors)} channels, a range {gain:.3g} × smaller")
    if lines:
        remove_dead_code(model)
        prune_unused_attributes(model)
        model.graph.lint()
        model.recompile()
    return lines


def _sums(model: GraphModule) -> list[_Sum]:
    found = []
    for node in model.graph.nodes:
        value = node_tensor(node)
        if node.target is not aten.add.Tensor or literal(node, "alpha") != 1 or value is None or value.dim() < 2:
            continue
        if not value.is_floating_point() or not isinstance(value.shape[-1], int):
            continue
        places = {name: operand(node, name) for name in ("self", "other")}
        for name, other in (("other", "self"), ("self", "other")):
            layer, beside = _linear(model, places[name]), node_tensor(places[other])
            if layer is not None and beside is not None and beside.shape == value.shape and beside.dtype == value.dtype:
                found.append(_Sum(node, layer, places[other], other))
                break
    return found


def _linear(model: GraphModule, node: object) -> Node | None:
    """The linear that makes a tensor, with a weight and a bias that are the graph's own."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target is aten.linear.default:
            bias = operand(node, "bias")
            tensors = [operand(node, "weight"), *([] if bias is None else [bias])]
            return node if all(tensor_at(model, tensor) is not None for tensor in tensors) else None
        if node.target not in _KEPT or (node.target is aten.dropout.default and literal(node, "train")):
            return None
        node = operand(node, 0)
    return None


def _rounded(model: GraphModule, quantizer: Quantizer) -> frozenset[str]:
    """Names of the ops whose results the quantizer has rounded."""
    prepared = prepare_pt2e(model, quantizer)
    return frozenset(node.all_input_nodes[0].name for node in prepared.graph.nodes if is_observer_call(node))


def _largest(model: GraphModule, sums: Sequence[_Sum], calls: Sequence[Call]) -> dict[str, Tensor]:
    """The largest absolute value of each channel of each sum and of its two operands, over data; float64."""
    parts = {one.total.name: {one.total.name, *(n.name for n in one.total.all_input_nodes)} for one in sums}
    values = FloatValues(model, frozenset[str]().union(*parts.values()))
    found: dict[str, Tensor] = {}
    for call in calls:
        seen = {name: x.abs().flatten(0, -2).amax(0).double() for name, x in values.of(call).items()}
        for total, names in parts.items():
            most = torch.stack([seen[name] for name in sorted(names)]).amax(0)
            found[total] = torch.maximum(found[total], most) if total in found else most
    return found


def _divide(model: GraphModule, one: _Sum, factors: Tensor) -> None:
    """Put the factors of one sum in, in place."""
    value = node_tensor(one.total)
    assert value is not None, "sums have values"
    for name in ("weight", "bias"):
        tensor = tensor_at(model, operand(one.layer, name))
        if tensor is not None:
            shape = (-1,) + (1,) * (tensor.dim() - 1)
            new = (tensor.detach() / factors.to(tensor).view(shape)).clone()
            set_operand(one.layer, name, emit_constant(model, one.layer, f"{one.layer.name}_{name}", new))
    down = factors.to(dtype=value.dtype)
    by = emit_constant(model, one.total, f"{one.total.name}_factor", down)
    set_operand(one.total, one.place, emit(one.total, aten.div.Tensor, one.other, by))
    back = emit_constant(model, one.total, f"{one.total.name}_factor_back", 1.0 / down)
    readers = tuple(one.total.users)
    whole = emit_behind(one.total, one.total, aten.div.Tensor, back)
    for reader in readers:
        reader.replace_input_with(one.total, whole)
