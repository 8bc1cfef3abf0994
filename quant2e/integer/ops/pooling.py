"""Pooling in integers: maxima of integers, and averages as sums that are requantized.

max:   the maximum of the integers               mean, average:   acc = Σ (x - zero_point),  ratio = scale_x / scale_out
/ n
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Part, Value, Wide, grid_attributes, rank
from quant2e.integer.ops import dynamic_pooling as varying

aten = torch.ops.aten


class Maximum(Value):
    """The largest value of each window or line: it is one of the values, so it stays on their grid."""

    def __init__(self, node: Node, source: Value) -> None:
        super().__init__(node)
        self.source = source

    @property
    def grid(self) -> Grid | None:
        return self.source.grid

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "maximum of integers"
        if self.node.target is aten.max_pool1d.default:
            sizes = [_pair(operand(self.node, i), first) for i, first in ((1, 1), (2, 1), (3, 0), (4, 1))]
            wide = ctx.b.call(aten.unsqueeze.default, x, -2)
            pooled = ctx.b.call(aten.max_pool2d.default, wide, *sizes, operand(self.node, 5))
            out = ctx.b.call(aten.squeeze.dim, pooled, -2)
        else:
            out = ctx.b.call(self.node.target, x, *self.node.args[1:], **self.node.kwargs)
        attributes = {"op": str(self.node.target), "args": [_plain(a) for a in self.node.args[1:]]}
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="maximum",
                inputs={"x": x.name},
                output=out.name,
                constants={},
                attributes=attributes | grid_attributes(grid),
            )
        )
        return out


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _pair(size: Sequence[int] | int, first: int) -> list[int]:
    """Sizes of a window along one dimension as sizes along two; an empty stride stays empty."""
    sizes = [size] if isinstance(size, int) else list(size)
    return [first, sizes[0]] if sizes else []


def _maximum(ctx: IntegerContext, node: Node) -> Value:
    return Maximum(node, ctx.value(node.args[0], node))


def _source(ctx: IntegerContext, node: Node) -> tuple[Node, Grid, Sequence[Any]]:
    """The integers that are averaged, their grid and their shape."""
    value = ctx.value(node.args[0], node)
    if value.grid is None:
        raise NoIntegerFormError(node, f"its operand '{value.node.name}' is not quantized by itself")
    shape = value.node.meta["val"].shape
    return value.quantized(ctx, value.grid), value.grid, shape


def _static(sizes: Sequence[Any]) -> list[int] | None:
    """Sizes as numbers; None when one of them is known at run time only."""
    return [int(size) for size in sizes] if all(type(size) is int for size in sizes) else None


def _average(
    node: Node,
    x: Node,
    grid: Grid,
    acc: Node,
    count: float | Tensor,
    most: int,
    attributes: dict[str, Any],
) -> Wide:
    """What is known of a sum ``acc`` of ``count`` values, ``most`` at the most."""
    part = Part(acc, (grid.scale,), most * grid.span, count=count)
    known = attributes | {"zero_point": grid.zero_point}
    counts = {"count": torch.as_tensor(count)}
    return Wide(node, [part], kind="average", inputs={"x": x.name}, constants=counts, attributes=known)


class Mean(Wide):
    """A mean. ``raw``: the sum with the zero points of ``source`` still in it."""

    def __init__(self, wide: Wide, raw: Node, source: Grid) -> None:
        super().__init__(
            wide.node,
            wide._parts,
            kind=wide.kind,
            inputs=wide.inputs,
            constants=wide.constants,
            attributes=wide.attributes,
        )
        self._raw, self._source = raw, source

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        """On the grid of its operand, in float32: ``round(Σ q * (1 / n) + offset)``, as XNNPACK (``reduce-nd.c``) does.

        The offset is what is left of ``zero_point - n * zero_point * (1 / n)`` in float32: 0, or just enough to settle
        ties. Otherwise the zero point goes first, as everywhere.
        """
        same = (grid.scale, grid.zero_point) == (self._source.scale, self._source.zero_point)
        if not same or ctx.b.requantization != "float32":
            return super()._quantized(ctx, grid)
        b, part = ctx.b, self._parts[0]
        ratio = part.term(grid, 0).ratio.single
        zero = torch.tensor(float(grid.zero_point))
        offset = float(zero - torch.tensor(float(part.count) * grid.zero_point, dtype=torch.float32) * ratio)
        mean = b.call(aten.mul.Tensor, b.cast(self._raw, torch.float32), float(ratio))
        if offset:
            mean = b.call(aten.add.Tensor, mean, offset)
        out = b.cast(b.clamp(b.call(aten.round.default, mean), grid.quant_min, grid.quant_max), grid.dtype)
        ctx.integer[self.node.name] = f"{self.kind}, int32 accumulator"
        attributes = self.attributes | {"zero_point": 0, "offset": offset}
        b.record(
            Record(
                name=self.node.name,
                kind=self.kind,
                inputs=self.inputs,
                output=out.name,
                constants=self.constants | {"ratio": ratio},
                attributes=attributes | grid_attributes(replace(grid, zero_point=0)),
                accumulator=self._raw.name,
            )
        )
        return out


def _mean(ctx: IntegerContext, node: Node) -> Value:
    x, grid, shape = _source(ctx, node)
    if operand(node, "dtype") is not None:
        raise NoIntegerFormError(node, "it changes the dtype")
    named = operand(node, "dim")
    dims = [d % len(shape) for d in ([named] if isinstance(named, int) else named or range(len(shape)))]
    return _total(ctx, node, x, grid, shape, dims, keepdim=bool(operand(node, "keepdim")), mean=True)


def _total(
    ctx: IntegerContext,
    node: Node,
    x: Node,
    grid: Grid,
    shape: Sequence[Any],
    dims: list[int],
    *,
    keepdim: bool,
    mean: bool,
) -> Value:
    sizes = _static([shape[d] for d in dims])
    if sizes is None:
        return varying.total(ctx, node, x, grid, dims, keepdim=keepdim, mean=mean)
    count = math.prod(sizes)
    dtype = torch.int32 if count * (grid.quant_max - grid.quant_min) < 2**31 else torch.int64
    with ctx.b.at(node):
        raw = ctx.b.call(aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype)
        acc = ctx.b.call(aten.sub.Tensor, raw, count * grid.zero_point) if grid.zero_point else raw
    attributes = {"pool": "sum", "dims": dims, "keepdim": keepdim}
    wide = _average(node, x, grid, acc, count if mean else 1, count, attributes)
    return Mean(wide, raw, grid) if mean else wide


def _total_of(ctx: IntegerContext, node: Node) -> Value:
    x, grid, shape = _source(ctx, node)
    if operand(node, "dtype") not in (None, torch.float32):
        raise NoIntegerFormError(node, "it changes the dtype")
    dims = [d % len(shape) for d in operand(node, "dim") or range(len(shape))]
    return _total(ctx, node, x, grid, shape, dims, keepdim=bool(operand(node, "keepdim")), mean=False)


def _sizes(value: Any, spatial: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value or [])
    return sizes * spatial if len(sizes) == 1 else sizes


_AVERAGES: Mapping[Any, int] = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_ADAPTIVE: Mapping[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}


def _average_pool(ctx: IntegerContext, node: Node) -> Value:
    x, grid, shape = _source(ctx, node)
    spatial = _AVERAGES[node.target]
    kernel = _sizes(operand(node, "kernel_size"), spatial)
    stride = _sizes(operand(node, "stride"), spatial) or kernel
    padding = _sizes(operand(node, "padding"), spatial)
    ceil = bool(operand(node, "ceil_mode"))
    override = operand(node, "divisor_override") if spatial > 1 else None
    counted = bool(operand(node, "count_include_pad"))
    count: float | Tensor = override or math.prod(kernel)
    if not override and (ceil or (any(padding) and not counted)):
        inputs = _static(shape[-spatial:])
        outputs = _static(node.meta["val"].shape[-spatial:])
        if inputs is None or outputs is None:
            return varying.average_windows(
                ctx, node, x, grid, _window_sums(ctx, node, x, grid, (kernel, stride, padding), ceil), counted=counted
            )
        count = torch.ones([], dtype=torch.float64)
        for line in zip(inputs, outputs, kernel, stride, padding, strict=True):
            count = count.unsqueeze(-1) * _counts(*line, counted=counted)
        count = _one_if_same(count.reshape([1] * (len(shape) - spatial) + list(count.shape)))
    acc = _window_sums(ctx, node, x, grid, (kernel, stride, padding), ceil)
    attributes = {"pool": "window", "kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil}
    return _average(node, x, grid, acc, count, math.prod(kernel), attributes)


def _counts(inputs: int, outputs: int, kernel: int, stride: int, padding: int, *, counted: bool) -> Tensor:
    """How many values each window along one dimension averages; ``counted``: padding is among them."""
    starts = [i * stride - padding for i in range(outputs)]
    ends = [min(start + kernel, inputs + padding) for start in starts]
    if not counted:
        starts, ends = [max(start, 0) for start in starts], [min(end, inputs) for end in ends]
    return torch.tensor([end - start for start, end in zip(starts, ends, strict=True)], dtype=torch.float64)


def _one_if_same(count: Tensor) -> float | Tensor:
    """A number when every output averages as many values."""
    first = float(count.flatten()[0])
    return first if bool((count == first).all()) else count


def _window_sums(
    ctx: IntegerContext, node: Node, x: Node, grid: Grid, window: tuple[list[int], list[int], list[int]], ceil: bool
) -> Node:
    """Sums over windows: average pooling with a divisor of 1, for which torch has an int64 kernel only."""
    kernel, stride, padding = window
    with ctx.b.at(node):
        wide = ctx.b.shifted(x, grid.zero_point, torch.int64)
        if len(kernel) == 1:
            wide = ctx.b.call(aten.unsqueeze.default, wide, -2)
            kernel, stride, padding = [1, *kernel], [1, *stride], [0, *padding]
        target = aten.avg_pool3d.default if len(kernel) == 3 else aten.avg_pool2d.default
        acc = ctx.b.call(target, wide, kernel, stride, padding, ceil, True, 1)
        if len(window[0]) == 1:
            acc = ctx.b.call(aten.squeeze.dim, acc, -2)
        return ctx.b.cast(acc, torch.int32) if math.prod(kernel) * grid.span < 2**31 else acc


def _adaptive_pool(ctx: IntegerContext, node: Node) -> Value:
    x, grid, shape = _source(ctx, node)
    spatial = _ADAPTIVE[node.target]
    outputs = _sizes(operand(node, "output_size"), spatial)
    first = len(shape) - spatial
    if all(size == 1 for size in outputs):
        return _total(ctx, node, x, grid, shape, list(range(first, len(shape))), keepdim=True, mean=True)
    inputs = _static(shape[first:])
    if inputs is None:
        return varying.adaptive(ctx, node, x, grid, outputs)
    windows = [_lines(n, out) for n, out in zip(inputs, outputs, strict=True)]
    count = torch.ones([], dtype=torch.float64)
    most = 1
    with ctx.b.at(node):
        acc = ctx.b.shifted(x, grid.zero_point, torch.int32 if math.prod(inputs) * grid.span < 2**31 else torch.int64)
        for i, lines in enumerate(windows):
            per_line = lines.sum(1).to(torch.float64)
            most *= int(per_line.max())
            count = count.unsqueeze(-1) * per_line
            last = first + i == len(shape) - 1
            acc = acc if last else ctx.b.call(aten.transpose.int, acc, first + i, -1)
            ones = ctx.b.cast(
                ctx.b.constant(lines.t().contiguous().to(torch.int8), f"{node.name}_windows"), _dtype(acc)
            )
            acc = ctx.b.call(aten.matmul.default, acc, ones)
            acc = acc if last else ctx.b.call(aten.transpose.int, acc, first + i, -1)
    count = count.reshape([1] * first + list(count.shape))
    known = {"pool": "adaptive", "output_size": outputs}
    return _average(node, x, grid, acc, _one_if_same(count), most, known)


def _dtype(node: Node) -> torch.dtype:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else torch.int32


def _lines(inputs: int, outputs: int) -> Tensor:
    """[outputs, inputs]: 1 where an input belongs to the window ``floor(i·n/o) .. ceil((i+1)·n/o)`` of an output."""
    rows = torch.zeros([outputs, inputs], dtype=torch.int64)
    for i in range(outputs):
        rows[i, i * inputs // outputs : -(-(i + 1) * inputs // outputs)] = 1
    return rows


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    **dict.fromkeys(
        (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.amax.default), _maximum
    ),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), _mean),
    aten.sum.dim_IntList: _total_of,
    **dict.fromkeys(_AVERAGES, _average_pool),
    **dict.fromkeys(_ADAPTIVE, _adaptive_pool),
}
"""Target → form."""

__all__ = ["FORMS", "rank"]
