"""Resampling in integers: nearest upsampling and im2col, for which torch has no integer kernels, by ops that have.

    upsample(x) = x[:, :, rows][..., columns]        rows = floor(upsample(0., 1., 2., ...))
    im2col(x) = windows of the padded x, one column each

Which place an output takes depends on the sizes alone, along each axis for itself. torch rounds it in float32, so it is
the op itself that says it, of the numbers of the places: exact up to ``2**24``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import Builder
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Value, rank
from quant2e.integer.ops.data_movement import Moved

aten = torch.ops.aten

_SCALES = ("scales",), ("scales_h", "scales_w"), ("scales_d", "scales_h", "scales_w")
_NEAREST = tuple(
    tuple(getattr(aten, f"{kind}{n}d") for n in (1, 2, 3)) for kind in ("upsample_nearest", "_upsample_nearest_exact")
)

_BY_NUMBERS: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    packet.default: (line.default, names)
    for line, *more in _NEAREST
    for packet, names in zip((line, *more), _SCALES, strict=True)
}
"""Ops with a scale for each axis: the one that computes a single axis, and the names of the scales."""
_BY_LISTS: Mapping[Any, Any] = {packet.vec: line.vec for line, *more in _NEAREST for packet in (line, *more)}
"""The same with a list of scales."""


class Upsampled(Moved):
    """Values several times, as their nearest places say."""

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "picks integers"
        for axis in range(2, rank(self.node)):
            x = ctx.b.call(aten.index_select.default, x, axis, self._places(ctx.b, x, axis))
        return x

    def _places(self, b: Builder, x: Node, axis: int) -> Node:
        """The place that each output takes along an axis, int64; a constant where the sizes are fixed."""
        sizes = operand(self.node, "output_size")
        size = None if sizes is None else [sizes[axis - 2]]
        if self.node.target in _BY_LISTS:
            target, scales = _BY_LISTS[self.node.target], operand(self.node, "scale_factors")
            scale = None if scales is None else [scales[axis - 2]]
        else:
            target, names = _BY_NUMBERS[self.node.target]
            scale = operand(self.node, names[axis - 2])
        length = x.meta["val"].shape[axis]
        if type(length) is int and not isinstance(size and size[0], Node):
            line = torch.arange(length, dtype=torch.float32).reshape(1, 1, -1)
            return b.constant(target(line, size, scale).flatten().to(torch.int64), f"{self.node.name}_places")
        numbers = b.call(aten.arange.default, b.call(aten.sym_size.int, x, axis), dtype=torch.float32)
        numbers = b.call(aten.unsqueeze.default, b.call(aten.unsqueeze.default, numbers, 0), 0)
        return b.cast(b.call(aten.flatten.using_ints, b.call(target, numbers, size, scale)), torch.int64)


class Columns(Moved):
    """The windows of an image as columns, zeros around it: ``[..., C, H, W]`` → ``[..., C * kh * kw, windows]``."""

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        b, node, first = ctx.b, self.node, rank(self.node)
        x = self.source.quantized(ctx, grid)
        ctx.integer[node.name] = "moves integers"
        kernel, dilation, padding, stride = (
            operand(node, name) for name in ("kernel_size", "dilation", "padding", "stride")
        )
        top, left = padding[0], padding[-1]
        if top or left:
            x = b.call(aten.constant_pad_nd.default, x, [left, left, top, top], grid.bound(0.0))
        for i in range(2):  # [..., C, H, W] -> [..., C, oh, W, kh] -> [..., C, oh, ow, kh, kw]
            extent = dilation[i % len(dilation)] * (kernel[i % len(kernel)] - 1) + 1
            x = b.call(aten.unfold.default, x, first - 1 + i, extent, stride[i % len(stride)])
            x = b.call(aten.slice.Tensor, x, -1, 0, extent, dilation[i % len(dilation)])
        lead = first - 2  # the channels' axis, in front of [oh, ow, kh, kw]
        x = b.call(aten.permute.default, x, [*range(lead + 1), lead + 3, lead + 4, lead + 1, lead + 2])
        return b.call(aten.flatten.using_ints, b.call(aten.flatten.using_ints, x, lead, lead + 2), -2, -1)


def _form(kind: type[Moved]) -> Callable[[IntegerContext, Node], Value]:
    return lambda ctx, node: kind(node, ctx.value(node.args[0], node))


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    **dict.fromkeys((*_BY_NUMBERS, *_BY_LISTS), _form(Upsampled)),
    aten.im2col.default: _form(Columns),
}
"""Target → form."""
