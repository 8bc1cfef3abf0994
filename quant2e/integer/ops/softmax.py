"""Softmax: a table of exponentials, an integer sum, an integer division.

t = table[max(x) - x],   table[d] = round(exp(-d * scale_x) * 2**23)
out = zero_point + (2 * t * m + s) // (2 * s),    s = Σ t << k,    1 / scale_out = m * 2**-k,  m in 2**23 .. 2**24
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.rescale import saturate
from quant2e.integer.arithmetic.values import IntegerContext, Value, grid_attributes

aten = torch.ops.aten

BITS = 23
"""Bits of an exponential, and of the reciprocal of the output's scale."""


class Softmax(Value):
    """Exponentials over their sum, along one dimension."""

    def __init__(self, node: Node, source: Value) -> None:
        super().__init__(node)
        self.source = source

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        own = self.source.grid
        if own is None or own.dtype not in (torch.int8, torch.uint8):
            raise NoIntegerFormError(self.node, f"its operand '{self.source.node.name}' is not on an 8-bit grid")
        exponent = math.frexp(1.0 / grid.scale)[1]
        shift = BITS + 1 - exponent
        if not 0 <= shift <= 2 * BITS - 8:
            raise NoIntegerFormError(self.node, f"its output scale {grid.scale:.3g} is out of range")
        multiplier = round(math.ldexp(1.0 / grid.scale, shift))
        distance = torch.arange(256, dtype=torch.float64)
        table = torch.round(torch.exp(-distance * own.scale) * 2**BITS).to(torch.int64)
        x = self.source.quantized(ctx, own)
        dim = operand(self.node, "dim")
        out = self._nodes(ctx, x, table, dim, multiplier, shift, grid)
        ctx.integer[self.node.name] = "softmax by a table of 256 exponentials"
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="softmax",
                inputs={"x": x.name},
                output=out.name,
                constants={"table": table},
                attributes={"dim": dim, "multiplier": multiplier, "shift": shift} | grid_attributes(grid),
            )
        )
        return out

    def _nodes(
        self, ctx: IntegerContext, x: Node, table: Any, dim: int, multiplier: int, shift: int, grid: Grid
    ) -> Node:
        b = ctx.b
        wide = b.cast(x, torch.int64)
        distance = b.call(aten.sub.Tensor, b.call(aten.amax.default, wide, [dim], True), wide)
        terms = b.call(aten.index.Tensor, b.constant(table, f"{self.node.name}_table"), [distance])
        total = b.call(aten.mul.Tensor, b.call(aten.sum.dim_IntList, terms, [dim], True), 2**shift)
        numerator = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, terms, 2 * multiplier), total)
        steps = b.call(aten.div.Tensor_mode, numerator, b.call(aten.mul.Tensor, total, 2), rounding_mode="floor")
        return saturate(b, steps, grid)


def _softmax(ctx: IntegerContext, node: Node) -> Value:
    if node.target is not aten._softmax.default and operand(node, "dtype") not in (None, torch.float32):
        raise NoIntegerFormError(node, "it changes the dtype")
    return Softmax(node, ctx.value(node.args[0], node))


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
}
"""Target → form."""
