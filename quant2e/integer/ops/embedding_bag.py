"""Embedding bags: sums, means and maxima of rows of an integer table, a bag of indices at a time.

    acc[b] = Σ t[i] for i in bag b,        mean: an integer division by the number of indices
    (`quant2e.integer.arithmetic.division`),        max: acc[b] = max t[i], 0 for an empty bag

A padding index is in no bag. ``t``: the rows on one scale. A table with a scale for each row, or each group in a row,
is brought to the largest of these, over 2**8, ahead of time; a table with one scale is ``t`` already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError
from quant2e.integer.arithmetic.division import Quotient
from quant2e.integer.arithmetic.values import IntegerContext, Part, Value, Wide
from quant2e.integer.ops.constant_weights import IntegerWeight, integer_weight_of
from quant2e.integer.ops.data_movement import FirstOf

aten = torch.ops.aten

SUM, MEAN, MAX = 0, 1, 2
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


@dataclass(frozen=True, slots=True)
class _Bags:
    """``indices`` in one line, the ``bag`` of each, which of them are ``counted`` (None: all), where bags start."""

    indices: Node
    bag: Node
    counted: Node | None
    starts: Node

    def sizes(self, b: Builder) -> Node:
        """How many indices count in each bag, [bags, 1], int64."""
        ones = b.call(aten.ones_like.default, self.bag)
        ones = ones if self.counted is None else b.cast(self.counted, torch.int64)
        zeros = b.call(aten.zeros_like.default, self.starts, dtype=torch.int64)
        return b.call(aten.unsqueeze.default, b.call(aten.index_add.default, zeros, 0, self.bag, ones), -1)

    def empty(self, b: Builder, width: int) -> Node:
        """Zeros, [bags, width], int64."""
        zeros = b.call(aten.zeros_like.default, self.starts, dtype=torch.int64)
        return b.call(aten.repeat.default, b.call(aten.unsqueeze.default, zeros, -1), [1, width])


def _bags(b: Builder, node: Node) -> _Bags:
    indices, offsets = operand(node, 1), operand(node, 2)
    if offsets is None or indices.meta["val"].dim() != 1:
        raise NoIntegerFormError(node, "its indices do not come in one line with offsets")
    include = bool(operand(node, "include_last_offset"))
    starts = b.call(aten.slice.Tensor, offsets, 0, 0, -1) if include else offsets
    places = b.call(aten.arange.default, b.call(aten.sym_size.int, indices, 0), dtype=torch.int64)
    bag = b.call(aten.sub.Tensor, b.call(aten.bucketize.Tensor, places, starts, right=True), 1)
    padding = _padding(node)
    return _Bags(indices, bag, None if padding is None else b.call(aten.ne.Scalar, indices, padding), starts)


def _padding(node: Node) -> int | None:
    index = operand(node, "padding_idx") if node.target is aten.embedding_bag.padding_idx else None
    return None if index == -1 else index


def _sum(b: Builder, bags: _Bags, taken: Node, width: int) -> Node:
    return b.call(aten.index_add.default, bags.empty(b, width), 0, bags.bag, taken)


def _maximum(b: Builder, bags: _Bags, taken: Node, width: int) -> Node:
    """The largest row value of each bag; zero where nothing counts."""
    place = b.call(aten.repeat.default, b.call(aten.unsqueeze.default, bags.bag, -1), [1, width])
    most = b.call(aten.scatter_reduce.two, bags.empty(b, width), 0, place, taken, "amax", include_self=False)
    if bags.counted is None:
        return most
    return b.call(aten.mul.Tensor, most, b.call(aten.gt.Scalar, bags.sizes(b), 0))


def _embedding_bag(ctx: IntegerContext, node: Node) -> Value:
    table, mode = integer_weight_of(ctx, operand(node, 0)), operand(node, "mode")
    if table is None or table.integers.dim() != 2:
        raise NoIntegerFormError(node, "its table is not a matrix of integers")
    if isinstance(table.scale, Tensor) and table.axis not in (0, None):
        raise NoIntegerFormError(node, "its table has scales along its columns")
    if operand(node, "per_sample_weights") is not None:
        raise NoIntegerFormError(node, "it weighs its rows with floats")
    rows, scale = on_one_scale(table)
    padding, span, width = _padding(node), int(rows.abs().max()), rows.shape[1]
    if padding is not None:  # a row that changes no sum, and no maximum
        rows = rows.clone()
        rows[padding] = -span if mode == MAX else 0
    b = ctx.b
    with b.at(node):
        bags = _bags(b, node)
        kept = b.constant(rows, f"{node.name}_table")
        taken = b.cast(b.call(aten.embedding.default, kept, bags.indices), torch.int64)
        acc = (_maximum if mode == MAX else _sum)(b, bags, taken, width)
        inputs, constants = {"x": bags.indices.name, "bag": bags.bag.name}, {"table": rows}
        leaves_out: dict[str, Any] = {} if padding is None else {"padding_index": padding}
        if mode == MEAN:
            count = b.call(aten.clamp_min.default, bags.sizes(b), 1)
            pool = {"pool": "bag"} | leaves_out
            value: Value = Quotient(node, acc, count, scale, inputs=inputs, attributes=pool, constants=constants)
        else:
            number = bags.indices.meta["val"].shape[0]
            if mode == SUM:
                span = span * number if type(number) is int else 2**31
            part = Part(acc, (scale,), span, owner=node.name)
            kind = "bag_maximum" if mode == MAX else "bag"
            value = Wide(node, [part], kind=kind, inputs=inputs, constants=constants, attributes=leaves_out)
    return FirstOf(node, value)


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = dict.fromkeys(
    (aten.embedding_bag.default, aten.embedding_bag.padding_idx), _embedding_bag
)
"""Target → form."""
