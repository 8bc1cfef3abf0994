"""Elementwise ops, changes of shape, and where integers begin and end, as units of a region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import Activation, RegionStep, StepKind
from lowering.native.units.unit import Emitter, Unit, describe_operand, ending_of, finish, fused_activation, is_identity
from lowering.native.units.values import (
    image_of,
    image_shape,
    integers_of,
    is_between_units,
    quantizes,
    same_size,
    stored,
)
from quant2e.graph.dataflow import operand, operands

aten = torch.ops.aten

_ADD, _MULTIPLY, _SUBTRACT = 0, 1, 2
_BINARY: dict[object, int] = {
    aten.add.Tensor: _ADD,
    aten.add_.Tensor: _ADD,
    aten.mul.Tensor: _MULTIPLY,
    aten.mul_.Tensor: _MULTIPLY,
    aten.sub.Tensor: _SUBTRACT,
    aten.sub_.Tensor: _SUBTRACT,
}
_FLAT = frozenset({aten.flatten.using_ints, aten.view.default, aten.reshape.default})


def quantize_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit that makes bytes of a float tensor, or of bytes with another scale, by a table."""
    del gm, taken
    if not is_between_units(node):
        return None
    source = node.args[0]
    if not isinstance(source, Node) or image_of(source) is None or image_of(node) is None:
        return "its operand has sizes that vary, or more than four dimensions"
    integers, before = integers_of(node), stored(source)
    assert integers is not None, "it quantizes"

    def emit(emitter: Emitter) -> None:
        step = RegionStep(kind=StepKind.QUANTIZE, x=emitter.read(source), inverse=integers.inverse, zero=integers.zero)
        step.low, step.high, step.y = integers.low, integers.high, emitter.declare(node)
        emitter.steps.append(step)

    def emit_table(emitter: Emitter) -> None:
        assert before is not None, "bytes are read"
        table = emitter.constants.add(_table(before, node, lambda floats: floats))
        emitter.steps.append(
            RegionStep(kind=StepKind.CONCAT, x=emitter.read(before), y=emitter.declare(node), weight=table)
        )

    if before is not None:
        return Unit(nodes=(source, node), reads=(before,), writes=(node,), emit=emit_table)
    return Unit(nodes=(node,), reads=(source,), writes=(node,), emit=emit)


def dequantize_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | None:
    """The unit that makes floats of bytes, for ops that compute on floats."""
    del gm
    source = stored(node)
    if source is None or source not in taken or image_of(node) is None:
        return None

    def emit(emitter: Emitter) -> None:
        step = RegionStep(kind=StepKind.DEQUANTIZE)
        describe_operand(step, emitter, "x", source)
        step.z = emitter.declare(node)
        emitter.steps.append(step)

    return Unit(nodes=(node,), reads=(source,), writes=(node,), emit=emit)


def binary_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of a sum, difference or product of two tensors, one of which may have a value per channel only."""
    del gm
    if node.target not in _BINARY:
        return None
    given = operands(node)
    operators = (given["self"], given["other"])
    if not all(isinstance(one, Node) for one in operators) or given.get("alpha", 1) != 1:
        return "one of its operands is a number"
    one, two = (stored(value) or value for value in operators)
    images = [image_of(value) for value in (one, two, node)]
    if any(image is None for image in images) or not _broadcast(operators[0], operators[1], node):
        return "its operands have shapes that a region does not broadcast"
    ending = ending_of(node, taken, adds=False)

    def emit(emitter: Emitter) -> None:
        step = RegionStep(kind=StepKind.BINARY, mode=_BINARY[node.target])
        describe_operand(step, emitter, "x", one)
        describe_operand(step, emitter, "other", two)
        finish(emitter, step, ending=ending)

    dequantizes = tuple(value for value in operators if stored(value) is not None)
    reads = tuple(dict.fromkeys((one, two)))
    return Unit(nodes=(*dequantizes, node, *ending.nodes), reads=reads, writes=ending.writes, emit=emit)


def _broadcast(one: Node, two: Node, node: Node) -> bool:
    """Whether each operand has the shape of the result, or one row, one column or both of an image."""
    wanted = node.meta["val"].shape
    for value in (one, two):
        shape = value.meta["val"].shape
        if len(shape) != len(wanted) or not same_size(shape[0], wanted[0]):
            return False
        channel = 1 if len(shape) == 4 else len(shape) - 1
        if any(s != w and (s != 1 or d == channel) for d, (s, w) in enumerate(zip(shape, wanted, strict=True)) if d):
            return False
    return True


def unary_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of an activation that no other step computes: of bytes by a table, of floats as it is."""
    del gm
    activation = fused_activation(node)
    if activation is None or not isinstance(node.args[0], Node):
        return None
    source = stored(node.args[0]) or node.args[0]
    if image_of(source) is None or image_of(node) is None:
        return "its operand has sizes that vary, or more than four dimensions"
    ending = ending_of(node, taken, adds=False)
    if ending.activation.kind is not Activation.NONE:
        return "two activations in turn"
    integers, rounded = integers_of(source) if quantizes(source) else None, ending.integers
    op: Any = node.target

    def emit(emitter: Emitter) -> None:
        step = RegionStep(kind=StepKind.UNARY)
        describe_operand(step, emitter, "x", source)
        finish(emitter, step, ending=ending)
        step.activation, step.a, step.b = activation.kind, activation.a, activation.b
        if integers is not None and rounded is not None and ending.floats is None:
            step.weight = emitter.constants.add(
                _table(source, rounded, lambda floats: op(floats, *node.args[1:], **node.kwargs))
            )

    dequantizes = (node.args[0],) if source is not node.args[0] else ()
    return Unit(nodes=(*dequantizes, node, *ending.nodes), reads=(source,), writes=ending.writes, emit=emit)


def _table(source: Node, rounded: Node, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What each byte becomes of which torch computes ``function``: uint8 ``[256]``."""
    x, y = integers_of(source), integers_of(rounded)
    assert x is not None, "it was looked at before"
    assert y is not None, "it was looked at before"
    floats = (torch.arange(256) - x.zero).to(torch.float32) * x.scale
    return (torch.round(function(floats) * y.inverse) + y.zero).clamp(y.low, y.high).to(torch.uint8)


def flat_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of bytes of an image in one row: ``dq, flatten, q``; by a table where the scales differ."""
    del gm
    if node.target not in _FLAT and not is_identity(node):
        return None
    source, shape = stored(node.args[0]), image_shape(node)
    before = image_shape(source)
    if source is None or shape is None or before is None or not same_size(shape[0], before[0]):
        return None
    ending = ending_of(node, taken, adds=False)
    rounded = ending.integers
    if rounded is None or ending.floats is not None or ending.activation.kind is not Activation.NONE:
        return "its result is needed in float"
    same = len(shape) == len(before) and shape[1:] == before[1:]
    if not same and not (len(shape) == 2 and len(before) in (3, 4)):
        return "a change of shape other than flattening each sample"
    first = len(before) == 4 and not same

    def emit(emitter: Emitter) -> None:
        step = RegionStep(kind=StepKind.CONCAT, x=emitter.read(source), mode=1 if first else 0)
        step.y = emitter.declare(rounded)
        if integers_of(source) != integers_of(rounded):
            step.weight = emitter.constants.add(_table(source, rounded, lambda floats: floats))
        emitter.steps.append(step)

    if not same and len(before) == 3 and before[1] != 1:
        return "a change of shape that joins rows"
    nodes = (node.args[0], node, *ending.nodes)
    return Unit(nodes=tuple(n for n in nodes if isinstance(n, Node)), reads=(source,), writes=(rounded,), emit=emit)


def join_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit that joins the channels of images of bytes."""
    del gm
    if node.target is not aten.cat.default:
        return None
    tensors, dim = operand(node, "tensors"), operand(node, "dim")
    sources = [stored(value) for value in tensors]
    wanted = image_shape(node)
    if (
        any(source is None for source in sources)
        or wanted is None
        or any(image_of(source) is None for source in sources)
    ):
        return "its operands are not all bytes with a constant scale"
    if dim % len(wanted) != (1 if len(wanted) == 4 else len(wanted) - 1):
        return "it joins along another axis than the channels"
    ending = ending_of(node, taken, adds=False)
    rounded = ending.integers
    if rounded is None or ending.floats is not None or ending.activation.kind is not Activation.NONE:
        return "its result is needed in float"
    found = [source for source in sources if source is not None]

    def emit(emitter: Emitter) -> None:
        y, at = emitter.declare(rounded), 0
        for source in found:
            step = RegionStep(kind=StepKind.CONCAT, x=emitter.read(source), y=y, extra=at)
            if integers_of(source) != integers_of(rounded):
                step.weight = emitter.constants.add(_table(source, rounded, lambda floats: floats))
            emitter.steps.append(step)
            at += emitter.values[step.x].c

    nodes = (*(value for value in tensors if isinstance(value, Node)), node, *ending.nodes)
    return Unit(nodes=nodes, reads=tuple(dict.fromkeys(found)), writes=(rounded,), emit=emit)
