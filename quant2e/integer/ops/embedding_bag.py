"""Embedding bags: sums and means of rows of an integer table, a bag of indices at a time.

    acc[b] = Σ t[i] for i in bag b,        mean: an integer division by the number of indices
    (`quant2e.integer.arithmetic.division`)

``t``: the rows on one scale. A table with a scale for each row, or each group in a row, is brought to the largest of
these, over 2**8, ahead of time; a table with one scale is ``t`` already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError
from quant2e.integer.arithmetic.division import Quotient, as_tensor
from quant2e.integer.arithmetic.values import Context, Part, Value, Wide
from quant2e.integer.ops.constant_weights import IntegerWeight, integer_weight_of
from quant2e.integer.ops.data_movement import FirstOf

aten = torch.ops.aten

SUM, MEAN = 0, 1
EXTRA_BITS = 8
"""How much finer the common scale is than the largest of the table's."""


def on_one_scale(table: IntegerWeight) -> tuple[Tensor, float]:
    """Rows as int32 without zero points, and their scale."""
    scales, _ = table.by_row()
    if bool((scales == scales[0, 0]).all()):
        return table.centred(), float(scales[0, 0])
    scales = scales.to(torch.float64).repeat_interleave(table.integers.shape[1] // scales.shape[1], 1)
    common = float(scales.max()) / 2**EXTRA_BITS
    return torch.round(table.centred().to(torch.float64) * scales / common).to(torch.int32), common


def _bags(b: Builder, indices: Node, offsets: Node | None, node: Node) -> tuple[Node, Node, Node]:
    """Indices in one line, the bag of each, and how many there are in each bag (int64)."""
    value = indices.meta["val"]
    if offsets is None or value.dim() != 1:
        raise NoIntegerFormError(node, "its indices do not come in one line with offsets")
    include = bool(operand(node, "include_last_offset"))
    starts = b.call(aten.slice.Tensor, offsets, 0, 0, -1) if include else offsets
    places = b.call(aten.arange.default, b.call(aten.sym_size.int, indices, 0), dtype=torch.int64)
    bag = b.call(aten.sub.Tensor, b.call(aten.bucketize.Tensor, places, starts, right=True), 1)
    ones = b.call(aten.ones_like.default, places)
    counts = b.call(aten.index_add.default, b.call(aten.zeros_like.default, starts, dtype=torch.int64), 0, bag, ones)
    return indices, bag, counts


def _embedding_bag(ctx: Context, node: Node) -> Value:
    table, mode = integer_weight_of(ctx, operand(node, 0)), operand(node, "mode")
    if table is None or table.integers.dim() != 2:
        raise NoIntegerFormError(node, "its table is not a matrix of integers")
    if isinstance(table.scale, Tensor) and table.axis not in (0, None):
        raise NoIntegerFormError(node, "its table has scales along its columns")
    if mode not in (SUM, MEAN):
        raise NoIntegerFormError(node, "it takes the maximum of its rows")
    if operand(node, "per_sample_weights") is not None:
        raise NoIntegerFormError(node, "it weighs its rows with floats")
    if operand(node, "padding_idx") not in (None, -1):
        raise NoIntegerFormError(node, "it leaves out a padding index")
    rows, scale = on_one_scale(table)
    b, indices = ctx.b, operand(node, 1)
    with b.at(node):
        indices, bag, counts = _bags(b, indices, operand(node, 2), node)
        kept = b.constant(rows, f"{node.name}_table")
        taken = b.cast(b.call(aten.embedding.default, kept, indices), torch.int64)
        width = rows.shape[1]
        empty = b.call(aten.mul.Tensor, b.call(aten.unsqueeze.default, counts, -1), 0)
        empty = b.call(aten.repeat.default, empty, [1, width])
        acc = b.call(aten.index_add.default, empty, 0, bag, taken)
        inputs = {"x": indices.name, "bag": bag.name}
        if mode == SUM:
            number = indices.meta["val"].shape[0]
            span = int(rows.abs().max()) * number if type(number) is int else 2**31
            part = Part(acc, (scale,), span, owner=node.name)
            value: Value = Wide(node, [part], kind="bag", inputs=inputs, constants={"table": rows})
        else:
            count = b.call(aten.clamp_min.default, b.call(aten.unsqueeze.default, as_tensor(b, counts), -1), 1)
            value = Quotient(
                node, acc, count, scale, inputs=inputs, attributes={"pool": "bag"}, constants={"table": rows}
            )
    return FirstOf(node, value)


FORMS: Mapping[Any, Callable[[Context, Node], Value]] = dict.fromkeys(
    (aten.embedding_bag.default, aten.embedding_bag.padding_idx), _embedding_bag
)
"""Target → form."""
