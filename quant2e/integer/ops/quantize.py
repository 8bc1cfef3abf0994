"""Quantize and dequantize as ATen ops, bit for bit those of ``quantized_decomposed``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.graph.qdq_ops import qd
from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Value

aten = torch.ops.aten


def quantize_to_grid(b: Builder, x: Node, grid: Grid) -> Node:
    """``clamp(round(x * (1 / scale)) + zero_point)``, ties to even."""
    steps = b.call(aten.round.default, b.call(aten.mul.Tensor, b.cast(x, torch.float32), 1.0 / grid.scale))
    if grid.zero_point:
        steps = b.call(aten.add.Tensor, steps, grid.zero_point)
    return b.cast(b.clamp(steps, grid.quant_min, grid.quant_max), grid.dtype)


def quantize_other(b: Builder, node: Node, x: Node) -> Node | None:
    """Quantization per channel; None for what is no op of static or dynamic graphs."""
    if node.target is not qd.quantize_per_channel.default:
        return None
    scale, zero, axis, low, high, dtype = (operand(node, i) for i in range(1, 7))
    value = x.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    scale, zero = (b.call(aten.reshape.default, p, _along(axis, value.dim())) for p in (scale, zero))
    inverse = b.call(aten.reciprocal.default, scale)
    steps = b.call(aten.round.default, b.call(aten.mul.Tensor, b.cast(x, torch.float32), inverse))
    return b.cast(b.clamp(b.call(aten.add.Tensor, steps, zero), low, high), dtype)


def _along(axis: int, dims: int) -> list[int]:
    return [-1 if i == axis else 1 for i in range(dims)]


class PerChannelStored(Value):
    """Integers with a scale for each channel or group: weights. Products read them directly; others get floats."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._real: Node | None = None

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        raise NoIntegerFormError(self.node, "it has a scale for each channel, and its reader one for the tensor")

    def real(self, ctx: IntegerContext) -> Node:
        if self._real is None:
            with ctx.b.at(self.node):
                self._real = self._dequantized(ctx.b)
        return self._real

    def _dequantized(self, b: Builder) -> Node:
        integers, scale, zero = (operand(self.node, i) for i in range(3))
        value = integers.meta.get("val")
        out = self.node.meta.get("val")
        if not isinstance(value, Tensor):
            return self.node
        if self.node.target is qd.dequantize_per_channel_group.default:
            size = operand(self.node, 6)
            scale = b.call(aten.repeat_interleave.self_int, scale, size, 1)
            zero = None if zero is None else b.call(aten.repeat_interleave.self_int, zero, size, 1)
        else:
            along = _along(operand(self.node, 3), value.dim())
            scale = b.call(aten.reshape.default, scale, along)
            zero = None if zero is None else b.call(aten.reshape.default, zero, along)
        x = b.cast(integers, torch.float32)
        x = x if zero is None else b.call(aten.sub.Tensor, x, b.cast(zero, torch.float32))
        x = b.call(aten.mul.Tensor, x, b.cast(scale, torch.float32))
        return b.cast(x, out.dtype) if isinstance(out, Tensor) else x
