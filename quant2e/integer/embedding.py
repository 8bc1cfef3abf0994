"""Lookups in a table of integers.

    float result:      out = (table[i] - zero_point[i]) * scale[i]           quantized result:    out = table_out[i]

A quantized result has one scale, rows of the table have their own, so the rows are requantized once, ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.dataflow import operand
from quant2e.integer.build import NoIntegerFormError, Record
from quant2e.integer.grid import Grid
from quant2e.integer.values import Context, Value, grid_attributes
from quant2e.integer.weights import Weight, weight_of

aten = torch.ops.aten


class Lookup(Value):
    """Rows of an integer table [rows, width] with a scale for the table or for each row."""

    def __init__(self, node: Node, table: Weight) -> None:
        super().__init__(node)
        self.table = table
        self._real: Node | None = None

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, [rows, 1] or [1, 1]."""
        scale, zero = torch.as_tensor(self.table.scale), torch.as_tensor(self.table.zero_point)
        return scale.to(torch.float32).reshape(-1, 1), zero.reshape(-1, 1)

    def _quantized(self, ctx: Context, grid: Grid) -> Node:
        scale, zero = self._rows()
        rows = grid.quantize((self.table.integers.to(torch.float32) - zero) * scale)
        entries = ctx.b.constant(rows, f"{self.node.name}_table")
        indices = operand(self.node, 1)
        out = ctx.b.call(aten.embedding.default, entries, indices)
        ctx.integer[self.node.name] = "lookup in an integer table on the output's scale"
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="lookup",
                inputs={"x": indices.name},
                output=out.name,
                constants={"table": rows},
                attributes=grid_attributes(grid),
            )
        )
        return out

    def real(self, ctx: Context) -> Node:
        if self._real is None:
            ctx.integer.setdefault(self.node.name, "lookup of integers, read in float")
            with ctx.b.at(self.node):
                self._real = self._dequantized(ctx)
        return self._real

    def _dequantized(self, ctx: Context) -> Node:
        b, indices = ctx.b, operand(self.node, 1)
        scale, zero = self._rows()
        table = self.table.source
        if table is None:
            table = b.constant(self.table.integers, f"{self.node.name}_table")
        x = b.cast(b.call(aten.embedding.default, table, indices), torch.float32)
        if bool((zero != 0).any()):
            by_row = b.constant(zero.to(torch.float32), f"{self.node.name}_zero_point")
            x = b.call(aten.sub.Tensor, x, b.call(aten.embedding.default, by_row, indices) if len(zero) > 1 else by_row)
        if len(scale) > 1:
            rows = b.constant(scale, f"{self.node.name}_scale")
            x = b.call(aten.mul.Tensor, x, b.call(aten.embedding.default, rows, indices))
        else:
            x = b.call(aten.mul.Tensor, x, float(scale))
        value = self.node.meta.get("val")
        return b.cast(x, value.dtype) if isinstance(value, Tensor) else x


def _embedding(ctx: Context, node: Node) -> Value:
    table = weight_of(ctx, operand(node, 0))
    if table is None or table.integers.dim() != 2:
        raise NoIntegerFormError(node, "its table is not a matrix of integers")
    if table.group_size or (isinstance(table.scale, Tensor) and table.axis != 0):
        raise NoIntegerFormError(node, "its table has scales within a row")
    return Lookup(node, table)


FORMS: Mapping[Any, Callable[[Context, Node], Value]] = {aten.embedding.default: _embedding}
"""Target → form."""
