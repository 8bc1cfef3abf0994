"""Pooling over dynamic sizes: sums and counts in the graph, then an integer division."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError
from quant2e.integer.arithmetic.division import Quotient
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Value, rank

aten = torch.ops.aten


def total(ctx: IntegerContext, node: Node, x: Node, grid: Grid, dims: list[int], *, keepdim: bool, mean: bool) -> Value:
    """The mean over dimensions some of which vary. Raises `NoIntegerFormError` for a sum, whose range has no bound."""
    if not mean:
        raise NoIntegerFormError(node, "how many values it adds depends on the input's shape")
    b = ctx.b
    with b.at(node):
        wide = b.shifted(x, grid.zero_point, torch.int64)
        acc = b.call(aten.sum.dim_IntList, wide, dims, keepdim)
        count = b.call(aten.sym_size.int, x, dims[0])
        for dim in dims[1:]:
            count = b.call(operator.mul, count, b.call(aten.sym_size.int, x, dim))
    attributes = {"pool": "sum", "dims": dims, "keepdim": keepdim, "zero_point": grid.zero_point}
    return Quotient(node, acc, count, grid.scale, inputs={"x": x.name}, attributes=attributes)


def average_windows(ctx: IntegerContext, node: Node, x: Node, grid: Grid, acc: Node, *, counted: bool) -> Value:
    """Average pooling whose windows hang over the border: the same pooling of ones counts what each averages."""
    if counted and operand(node, "ceil_mode"):
        raise NoIntegerFormError(node, "with ceil_mode, windows that count padding depend on the input's shape")
    b = ctx.b
    spatial = 1 if node.target is aten.avg_pool1d.default else 3 if node.target is aten.avg_pool3d.default else 2
    with b.at(node):
        ones = b.call(aten.ones_like.default, x, dtype=torch.int64)
        ones = b.call(aten.unsqueeze.default, ones, -2) if spatial == 1 else ones
        kernel, stride, padding = (_line(operand(node, i), spatial) for i in (1, 2, 3))
        first = ([1], [1], [0]) if spatial == 1 else ([], [], [])
        target = aten.avg_pool3d.default if spatial == 3 else aten.avg_pool2d.default
        count = b.call(
            target, ones, first[0] + kernel, first[1] + (stride or kernel), first[2] + padding,
            bool(operand(node, "ceil_mode")), True, 1,
        )  # fmt: skip
        count = b.call(aten.squeeze.dim, count, -2) if spatial == 1 else count
        acc = b.cast(acc, torch.int64)
    attributes = {"pool": "window", "kernel": kernel, "stride": stride or kernel, "padding": padding}
    return Quotient(
        node, acc, count, grid.scale, inputs={"x": x.name}, attributes=attributes | {"zero_point": grid.zero_point}
    )


def _line(value: Any, spatial: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value or [])
    return sizes * spatial if len(sizes) == 1 else sizes


def adaptive(ctx: IntegerContext, node: Node, x: Node, grid: Grid, outputs: list[int]) -> Value:
    """Windows ``floor(i·n/o) .. ceil((i+1)·n/o)`` of a size n that varies: differences of running sums."""
    b = ctx.b
    dims = rank(node)
    first = dims - len(outputs)
    count: Node | None = None
    with b.at(node):
        acc = b.shifted(x, grid.zero_point, torch.int64)
        for i, out in enumerate(outputs):
            dim = first + i
            start, end = _ends(b, b.call(aten.sym_size.int, x, dim), out)
            running = b.call(aten.cumsum.default, acc, dim)
            running = b.call(aten.constant_pad_nd.default, running, [0, 0] * (dims - 1 - dim) + [1, 0])
            upto, before = (b.call(aten.index_select.default, running, dim, at) for at in (end, start))
            acc = b.call(aten.sub.Tensor, upto, before)
            length = b.call(aten.sub.Tensor, end, start)
            length = b.call(aten.reshape.default, length, [-1 if j == dim else 1 for j in range(dims)])
            count = length if count is None else b.call(aten.mul.Tensor, count, length)
    assert count is not None
    attributes = {"pool": "adaptive", "output_size": outputs, "zero_point": grid.zero_point}
    return Quotient(node, acc, count, grid.scale, inputs={"x": x.name}, attributes=attributes)


def _ends(b: Builder, size: Node, out: int) -> tuple[Node, Node]:
    """Where each window begins and ends, int64 [out]."""
    places = b.call(aten.arange.default, out, dtype=torch.int64)
    start = b.call(aten.div.Tensor_mode, b.call(aten.mul.Tensor, places, size), out, rounding_mode="floor")
    after = b.call(aten.mul.Tensor, b.call(aten.add.Tensor, places, 1), size)
    end = b.call(aten.div.Tensor_mode, b.call(aten.add.Tensor, after, out - 1), out, rounding_mode="floor")
    return start, end
