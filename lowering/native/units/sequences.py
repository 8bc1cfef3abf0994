"""Sequences: convolutions in one dimension, and what is around them, compute on images of one row.

x ─ q ─ dq ─ conv1d ─ relu ─ q ─ dq ─ max_pool1d ─▶    =>    x ─ unsqueeze ─ q ─ dq ─ conv2d ─ relu ─ … ─ squeeze ─▶

Ops keep their names. What an op computes of ``[n, c, 1, l]`` is what it computes of ``[n, c, l]``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lowering.native.units.unit import ACTIVATIONS, is_identity
from lowering.native.units.values import image_shape, lie_alike, quantizes, stored, weight_at
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit, emit_behind, emit_constant
from quant2e.graph.fake_values import value_of_call
from quant2e.graph.qdq_ops import DEQUANTIZE, qd
from quant2e.passes.dead_code import remove_dead_code

aten = torch.ops.aten

_SEQUENCE = 3
"""Dimensions."""
_ROW = 2
"""The axis of images that sequences do not have."""
_CONVOLUTIONS: dict[object, Any] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
    aten.conv_transpose1d.default: aten.conv_transpose2d.input,
    aten.convolution.default: aten.convolution.default,
}
_POOLS: dict[object, Any] = {
    aten.max_pool1d.default: aten.max_pool2d.default,
    aten.avg_pool1d.default: aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default: aten.adaptive_avg_pool2d.default,
}
_PAIR = {qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default}
_ON_TWO = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor}
_FLAT = {aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims}
_FILLED = {"stride": 1, "dilation": 1, "kernel_size": 1, "output_size": 1, "padding": 0, "output_padding": 0}
"""Sizes of ops, and what they are along an axis of one."""

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def widen_sequences(gm: GraphModule) -> None:
    """Let quantized convolutions in one dimension, and the ops behind them, compute on images of one row."""
    found = _found(gm)
    if not found:
        return
    entries = {node for node in found if _enters(node, found)}
    wide: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if node not in found:
            continue
        target, given, named = found[node]

        def read(operand: Node, place: Node = node) -> Node:
            return _wide(operand, place, wide, found)

        args: Any = map_arg(given, read)
        kwargs: Any = map_arg(named, read)
        if node.target in _CONVOLUTIONS:
            args = (args[0], _wide_weight(gm, args[1]), *args[2:])
        if node in entries:  # who reads a sequence goes on reading it
            wide[node] = emit(node, target, *args, **kwargs)
            continue
        before, users = node.meta["val"], [user for user in node.users if user not in found]
        node.target, node.args, node.kwargs = target, args, kwargs
        node.meta["val"] = value_of_call(node)
        wide[node] = node
        if len(node.meta["val"].shape) > len(before.shape) and users:
            _leave(node, before, users)
    remove_dead_code(gm)


def _found(gm: GraphModule) -> dict[Node, Call]:
    """The ops that compute on images from now on: convolutions, what they read quantized, and what follows on.

    Of each the call on images, whose operands are still sequences.
    """
    queue = [node for node in gm.graph.nodes if node.target in _CONVOLUTIONS]
    found: dict[Node, Call] = {}
    while queue:
        node = queue.pop()
        if node in found or (call := _wide_call(gm, node)) is None:
            continue
        found[node] = call
        if len(node.meta["val"].shape) == _SEQUENCE:
            queue += node.users
        queue += [operand for operand in node.all_input_nodes if operand.target in _PAIR]
    return found


def _enters(node: Node, found: Collection[Node]) -> bool:
    """Whether it quantizes what is no image yet, or dequantizes that."""
    if stored(node) is not None:
        node = node.all_input_nodes[0]
    return quantizes(node) and node.args[0] not in found


def _wide(operand: Node, place: Node, wide: dict[Node, Node], found: Collection[Node]) -> Node:
    """What an op at ``place`` reads instead of ``operand``."""
    value = operand.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != _SEQUENCE or operand.target in DEQUANTIZE - _PAIR:
        return operand
    if operand not in wide and operand not in found and not _is_weight(operand, place):
        wide[operand] = emit(place, aten.unsqueeze.default, operand, _ROW)
    return wide.get(operand, operand)


def _is_weight(operand: Node, place: Node) -> bool:
    return place.target in _CONVOLUTIONS and operand is operands(place)["weight"]


def _wide_weight(gm: GraphModule, weight: Node) -> Node:
    value = tensor_at(gm, weight.args[0])
    assert value is not None, "it was looked at before"
    integers = emit_constant(gm, weight, "_weight_2d", value.unsqueeze(_ROW))
    return emit(weight, weight.target, integers, *weight.args[1:], **weight.kwargs)  # type: ignore[arg-type]


def _leave(node: Node, before: Tensor, users: Sequence[Node]) -> None:
    """Let ``users`` read ``node`` as the sequence that it was."""
    last = emit_behind(node, node, aten.squeeze.dim, _ROW)
    if not lie_alike(last.meta["val"], before):  # who reads it may view it
        last = emit_behind(last, node, aten.contiguous.default)
    for user in users:
        user.replace_input_with(node, last)


def _wide_call(gm: GraphModule, node: Node) -> Call | None:
    """The call on images instead of sequences; None for ops of none, or of sequences whose size varies."""
    sources = [operand for operand in node.all_input_nodes if len(image_shape(operand) or ()) == _SEQUENCE]
    if node.op != "call_function" or not sources or image_shape(node) is None:
        return None
    if node.target in _CONVOLUTIONS:
        return _convolution(gm, node)
    if node.target in _POOLS:
        return _with_sizes(_POOLS[node.target], operands(node))
    if node.target is aten.mean.dim:
        return _mean(node)
    if node.target is aten.cat.default:
        return _joint(node, sources)
    if len(image_shape(node) or ()) < _SEQUENCE:
        return _flat(node)
    alone = node.target in _PAIR or node.target in ACTIVATIONS or is_identity(node)
    both = node.target in _ON_TWO and all(len(image_shape(operand) or ()) == _SEQUENCE for operand in node.args[:2])
    if node.target in _PAIR and not (quantizes(node) or stored(node) is not None):
        return None
    return (node.target, node.args, dict(node.kwargs)) if alone or both else None  # type: ignore[return-value]


def _with_sizes(target: Any, given: dict[str, Any]) -> Call:
    """A call with the sizes of an axis of one in front of those that ``given`` names."""
    wide = {
        name: [_FILLED[name], *value] if name in _FILLED and isinstance(value, list | tuple) and value else value
        for name, value in given.items()
    }
    return target, tuple(wide.values()), {}


def _convolution(gm: GraphModule, node: Node) -> Call | None:
    given = operands(node)
    weight = given["weight"]
    turned = node.target is aten.conv_transpose1d.default or bool(given.get("transposed"))
    value = tensor_at(gm, weight.args[0]) if isinstance(weight, Node) and weight.args else None
    if stored(given["input"]) is None or value is None or value.dim() != _SEQUENCE:
        return None
    if weight.target not in DEQUANTIZE or (not turned and weight_at(gm, weight) is None):
        return None
    return _with_sizes(_CONVOLUTIONS[node.target], given)


def _mean(node: Node) -> Call | None:
    given = operands(node)
    if {dim % _SEQUENCE for dim in given["dim"] or ()} != {_ROW} or given["dtype"] is not None:
        return None
    return aten.mean.dim, (given["self"], [2, 3], given["keepdim"]), {}


def _joint(node: Node, sources: Sequence[Node]) -> Call | None:
    given = operands(node)
    dim = given["dim"] % _SEQUENCE
    if set(given["tensors"]) != set(sources):
        return None
    return aten.cat.default, (given["tensors"], dim if dim < _ROW else dim + 1), {}


def _flat(node: Node) -> Call | None:
    """Of ``[n, c, l]`` as ``[n, c * l]``."""
    if node.target not in _FLAT:
        return None
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    joins = len(after) == _SEQUENCE - 1 and isinstance(after[1], int) and after[1] == before[1] * before[2]
    return (aten.flatten.using_ints, (node.args[0], 1, -1), {}) if joins else None
