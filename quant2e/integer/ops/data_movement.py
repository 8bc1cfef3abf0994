"""Data movement in integers: ops that move values or keep their order compute on the integers themselves.

    q(move(x)) = move(q(x))        q(clamp(x, a, b)) = clamp(q(x), q(a), q(b))        q(max(x)) = max(q(x))

The second and third hold because quantization never reverses an order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.data_movement import Effect, When, movements
from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Stored, Value, grid_attributes

aten = torch.ops.aten

_CUTS = movements(Effect.SPLIT)
_JOINS = movements(Effect.JOIN)
MOVES = movements(integers=True) - _CUTS - _JOINS - movements(Effect.ZEROS)
"""Every value of the result is one of the first operand's."""
_AMONG_ZEROS = movements(Effect.ZEROS, integers=True)
_BY_STRIDES = movements() - movements(integers=True)


class Moved(Value):
    """Values at other places."""

    def __init__(self, node: Node, source: Value, *, drop: bool = False) -> None:
        super().__init__(node)
        self.source = source
        self._drop = drop

    @property
    def grid(self) -> Grid | None:
        return self.source.grid

    def unit(self) -> float:
        return self.source.unit()

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "moves integers"
        if self._drop:
            return x
        args = (x if a is self.node.args[0] else _shape_giver(ctx, a) for a in self.node.args)
        return ctx.b.call(self.node.target, *args, **self.node.kwargs)


def _shape_giver(ctx: IntegerContext, argument: Any) -> Any:
    """An argument of a move; of a quantized tensor (``view_as(x, y)``) only the sizes are read, which integers have."""
    value = ctx.values.get(argument) if isinstance(argument, Node) else None
    return argument if value is None or value.grid is None else value.quantized(ctx, value.grid)


class Clamped(Value):
    """Values limited to ``low..high``, floats."""

    def __init__(self, node: Node, source: Value, low: float, high: float) -> None:
        super().__init__(node)
        self.source, self.low, self.high = source, low, high

    @property
    def grid(self) -> Grid | None:
        """That of the operand, when the bounds lie on it: zero always does."""
        grid = self.source.grid
        return grid if grid is not None and all(math.isinf(v) or v == 0 for v in (self.low, self.high)) else None

    def unit(self) -> float:
        return self.source.unit()

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "clamp of integers"
        low, high = grid.bound(self.low), grid.bound(self.high)
        if low <= grid.quant_min and high >= grid.quant_max:
            return x
        out = ctx.b.clamp(x, low, high)
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="clamp",
                inputs={"x": x.name},
                output=out.name,
                constants={},
                attributes={"low": low, "high": high} | grid_attributes(grid),
            )
        )
        return out


class Padded(Moved):
    """A border of one value around others: an integer of the grid, rounded as any other."""

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "pads integers"
        border = grid.bound(float(operand(self.node, "value") or 0.0))
        out = ctx.b.call(aten.constant_pad_nd.default, x, operand(self.node, "pad"), border)
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="pad",
                inputs={"x": x.name},
                output=out.name,
                constants={},
                attributes={"pad": list(operand(self.node, "pad")), "border": border} | grid_attributes(grid),
            )
        )
        return out


class AmongZeros(Moved):
    """Values among zeros, which are zero points: the integers move as distances from it."""

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "moves integers"
        zero = grid.bound(0.0)
        wide = ctx.b.shifted(x, zero)
        moved = ctx.b.call(self.node.target, wide, *self.node.args[1:], **self.node.kwargs)
        return ctx.b.cast(ctx.b.call(aten.add.Tensor, moved, zero) if zero else moved, grid.dtype)


class SplitPart(Value):
    """One of the tensors into which another is cut."""

    def __init__(self, node: Node, source: Moved) -> None:
        super().__init__(node)
        self.source = source

    @property
    def grid(self) -> Grid | None:
        return self.source.grid

    def unit(self) -> float:
        return self.source.unit()

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        return ctx.b.call(operator.getitem, self.source.quantized(ctx, grid), self.node.args[1])


class FirstOf(Value):
    """The results of an op that gives several, of which only the ``first`` has integers."""

    def __init__(self, node: Node, first: Value) -> None:
        super().__init__(node)
        self.first = first

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        raise NoIntegerFormError(self.node, "it has several results")


class Joined(Value):
    """A concatenation: every operand on the scale of the result."""

    def __init__(self, node: Node, sources: list[Value]) -> None:
        super().__init__(node)
        self.sources = sources

    @property
    def grid(self) -> Grid | None:
        grids = {source.grid for source in self.sources}
        return grids.pop() if len(grids) == 1 else None

    def unit(self) -> float:
        return max(source.unit() for source in self.sources)

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        parts = [source.quantized(ctx, grid) for source in self.sources]
        ctx.integer[self.node.name] = "joins integers"
        dim = operand(self.node, "dim")
        out = ctx.b.call(self.node.target, parts, dim)
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="stack" if self.node.target is aten.stack.default else "cat",
                inputs={f"x{i}": part.name for i, part in enumerate(parts)},
                output=out.name,
                constants={},
                attributes={"dim": dim} | grid_attributes(grid),
            )
        )
        return out


def _moved(ctx: IntegerContext, node: Node) -> Value:
    return Moved(node, ctx.value(node.args[0], node))


def _by_strides(_ctx: IntegerContext, node: Node) -> Value:
    raise NoIntegerFormError(node, "it reads memory by strides, and integers may lie in another order")


def _among_zeros(ctx: IntegerContext, node: Node) -> Value:
    return AmongZeros(node, ctx.value(node.args[0], node))


def _split_part(ctx: IntegerContext, node: Node) -> Value:
    source = ctx.value(node.args[0], node)
    if isinstance(source, FirstOf) and node.args[1] == 0:
        return Moved(node, source.first, drop=True)
    if not isinstance(source, Moved):
        raise NoIntegerFormError(node, "it takes one of several results")
    return SplitPart(node, source)


def _padded(ctx: IntegerContext, node: Node) -> Value:
    mode = operand(node, "mode")
    if mode not in (None, "constant"):
        return _moved(ctx, node)  # with values of the tensor itself
    if not isinstance(operand(node, "value") or 0.0, int | float):
        raise NoIntegerFormError(node, "what it pads with is no constant")
    return Padded(node, ctx.value(node.args[0], node))


def _dropout(ctx: IntegerContext, node: Node) -> Value:
    if operand(node, "train") is not False:
        raise NoIntegerFormError(node, "it drops values, in training mode")
    return Moved(node, ctx.value(node.args[0], node), drop=True)


def _cast(ctx: IntegerContext, node: Node) -> Value:
    source = ctx.value(node.args[0], node)
    before, after = source.node.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        raise NoIntegerFormError(node, "it changes the dtype")
    return Moved(node, source, drop=True)


def clamp(low: float | str, high: float | str) -> Callable[[IntegerContext, Node], Value]:
    """The form of a clamp whose bounds are numbers, or the names of operands that hold them."""

    def bound(node: Node, given: float | str, otherwise: float) -> float:
        if not isinstance(given, str):
            return float(given)
        value = operand(node, given)
        if value is None:
            return otherwise
        if not isinstance(value, int | float):
            raise NoIntegerFormError(node, "a bound is a tensor")
        return float(value)

    def form(ctx: IntegerContext, node: Node) -> Value:
        source = ctx.value(node.args[0], node)
        return Clamped(node, source, bound(node, low, -math.inf), bound(node, high, math.inf))

    return form


def _joined(ctx: IntegerContext, node: Node) -> Value:
    tensors: Any = node.args[0]
    return Joined(node, [ctx.value(t, node) for t in tensors])


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(_AMONG_ZEROS, _among_zeros),
    **dict.fromkeys(_BY_STRIDES, _by_strides),
    **dict.fromkeys(movements(when=When.EVALUATION), _dropout),
    **dict.fromkeys(movements(when=When.SAME_DTYPE), _cast),
    aten.relu.default: clamp(0, math.inf),
    aten.relu6.default: clamp(0, 6),
    aten.hardtanh.default: clamp("min_val", "max_val"),
    aten.clamp.default: clamp("min", "max"),
    aten.clip.default: clamp("min", "max"),
    aten.clamp_min.default: clamp("min", math.inf),
    aten.clamp_max.default: clamp(-math.inf, "max"),
    **dict.fromkeys(_CUTS, _moved),
    **dict.fromkeys(movements(when=When.PADDING), _padded),
    operator.getitem: _split_part,
    **{target: _joined for target in _JOINS if any(a.name == "dim" for a in target._schema.arguments)},
}
"""Target → form."""

__all__ = ["FORMS", "MOVES", "Clamped", "Joined", "Moved", "Stored"]
