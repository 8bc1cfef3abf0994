"""Integer division: averages over a number of values that is known at run time only.

    out = zero_point + (2 * acc * m + c * 2 ** k) // (2 * c * 2 ** k),    scale_x / scale_out = m * 2 ** -k,  m in 2**21
    .. 2**22

``c`` is the count, ``acc`` the sum without zero points; half goes up. Counts up to 2**29 fit 64 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.rescale import saturate
from quant2e.integer.arithmetic.values import IntegerContext, Value, grid_attributes

aten = torch.ops.aten

BITS = 22
"""Bits of the multiplier; fewer for a ratio so small that the shift ends first."""

MOST_SHIFT = 33


class Quotient(Value):
    """``acc * scale / count``. ``acc``: int64 sums. ``count``: a node with a number, or with int64 that broadcasts."""

    def __init__(
        self,
        node: Node,
        acc: Node,
        count: Node,
        scale: float,
        *,
        inputs: dict[str, str],
        attributes: dict[str, Any],
        constants: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(node)
        self.acc, self.count, self.scale = acc, count, scale
        self.inputs, self.attributes, self.constants = inputs, attributes, constants or {}

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        if ctx.b.requantization == "power_of_two":
            raise NoIntegerFormError(self.node, "it divides by a number that is known at run time only: no shift")
        ratio = self.scale / grid.scale
        shift = min(BITS - math.frexp(ratio)[1], MOST_SHIFT)
        if shift < 0:
            raise NoIntegerFormError(self.node, f"its scale changes by {ratio:.3g}, beyond 64 bits")
        multiplier = round(math.ldexp(ratio, shift))
        with ctx.b.at(self.node):
            out = saturate(ctx.b, divided(ctx.b, self.acc, self.count, multiplier, shift), grid)
        ctx.integer[self.node.name] = "average by an integer division, int64 accumulator"
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="quotient",
                inputs=self.inputs,
                output=out.name,
                constants=self.constants,
                attributes=self.attributes | {"multiplier": multiplier, "shift": shift} | grid_attributes(grid),
                accumulator=self.acc.name,
            )
        )
        return out


def divided(b: Builder, acc: Node, count: Node, multiplier: int, shift: int) -> Node:
    """``(2 * acc * multiplier + count * 2**shift) // (2 * count * 2**shift)``, int64."""
    whole = b.call(aten.mul.Tensor, as_tensor(b, count), 2**shift)
    numerator = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, acc, 2 * multiplier), whole)
    return b.call(aten.div.Tensor_mode, numerator, b.call(aten.mul.Tensor, whole, 2), rounding_mode="floor")


def as_tensor(b: Builder, count: Node) -> Node:
    """A number of the graph as an int64 tensor; a tensor as it is."""
    if isinstance(count.meta.get("val"), Tensor):
        return count
    return b.call(aten.full.default, [], count, dtype=torch.int64)
