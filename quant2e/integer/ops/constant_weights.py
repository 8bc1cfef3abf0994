"""Constant weights: their integers, scales and zero points, through the ops that move them.

w = move(dq(integers, scale, zero_point))   =   dq(move(integers), move(scale), move(zero_point))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.constants import evaluate
from quant2e.graph.dataflow import operand
from quant2e.graph.qdq_ops import qd
from quant2e.integer.arithmetic.builder import NoIntegerFormError
from quant2e.integer.arithmetic.grid import grid_of
from quant2e.integer.arithmetic.values import IntegerContext
from quant2e.integer.ops.data_movement import MOVES

_PER_CHANNEL = qd.dequantize_per_channel.default
_PER_GROUP = qd.dequantize_per_channel_group.default


@dataclass(slots=True)
class IntegerWeight:
    """An integer constant.

    ``scale``, ``zero_point``: numbers; 1-D along ``axis``, or [1] and the same along every axis (None); or 2-D [rows,
    groups] when ``group_size`` is not 0. ``source``: the node that reads ``integers``, when they are kept as they are.
    """

    integers: Tensor
    scale: float | Tensor
    zero_point: int | Tensor
    axis: int | None
    group_size: int = 0
    source: Node | None = None

    def _zero_points(self) -> Tensor | None:
        """Zero points shaped like the integers or broadcasting to them; None when all are 0."""
        zero = torch.as_tensor(self.zero_point)
        if not bool((zero != 0).any()):
            return None
        if self.group_size:
            return zero.repeat_interleave(self.group_size, 1)
        return zero.reshape([-1 if i == self.axis else 1 for i in range(self.integers.dim())])

    def centred(self) -> Tensor:
        """``integers - zero_point``, int32."""
        zero = self._zero_points()
        wide = self.integers.to(torch.int32)
        return wide if zero is None else wide - zero.to(torch.int32)

    def without_zero_point(self) -> Tensor:
        """The integers themselves when all zero points are 0, else `centred`."""
        return self.integers if self._zero_points() is None else self.centred()

    def by_row(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points of a matrix whose scales do not run along its columns, [rows or 1, groups or
        1].
        """
        groups = self.integers.shape[1] // self.group_size if self.group_size else 1
        scale, zero = torch.as_tensor(self.scale), torch.as_tensor(self.zero_point)
        return scale.to(torch.float32).reshape(-1, groups), zero.reshape(-1, groups)

    def zero_point_list(self) -> int | list[int]:
        """Zero points as plain data: one number, or one per channel."""
        zero = torch.as_tensor(self.zero_point)
        return [int(z) for z in zero.flatten()] if zero.numel() > 1 else int(zero)

    def node(self, ctx: IntegerContext, place: Node, dtype: torch.dtype) -> Node:
        """The constant in the graph, without its zero point, in a wide dtype."""
        stored = self.source if self.source is not None else ctx.b.constant(self.integers, f"{place.name}_weight")
        wide = ctx.b.cast(stored, dtype)
        zero = self._zero_points()
        if zero is None:
            return wide
        shift = int(zero) if zero.numel() == 1 else ctx.b.constant(zero.to(dtype), f"{place.name}_weight_zero_point")
        return ctx.b.call(torch.ops.aten.sub.Tensor, wide, shift)

    def along(self, node: Node, axis: int) -> float | Tensor:
        """The scale of each output, when outputs run along ``axis``. Raises `NoIntegerFormError` for any other."""
        if self.group_size:
            raise NoIntegerFormError(
                node, "its weight has a scale for each group of inputs, which this op does not take"
            )
        if isinstance(self.scale, Tensor) and self.axis is None:
            return self.scale.expand(self.integers.shape[axis]).contiguous()
        if isinstance(self.scale, Tensor) and self.axis != axis:
            raise NoIntegerFormError(node, f"its weight has scales along dimension {self.axis}, over which the op sums")
        return self.scale

    def output_scales(self, node: Node, groups: int, *, transposed: bool) -> float | Tensor:
        """The scale of each output channel of a convolution.
        Raises `NoIntegerFormError` when the scales run along inputs.
        """
        if not isinstance(self.scale, Tensor) or not transposed:
            return self.along(node, 0)
        if self.axis == 0 and self.integers.shape[0] == groups:
            return self.scale.repeat_interleave(self.integers.shape[1])
        return torch.as_tensor(self.along(node, 1)).repeat(groups)


def integer_weight_of(ctx: IntegerContext, node: Any) -> IntegerWeight | None:
    """The integers behind a constant operand; None when it is not constant, or float."""
    if not isinstance(node, Node) or node not in ctx.constants:
        return None
    chain: list[Node] = []
    current = node
    while current.target in MOVES and isinstance(current.args[0], Node):
        chain.append(current)
        current = current.args[0]
    found = _dequantized(ctx, current)
    if found is None or not chain:
        return found
    return _moved(found, chain[::-1])


def _dequantized(ctx: IntegerContext, node: Node) -> IntegerWeight | None:
    grid = grid_of(node)
    source = operand(node, 0) if node.op == "call_function" else None
    if not isinstance(source, Node):
        return None
    if grid is not None and node.target is qd.dequantize_per_tensor.default:
        return IntegerWeight(evaluate(ctx.gm, source), grid.scale, grid.zero_point, None, source=source)
    if node.target in (_PER_CHANNEL, _PER_GROUP):
        integers, scale = evaluate(ctx.gm, source), evaluate(ctx.gm, operand(node, 1)).detach()
        zero_node = operand(node, 2)
        zero = evaluate(ctx.gm, zero_node).detach() if isinstance(zero_node, Node) else torch.zeros_like(scale)
        if zero.is_floating_point() and bool((zero != zero.round()).any()):
            return None
        if node.target is _PER_GROUP:
            size = operand(node, 6)
            return IntegerWeight(integers, scale, zero.to(torch.int64), None, group_size=int(size), source=source)
        return IntegerWeight(integers, scale, zero.to(torch.int64), operand(node, 3), source=source)
    return None


def _moved(weight: IntegerWeight, chain: list[Node]) -> IntegerWeight | None:
    """The weight after ops that move values; the scales are moved along and must still run along one axis."""
    if weight.group_size:
        return None
    shape = weight.integers.shape
    along = [-1 if i == weight.axis else 1 for i in range(len(shape))]
    integers = weight.integers
    scale = torch.as_tensor(weight.scale).reshape(along).expand(shape)
    zero = torch.as_tensor(weight.zero_point).reshape(along).expand(shape)
    for step in chain:
        if len(step.all_input_nodes) != 1:
            return None
        assert callable(step.target)
        integers, scale, zero = (step.target(t, *step.args[1:], **step.kwargs) for t in (integers, scale, zero))
    integers = integers.contiguous()
    if not isinstance(weight.scale, Tensor):
        return IntegerWeight(integers, weight.scale, weight.zero_point, None)
    if bool((scale == scale.flatten()[0]).all()) and bool((zero == zero.flatten()[0]).all()):
        return IntegerWeight(integers, scale.flatten()[:1].contiguous(), zero.flatten()[:1].contiguous(), None)
    for axis in range(integers.dim()):
        first = (slice(None) if i == axis else 0 for i in range(integers.dim()))
        line = tuple(first)
        back = [-1 if i == axis else 1 for i in range(integers.dim())]
        if bool((scale == scale[line].reshape(back)).all()) and bool((zero == zero[line].reshape(back)).all()):
            return IntegerWeight(integers, scale[line].contiguous(), zero[line].contiguous(), axis)
    return None
