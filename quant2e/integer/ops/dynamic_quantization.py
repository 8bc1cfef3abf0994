"""Dynamic quantization: quantize in float, multiply integers, dequantize.

scale, zero_point = choose(x);   acc = Σ (q(x) - zero_point) * w;   y = float32(acc) * (scale * scale_w) + bias

One scale for the tensor, or one for each token: each line along the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Value, rank

aten = torch.ops.aten


class DynamicStored(Value):
    """Integers whose scale and zero point are nodes: 0-D or [1], or [..., 1] with one for each token."""

    def __init__(self, node: Node, integers: Node, scale: Node, zero_point: Node, low: int, high: int) -> None:
        super().__init__(node)
        self.integers, self.scale, self.zero_point = integers, scale, zero_point
        self.span = high - low
        self._real: Node | None = None

    def shifted(self, ctx: IntegerContext, dtype: torch.dtype) -> Node:
        """``q - zero_point`` in a wide integer dtype."""
        zero = ctx.b.cast(self.zero_point, dtype)
        return ctx.b.call(aten.sub.Tensor, ctx.b.cast(self.integers, dtype), zero)

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        raise NoIntegerFormError(
            self.node, "its scale is found at run time, so there is no constant ratio to another one"
        )

    def real(self, ctx: IntegerContext) -> Node:
        if self._real is None:
            with ctx.b.at(self.node):
                shifted = self.shifted(ctx, torch.int32)
                scale = ctx.b.cast(self.scale, torch.float32)
                self._real = ctx.b.call(aten.mul.Tensor, ctx.b.cast(shifted, torch.float32), scale)
                value = self.node.meta.get("val")
                if isinstance(value, Tensor):
                    self._real = ctx.b.cast(self._real, value.dtype)
        return self._real


class DynamicProduct(Value):
    """A sum of products whose scale is known at run time: it is dequantized where it is read."""

    def __init__(
        self,
        node: Node,
        acc: Node,
        activation: DynamicStored,
        weight_scale: float | Tensor,
        axis: int,
        bias: Tensor | None,
        kind: str,
        constants: dict[str, Tensor],
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(node)
        self.constants, self.attributes = constants, attributes
        self._acc, self._activation, self._weight_scale = acc, activation, weight_scale
        self._axis, self._bias, self._kind = axis, bias, kind
        self._real: Node | None = None

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        raise NoIntegerFormError(
            self.node, "its scale is found at run time, so there is no constant ratio to another one"
        )

    def real(self, ctx: IntegerContext) -> Node:
        if self._real is None:
            ctx.integer[self.node.name] = f"dynamic {self._kind}, int32 accumulator"
            with ctx.b.at(self.node):
                self._real = self._dequantized(ctx.b)
            self._record(ctx, self._real)
        return self._real

    def _record(self, ctx: IntegerContext, real: Node) -> None:
        if "weight" not in self.constants:
            return
        known = {"weight_scale": torch.as_tensor(self._weight_scale)} | (
            {} if self._bias is None else {"bias": self._bias}
        )
        ctx.b.record(
            Record(
                name=self.node.name,
                kind=f"dynamic_{self._kind}",
                inputs={
                    "x": self._activation.integers.name,
                    "scale": self._activation.scale.name,
                    "zero_point": self._activation.zero_point.name,
                },
                output=real.name,
                constants=known | self.constants,
                attributes=self.attributes | {"channel_axis": self._axis, "out_dtype": "float32"},
                accumulator=None if self._kind == "grouped_linear" else self._acc.name,
            )
        )

    def _dequantized(self, b: Builder) -> Node:
        along = [-1 if i == self._axis else 1 for i in range(rank(self.node))]
        scale = b.cast(self._activation.scale, torch.float32)
        if isinstance(self._weight_scale, Tensor):
            own = b.constant(self._weight_scale.to(torch.float32).reshape(along), f"{self.node.name}_scale")
            scale = b.call(aten.mul.Tensor, own, scale)
        elif self._weight_scale != 1.0:
            scale = b.call(aten.mul.Tensor, scale, self._weight_scale)
        y = b.call(aten.mul.Tensor, b.cast(self._acc, torch.float32), scale)
        if self._bias is not None:
            y = b.call(
                aten.add.Tensor, y, b.constant(self._bias.to(torch.float32).reshape(along), f"{self.node.name}_bias")
            )
        value = self.node.meta.get("val")
        return b.cast(y, value.dtype) if isinstance(value, Tensor) else y


def choose_parameters(b: Builder, node: Node, *, symmetric: bool) -> tuple[Node, Node]:
    """``choose_qparams`` in ATen: scale ([1] float64) and zero point ([1] int64), bit for bit."""
    x, low, high, eps, dtype = (operand(node, i) for i in range(5))
    flat = b.call(aten.reshape.default, x, [-1])
    ends: Any = (b.call(aten.amin.default, flat, [0], True), b.call(aten.amax.default, flat, [0], True))
    smallest = b.call(aten.clamp_max.default, ends[0], 0.0)
    largest = b.call(aten.clamp_min.default, ends[1], 0.0)
    if symmetric:
        peak = b.call(aten.maximum.default, b.call(aten.neg.default, smallest), largest)
        scale = b.call(aten.clamp_min.default, b.call(aten.div.Tensor, peak, float(high - low) / 2), eps)
        zero = b.call(aten.full.default, [1], 128 if dtype == torch.uint8 else 0, dtype=torch.int64)
    else:
        extent = b.call(aten.sub.Tensor, largest, smallest)
        scale = b.call(aten.clamp_min.default, b.call(aten.div.Tensor, extent, float(high - low)), eps)
        steps = b.call(aten.round.default, b.call(aten.div.Tensor, smallest, scale))
        zero = b.call(aten.neg.default, b.cast(steps, torch.int32))
        zero = b.cast(b.clamp(b.call(aten.add.Tensor, zero, low), low, high), torch.int64)
    return b.cast(scale, torch.float64), zero


def choose_per_token(b: Builder, node: Node, *, symmetric: bool) -> tuple[Node, Node]:
    """``choose_qparams_per_token``, ``choose_qparams_per_token_asymmetric`` in ATen: [..., 1] each, bit for bit."""
    x = operand(node, 0)
    if symmetric:
        peak = b.cast(b.call(aten.amax.default, b.call(aten.abs.default, x), [-1], True), torch.float32)
        scale = b.call(aten.div.Tensor, b.call(aten.clamp_min.default, peak, 1e-5), 127)
        return scale, b.call(aten.zeros_like.default, scale)
    low = b.call(aten.clamp_max.default, b.call(aten.amin.default, x, [-1], True), 0.0)
    high = b.call(aten.clamp_min.default, b.call(aten.amax.default, x, [-1], True), 0.0)
    scale = b.call(aten.div.Tensor, b.call(aten.sub.Tensor, high, low), 255.0)
    scale = b.call(aten.clamp_min.default, scale, torch.finfo(torch.float32).eps)
    steps_low, steps_high = b.call(aten.div.Tensor, low, scale), b.call(aten.div.Tensor, high, scale)
    of_low, of_high = b.call(aten.add.Tensor, steps_low, -128), b.call(aten.add.Tensor, steps_high, 127)
    from_low = b.call(aten.gt.Scalar, b.call(aten.add.Tensor, of_low, of_high), 0)
    zero = b.call(
        aten.where.self, from_low, b.call(aten.rsub.Scalar, steps_low, -128), b.call(aten.rsub.Scalar, steps_high, 127)
    )
    zero = b.call(aten.round.default, b.clamp(zero, -128, 127))
    return b.cast(scale, torch.float64), b.cast(zero, torch.int64)


def quantize_per_token(b: Builder, node: Node, x: Node, scale: Node, zero_point: Node) -> Node:
    """``quantize_per_token`` in ATen: here the zero point is added before rounding."""
    low, high, dtype = (operand(node, i) for i in (3, 4, 5))
    steps = b.call(aten.mul.Tensor, x, b.call(aten.reciprocal.default, scale))
    steps = b.call(aten.round.default, b.call(aten.add.Tensor, steps, zero_point))
    return b.cast(b.clamp(steps, low, high), dtype)


def quantize_dynamic(b: Builder, node: Node, x: Node, scale: Node, zero_point: Node) -> Node:
    """``quantize_per_tensor`` with parameters that are nodes, in ATen."""
    low, high, dtype = (operand(node, i) for i in (3, 4, 5))
    inverse = b.cast(b.call(aten.reciprocal.default, b.cast(scale, torch.float64)), torch.float32)
    steps = b.call(aten.round.default, b.call(aten.mul.Tensor, b.cast(x, torch.float32), inverse))
    steps = b.call(aten.add.Tensor, steps, b.cast(zero_point, torch.float32))
    return b.cast(b.clamp(steps, low, high), dtype)
