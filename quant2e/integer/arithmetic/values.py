"""Integer values: what is known about a float tensor of the Q/DQ graph, and the integers that stand for it.

A `Value` belongs to one float node. It is asked for integers on a grid (by a quantize op) or for floats (by an op that
has no integer form), and writes nodes only then. Requantization moves towards the source: a quantize op commutes with
ops that only move values, with clamps and with maxima, so these compute on the narrow integers of their output.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.constants import Constants
from quant2e.integer.arithmetic.builder import Builder, NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.requantization import Ratio
from quant2e.integer.arithmetic.rescale import Term, requantize, weighted_sum

aten = torch.ops.aten


@dataclass(slots=True)
class IntegerContext:
    """The graph being rewritten, and what is known so far.

    ``values``: float node → its integers. ``constants``: nodes that depend on parameters only. ``integer``: float ops
    whose integer form was written. ``left``: float ops that stay, and why. ``failed``: ops whose result cannot be
    requantized in integers, and why. ``exposed``: float nodes that an op writes to in place, where others see it.
    ``why``: the reason of an op that computes in float because floats are asked of it.
    """

    gm: GraphModule
    b: Builder
    constants: Constants
    values: dict[Node, Value] = field(default_factory=dict)
    integer: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    exposed: frozenset[Node] = frozenset()
    why: str = "its result is not quantized"

    def value(self, operand: Any, of: Node) -> Value:
        """The integers of an operand; raises `NoIntegerFormError` when it has none."""
        found = self.values.get(operand) if isinstance(operand, Node) else None
        if found is None:
            what = (
                f"its operand '{operand.name}' is not quantized"
                if isinstance(operand, Node)
                else "an operand is a number"
            )
            raise NoIntegerFormError(of, what)
        return found

    def keep(self, node: Node, reason: str) -> None:
        """Let a float op compute in float, on dequantized operands."""
        self.left.setdefault(node.name, reason)
        for operand in list(node.all_input_nodes):
            value = self.values.get(operand)
            if value is not None and (real := value.real(self)) is not operand:
                node.replace_input_with(operand, real)


def rank(node: Node) -> int:
    """How many dimensions the tensor of a node has. Raises `NoIntegerFormError` when that is not recorded."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise NoIntegerFormError(node, "its shape is not recorded")
    return value.dim()


class Value(ABC):
    """The integers of one float node, not yet written."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.forms: dict[Grid, Node] = {}

    @property
    def grid(self) -> Grid | None:
        """The grid on which the float value lies exactly, if there is one."""
        return None

    def quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        """Integers of the value on ``grid``. Raises `NoIntegerFormError`."""
        if grid not in self.forms:
            with ctx.b.at(self.node):
                self.forms[grid] = self._quantized(ctx, grid)
        return self.forms[grid]

    @abstractmethod
    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node: ...

    def real(self, ctx: IntegerContext) -> Node:
        """The float value: the float node itself, on dequantized operands."""
        ctx.keep(self.node, ctx.why)
        return self.node

    def parts(self, ctx: IntegerContext) -> list[Part]:
        """The value as a sum of integers with scales. Raises `NoIntegerFormError` when it is not one."""
        raise NoIntegerFormError(self.node, f"the result of '{self.node.name}' is no sum of integers")

    def unit(self) -> float:
        """How far apart the value's numbers lie: its scale, the largest one where there are several.

        Raises `NoIntegerFormError` when its numbers do not lie on scales.
        """
        if self.grid is not None:
            return self.grid.scale
        raise NoIntegerFormError(self.node, f"the result of '{self.node.name}' is no sum of integers")


@dataclass(frozen=True, slots=True)
class Part:
    """Integers that stand for ``sign * node * Π scales / count``; a 1-D scale runs along ``axis``.

    ``span``: the largest magnitude. ``narrow``: straight from a tensor of 8 bits. ``owner``: the op that summed them
    up. ``accumulator``: the int32 or int64 sums themselves, where ``node`` is them with fraction bits.
    """

    node: Node
    scales: tuple[float | Tensor, ...]
    span: int
    axis: int | None = None
    narrow: bool = False
    sign: int = 1
    count: float | Tensor = 1
    owner: str = ""
    accumulator: Node | None = None

    def unit(self) -> float:
        """What one of the integers is worth; the most, where that varies."""
        factors = [torch.as_tensor(s).to(torch.float64).abs().max() for s in self.scales]
        return float(math.prod(factors) / torch.as_tensor(self.count).to(torch.float64).min())

    def term(self, grid: Grid, dims: int) -> Term:
        """The part in steps of ``grid``."""
        ratio = Ratio.of(self.scales, grid.scale, self.count)
        return Term(self.node, ratio, self.span, self.axis, dims, self.narrow, self.sign)


class Stored(Value):
    """A tensor of integers that is already in the graph, between a quantize and a dequantize op."""

    def __init__(self, node: Node, integers: Node, grid: Grid) -> None:
        super().__init__(node)
        self.integers = integers
        self._grid = grid
        self._real: Node | None = None

    @property
    def grid(self) -> Grid:
        return self._grid

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        if grid == self._grid:
            return self.integers
        part = self.parts(ctx)[0]
        out, constants = requantize(ctx.b, part.term(grid, 0), grid, self.node)
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="requantize",
                inputs={"x": self.integers.name},
                output=out.name,
                constants=constants,
                attributes={"zero_point": self._grid.zero_point} | grid_attributes(grid),
            )
        )
        return out

    def real(self, ctx: IntegerContext) -> Node:
        if self._real is None:
            with ctx.b.at(self.node):
                self._real = dequantize(ctx.b, self.integers, self._grid, self.node)
        return self._real

    def parts(self, ctx: IntegerContext) -> list[Part]:
        with ctx.b.at(self.node):
            wide = ctx.b.shifted(self.integers, self._grid.zero_point)
        narrow = self._grid.dtype in (torch.int8, torch.uint8)
        return [Part(wide, (self._grid.scale,), self._grid.span, narrow=narrow)]


def dequantize(b: Builder, integers: Node, grid: Grid, node: Node) -> Node:
    """``(q - zero_point) * scale`` in the float dtype of ``node``."""
    value = node.meta.get("val")
    x = b.cast(integers, value.dtype if isinstance(value, Tensor) else torch.float32)
    if grid.zero_point:
        x = b.call(aten.sub.Tensor, x, grid.zero_point)
    return b.call(aten.mul.Tensor, x, grid.scale)


def grid_attributes(grid: Grid) -> dict[str, Any]:
    """The output grid, as plain data for a record."""
    return {
        "out_scale": grid.scale,
        "out_zero_point": grid.zero_point,
        "out_min": grid.quant_min,
        "out_max": grid.quant_max,
        "out_dtype": str(grid.dtype).removeprefix("torch."),
    }


class Wide(Value):
    """An accumulator, or a sum of several: what a convolution, a product or an average leaves before requantization.

    ``kind``, ``inputs``, ``constants``, ``attributes``: what a record of it says.
    """

    def __init__(
        self,
        node: Node,
        parts: Sequence[Part],
        *,
        kind: str,
        inputs: dict[str, str],
        constants: dict[str, Tensor] | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(node)
        self._parts = list(parts)
        self.kind = kind
        self.inputs = inputs
        self.constants = constants or {}
        self.attributes = attributes or {}

    def parts(self, ctx: IntegerContext) -> list[Part]:
        return self._parts

    def unit(self) -> float:
        return max(part.unit() for part in self._parts)

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        terms = [part.term(grid, 0 if part.axis is None else rank(self.node)) for part in self._parts]
        if len(terms) == 1 and terms[0].sign > 0:
            out, constants = requantize(ctx.b, terms[0], grid, self.node)
        else:
            out, constants = weighted_sum(ctx.b, terms, grid, self.node)
        for part in self._parts:
            if part.owner:
                ctx.integer.setdefault(part.owner, f"its {accumulator_text([part])} is a term of '{self.node.name}'")
        ctx.integer[self.node.name] = f"{self.kind}, {accumulator_text(self._parts)}"
        ctx.b.record(
            Record(
                name=self.node.name,
                kind=self.kind,
                inputs=self.inputs,
                output=out.name,
                constants=self.constants | constants,
                attributes=self.attributes | grid_attributes(grid),
                accumulator=self._accumulator(),
            )
        )
        return out

    def _accumulator(self) -> str | None:
        """The node with the sums, where there is one."""
        if len(self._parts) > 1:
            return None
        return (self._parts[0].accumulator or self._parts[0].node).name


def accumulator_text(parts: Sequence[Part]) -> str:
    """The width of the accumulators, for the report."""
    wide = any(part.span >= 2**31 for part in parts)
    return "int64 accumulator (int32 could overflow)" if wide else "int32 accumulator"
