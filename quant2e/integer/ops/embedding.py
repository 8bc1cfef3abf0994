"""Embedding lookups in a table of integers.

    float result:      out = (table[i] - zero_point[i]) * scale[i]           quantized result:    out = table_out[i]

Rows of the table have scales of their own, or each group of neighbours in a row has:
``out[g] = (table[i][g] - zero_point[i, g]) * scale[i, g]``. A quantized result has one scale, so the rows are
requantized once, ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Value, grid_attributes
from quant2e.integer.ops.constant_weights import IntegerWeight, integer_weight_of

aten = torch.ops.aten


class Lookup(Value):
    """Rows of an integer table [rows, width] with a scale for the table, for each row, or for each group in a row."""

    def __init__(self, node: Node, table: IntegerWeight) -> None:
        super().__init__(node)
        self.table = table
        self._real: Node | None = None

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        scale, _ = self.table.by_row()
        width = self.table.integers.shape[1]
        scale = scale.repeat_interleave(width // scale.shape[1], 1)
        rows = grid.quantize(self.table.centred().to(torch.float32) * scale)
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

    def real(self, ctx: IntegerContext) -> Node:
        if self._real is None:
            ctx.integer.setdefault(self.node.name, "lookup of integers, read in float")
            with ctx.b.at(self.node):
                self._real = self._dequantized(ctx)
        return self._real

    def _dequantized(self, ctx: IntegerContext) -> Node:
        b, indices = ctx.b, operand(self.node, 1)
        scale, zero = self.table.by_row()
        groups = scale.shape[1]

        def of_rows(values: Tensor, role: str) -> Node:
            kept = b.constant(values, f"{self.node.name}_{role}")
            taken = b.call(aten.embedding.default, kept, indices) if len(values) > 1 else kept
            return b.call(aten.unsqueeze.default, taken, -1) if groups > 1 else taken

        table = self.table.source
        if table is None:
            table = b.constant(self.table.integers, f"{self.node.name}_table")
        x = b.cast(b.call(aten.embedding.default, table, indices), torch.float32)
        if groups > 1:
            x = b.call(aten.unflatten.int, x, -1, [groups, self.table.group_size])
        if bool((zero != 0).any()):
            x = b.call(aten.sub.Tensor, x, of_rows(zero.to(torch.float32), "zero_point"))
        x = b.call(aten.mul.Tensor, x, float(scale) if scale.numel() == 1 else of_rows(scale, "scale"))
        if groups > 1:
            x = b.call(aten.flatten.using_ints, x, -2, -1)
        b.record(
            Record(
                name=self.node.name,
                kind="float_lookup",
                inputs={"x": indices.name},
                output=x.name,
                constants={"table": self.table.integers, "scale": scale, "zero_point": zero},
                attributes={"groups": groups, "out_dtype": "float32"},
            )
        )
        value = self.node.meta.get("val")
        return b.cast(x, value.dtype) if isinstance(value, Tensor) else x


def _embedding(ctx: IntegerContext, node: Node) -> Value:
    table = integer_weight_of(ctx, operand(node, 0))
    if table is None or table.integers.dim() != 2:
        raise NoIntegerFormError(node, "its table is not a matrix of integers")
    if isinstance(table.scale, Tensor) and table.axis not in (0, None):
        raise NoIntegerFormError(node, "its table has scales along its columns")
    return Lookup(node, table)


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {aten.embedding.default: _embedding}
"""Target → form."""
