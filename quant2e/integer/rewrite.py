"""Rewrite of a Q/DQ graph into integers, by data flow: one walk, in the order of the graph.

Every dequantize op gives a float tensor that integers stand for. An op with an integer form passes such knowledge on; a
quantize op asks for the integers of its operand; any other reader gets floats, and its op is on the list of what stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import is_float, node_tensor, shape_of
from quant2e.graph.qdq_ops import CHOOSE_PER_TOKEN, CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, qd
from quant2e.integer.arithmetic.builder import NoIntegerFormError
from quant2e.integer.arithmetic.grid import DEQUANTIZE_STATIC, QUANTIZE_STATIC, Grid, grid_of
from quant2e.integer.arithmetic.values import IntegerContext, Stored, Value
from quant2e.integer.ops import (
    data_movement as moves,
)
from quant2e.integer.ops import (
    elementwise,
    embedding,
    pooling,
    products,
    quantize,
    resampling,
    softmax,
)
from quant2e.integer.ops import (
    embedding_bag as bag,
)
from quant2e.integer.ops import (
    lookup_tables as tables,
)
from quant2e.integer.ops.dynamic_quantization import (
    DynamicStored,
    choose_parameters,
    choose_per_token,
    quantize_dynamic,
    quantize_per_token,
)

aten = torch.ops.aten

Form = Callable[[IntegerContext, Node], Value]

FORMS: Mapping[Any, Form] = {
    **moves.FORMS,
    **resampling.FORMS,
    **tables.FORMS,
    **elementwise.FORMS,
    **pooling.FORMS,
    **softmax.FORMS,
    **embedding.FORMS,
    **bag.FORMS,
    **products.FORMS,
}
"""ATen op → its integer form."""

_SHAPE_READERS = frozenset({aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int})


def rewrite(ctx: IntegerContext) -> int:
    """Write the integer form of everything in ``ctx.gm``, in place; returns for how many tensors integers stand.

    Dead float nodes are left for the caller.
    """
    readers: list[Node] = []
    for node in list(ctx.gm.graph.nodes):
        if node.op == "output":
            _materialise(ctx, node)
        elif node.op == "call_function":
            if node.target in _SHAPE_READERS:
                readers.append(node)
            else:
                _one(ctx, node)
    for reader in readers:
        _read_shape(ctx, reader)
    return len(ctx.values)


def _one(ctx: IntegerContext, node: Node) -> None:
    if node.target in QUANTIZE:
        _quantize(ctx, node)
    elif node.target in DEQUANTIZE:
        _dequantize(ctx, node)
    elif node.target in CHOOSE_QPARAMS:
        _choose(ctx, node)
    elif node not in ctx.constants:
        _float_op(ctx, node)


def _float_op(ctx: IntegerContext, node: Node) -> None:
    known = [operand for operand in node.all_input_nodes if operand in ctx.values]
    form = FORMS.get(node.target)
    try:
        if node in ctx.exposed:
            raise NoIntegerFormError(node, "an op writes to its result in place")
        if form is not None:
            value = form(ctx, node)
            ctx.values[node] = _clamped_function(node, value)
            return
        reason = "it has no integer form" if known else "its operands are not quantized"
    except NoIntegerFormError as error:
        reason = str(error)
    if known:
        ctx.keep(node, reason)
    elif node_tensor(node) is not None and is_float(node) and node.target is not operator.getitem:
        ctx.left.setdefault(node.name, reason)


def _clamped_function(node: Node, value: Value) -> Value:
    """A clamp of a function is a function as well: one table for both."""
    if isinstance(value, moves.Clamped) and isinstance(value.source, tables.Function):
        return tables.Function(node, value.source.root, {value.source.node: value.source})
    return value


def _quantize(ctx: IntegerContext, node: Node) -> None:
    x = node.args[0]
    assert isinstance(x, Node)
    grid = grid_of(node) if node.target is QUANTIZE_STATIC else None
    value = ctx.values.get(x)
    because = ""
    if grid is not None and value is not None:
        try:
            integers = value.quantized(ctx, grid)
            if value.grid is not None and isinstance(value, Stored):
                ctx.integer.setdefault(value.node.name, "requantization")
        except NoIntegerFormError as error:
            ctx.failed[error.node.name] = str(error)
            because = f"'{error.node.name}' has no integer form here"
        else:
            node.replace_all_uses_with(integers)
            return
    if value is not None:
        before, ctx.why = ctx.why, because or ctx.why
        real = value.real(ctx)
        ctx.why = before
        node.replace_input_with(x, real)
        x = real
    with ctx.b.at(node):
        if grid is not None:
            node.replace_all_uses_with(quantize.quantize_to_grid(ctx.b, x, grid))
        elif node.target is qd.quantize_per_tensor.tensor:
            scale, zero_point = operand(node, 1), operand(node, 2)
            node.replace_all_uses_with(quantize_dynamic(ctx.b, node, x, scale, zero_point))
        elif node.target is qd.quantize_per_token.default:
            node.replace_all_uses_with(quantize_per_token(ctx.b, node, x, operand(node, 1), operand(node, 2)))
        elif (written := quantize.quantize_other(ctx.b, node, x)) is not None:
            node.replace_all_uses_with(written)


def _dequantize(ctx: IntegerContext, node: Node) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    if node.target is DEQUANTIZE_STATIC and (grid := grid_of(node)) is not None:
        ctx.values[node] = Stored(node, source, grid)
    elif node.target in (qd.dequantize_per_tensor.tensor, qd.dequantize_per_token.default):
        scale, zero_point, low, high = (operand(node, i) for i in range(1, 5))
        ctx.values[node] = DynamicStored(node, source, scale, zero_point, low, high)
    elif node.target is qd.dequantize_per_channel.default and operand(node, "scales") not in ctx.constants:
        ctx.values[node] = _stored_per_image(ctx, node, source)
    elif node.target in (qd.dequantize_per_channel.default, qd.dequantize_per_channel_group.default):
        ctx.values[node] = quantize.PerChannelStored(node)


def _stored_per_image(ctx: IntegerContext, node: Node, source: Node) -> DynamicStored:
    """Integers whose scales, found at run time, are of what has one index along an axis."""
    along = [1] * len(shape_of(source))
    along[operand(node, "axis")] = -1
    with ctx.b.at(node):
        scale, zero_point = (ctx.b.call(aten.reshape.default, operand(node, i), along) for i in (1, 2))
    return DynamicStored(node, source, scale, zero_point, operand(node, "quant_min"), operand(node, "quant_max"))


def _choose(ctx: IntegerContext, node: Node) -> None:
    x = node.args[0]
    assert isinstance(x, Node)
    if (value := ctx.values.get(x)) is not None:
        node.replace_input_with(x, value.real(ctx))
    symmetric = node.target in (qd.choose_qparams_symmetric.tensor, qd.choose_qparams_per_token.default)
    with ctx.b.at(node):
        choose = choose_per_token if node.target in CHOOSE_PER_TOKEN else choose_parameters
        parts = choose(ctx.b, node, symmetric=symmetric)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(parts[operand(user, 1)])


def _materialise(ctx: IntegerContext, node: Node) -> None:
    for x in list(node.all_input_nodes):
        if (value := ctx.values.get(x)) is not None and (real := value.real(ctx)) is not x:
            node.replace_input_with(x, real)


def _read_shape(ctx: IntegerContext, reader: Node) -> None:
    """A size is read from integers where a float tensor is not computed any more."""
    x = reader.args[0]
    assert isinstance(x, Node)
    value = ctx.values.get(x)
    if value is None:
        return
    with_shape = next(iter(value.forms.values()), None)
    if with_shape is None and isinstance(value, Stored):
        with_shape = value.integers
    if with_shape is None or reader.target is aten.sym_stride.int:
        with_shape = value.real(ctx)
    if with_shape is not x:
        reader.replace_input_with(x, with_shape)


__all__ = ["FORMS", "Grid", "rewrite"]
