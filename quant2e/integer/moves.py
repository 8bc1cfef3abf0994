"""Ops that move values or keep their order: they compute on the integers themselves.

    q(move(x)) = move(q(x))        q(clamp(x, a, b)) = clamp(q(x), q(a), q(b))        q(max(x)) = max(q(x))

The second and third hold because quantization never reverses an order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quant2e.dataflow import is_in_place, operand
from quant2e.integer.build import NoIntegerFormError, Record
from quant2e.integer.grid import Grid
from quant2e.integer.values import Context, Stored, Value, grid_attributes

aten = torch.ops.aten

MOVES = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.swapdims.default,
        aten.movedim.int, aten.movedim.intlist, aten.t.default, aten.numpy_T.default, aten.mT.default,
        aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.expand.default, aten.expand_as.default,
        aten.broadcast_to.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
        aten.detach.default, aten.channel_shuffle.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
        aten.flip.default, aten.roll.default, aten.repeat.default, aten.index_select.default, aten.tile.default,
        aten.repeat_interleave.self_int, aten.select_copy.int, aten.view_copy.default, aten.permute_copy.default,
        aten.lift_fresh_copy.default, aten.diagonal.default, aten.unfold.default, aten.rot90.default,
    }
)  # fmt: skip
"""Every value of the result is one of the first operand's."""

UNLESS_TRAINING = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
"""Give their operand back in evaluation mode."""
_CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default})


class Moved(Value):
    """Values at other places."""

    def __init__(self, node: Node, source: Value, *, drop: bool = False) -> None:
        super().__init__(node)
        self.source = source
        self._drop = drop

    @property
    def grid(self) -> Grid | None:
        return self.source.grid

    def _quantized(self, ctx: Context, grid: Grid) -> Node:
        x = self.source.quantized(ctx, grid)
        ctx.integer[self.node.name] = "moves integers"
        if self._drop:
            return x
        args = tuple(x if a is self.node.args[0] else a for a in self.node.args)
        if self.node.target is aten.expand_as.default:
            args = (x, x if isinstance(args[1], Node) and args[1] is self.node.args[0] else args[1])
        return ctx.b.call(self.node.target, *args, **self.node.kwargs)


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

    def _quantized(self, ctx: Context, grid: Grid) -> Node:
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


class Joined(Value):
    """A concatenation: every operand on the scale of the result."""

    def __init__(self, node: Node, sources: list[Value]) -> None:
        super().__init__(node)
        self.sources = sources

    @property
    def grid(self) -> Grid | None:
        grids = {source.grid for source in self.sources}
        return grids.pop() if len(grids) == 1 else None

    def _quantized(self, ctx: Context, grid: Grid) -> Node:
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


def _moved(ctx: Context, node: Node) -> Value:
    return Moved(node, ctx.value(node.args[0], node))


def _dropout(ctx: Context, node: Node) -> Value:
    if operand(node, "train") is not False:
        raise NoIntegerFormError(node, "it drops values, in training mode")
    return Moved(node, ctx.value(node.args[0], node), drop=True)


def _cast(ctx: Context, node: Node) -> Value:
    source = ctx.value(node.args[0], node)
    before, after = source.node.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        raise NoIntegerFormError(node, "it changes the dtype")
    return Moved(node, source, drop=True)


def clamp(low: float | str, high: float | str) -> Callable[[Context, Node], Value]:
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

    def form(ctx: Context, node: Node) -> Value:
        source = ctx.value(node.args[0], node)
        mutated = operand(node, 0)
        if is_in_place(node) and isinstance(mutated, Node) and len(mutated.users) > 1:
            raise NoIntegerFormError(node, "it writes to a tensor that others read")
        return Clamped(node, source, bound(node, low, -math.inf), bound(node, high, math.inf))

    return form


def _joined(ctx: Context, node: Node) -> Value:
    tensors: Any = node.args[0]
    return Joined(node, [ctx.value(t, node) for t in tensors])


FORMS: Mapping[Any, Callable[[Context, Node], Value]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(UNLESS_TRAINING, _dropout),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys((aten.relu.default, aten.relu_.default), clamp(0, math.inf)),
    **dict.fromkeys((aten.relu6.default, aten.relu6_.default), clamp(0, 6)),
    **dict.fromkeys((aten.hardtanh.default, aten.hardtanh_.default), clamp("min_val", "max_val")),
    **dict.fromkeys((aten.clamp.default, aten.clamp_.default), clamp("min", "max")),
    **dict.fromkeys((aten.clamp_min.default, aten.clamp_min_.default), clamp("min", math.inf)),
    **dict.fromkeys((aten.clamp_max.default, aten.clamp_max_.default), clamp(-math.inf, "max")),
    aten.cat.default: _joined,
    aten.concat.default: _joined,
    aten.stack.default: _joined,
}
"""Target → form."""

__all__ = ["FORMS", "MOVES", "Clamped", "Joined", "Moved", "Stored"]
