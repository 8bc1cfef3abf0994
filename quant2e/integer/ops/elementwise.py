"""Elementwise addition, subtraction and multiplication in integers.

add:  out = (Σ m_i * (x_i - zero_point_i) + half) >> shift          mul:  acc = (x - zero_point_x) * (y - zero_point_y)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import NoIntegerFormError
from quant2e.integer.arithmetic.values import IntegerContext, Part, Value, Wide, rank
from quant2e.integer.ops import lookup_tables as tables

aten = torch.ops.aten


def _on_grid(ctx: IntegerContext, value: Value) -> tuple[Node, int, float, int, bool]:
    """Integers of a value on its own grid: node, zero point, scale, span, whether they have 8 bits."""
    grid = value.grid
    if grid is None:
        raise NoIntegerFormError(value.node, f"'{value.node.name}' is not on a grid")
    narrow = grid.dtype in (torch.int8, torch.uint8)
    return value.quantized(ctx, grid), grid.zero_point, grid.scale, grid.span, narrow


def _sum(ctx: IntegerContext, node: Node) -> Value:
    left, right = operand(node, 0), operand(node, 1)
    if not isinstance(right, Node) or not isinstance(left, Node):
        return tables.unary_table(ctx, node)
    if (function := tables.joint(ctx, node)) is not None:
        return function
    alpha = operand(node, "alpha")
    if not isinstance(alpha, int | float):
        raise NoIntegerFormError(node, "alpha is no number")
    sign = -1 if node.target is aten.sub.Tensor else 1
    factors = (1.0, float(alpha) * sign)
    parts: list[Part] = []
    inputs: dict[str, str] = {}
    zero_points: list[int] = []
    for side, factor in zip((left, right), factors, strict=True):
        value = ctx.value(side, node)
        for part, name, zero_point in _parts(ctx, value, node):
            scales = part.scales if abs(factor) == 1 else (*part.scales, abs(factor))
            negative = -1 if factor < 0 else 1
            inputs[f"x{len(parts)}"] = name
            zero_points.append(zero_point)
            parts.append(replace(part, scales=scales, sign=part.sign * negative))
    attributes = {
        "zero_points": zero_points,
        "signs": [p.sign for p in parts],
        "narrow": len(parts) == 2 and all(p.narrow for p in parts),
    }
    return Wide(node, parts, kind="sum", inputs=inputs, attributes=attributes)


def _parts(ctx: IntegerContext, value: Value, node: Node) -> list[tuple[Part, str, int]]:
    """The terms of one operand with the node they are read from and its zero point."""
    dims = rank(node) - rank(value.node)
    if value.grid is not None:
        integers, zero_point, scale, span, narrow = _on_grid(ctx, value)
        with ctx.b.at(node):
            wide = ctx.b.shifted(integers, zero_point)
        return [(Part(wide, (scale,), span, narrow=narrow), integers.name, zero_point)]
    return [
        (replace(part, axis=None if part.axis is None else part.axis + dims, narrow=False), part.node.name, 0)
        for part in value.parts(ctx)
    ]


def _product(ctx: IntegerContext, node: Node) -> Value:
    left, right = operand(node, 0), operand(node, 1)
    if not isinstance(right, Node) or not isinstance(left, Node):
        return tables.unary_table(ctx, node)
    if (function := tables.joint(ctx, node)) is not None:
        return function
    sides = [_on_grid(ctx, ctx.value(side, node)) for side in (left, right)]
    span = sides[0][3] * sides[1][3]
    dtype = torch.int32 if span < 2**31 else torch.int64
    with ctx.b.at(node):
        factors = [ctx.b.shifted(integers, zero_point, dtype) for integers, zero_point, *_ in sides]
        acc = ctx.b.call(aten.mul.Tensor, *factors)
    return Wide(
        node,
        [Part(acc, (sides[0][2], sides[1][2]), span)],
        kind="mul",
        inputs={"x0": sides[0][0].name, "x1": sides[1][0].name},
        attributes={"zero_points": [sides[0][1], sides[1][1]]},
    )


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.mul.Tensor: _product,
}
"""Target → form."""
