"""Lookup tables: functions of one number, with an entry for each integer of the operand.

    out = table[x],        table[i] = q(f(dq(i)))

256 entries for 8 bits, 65,536 for 16. A chain of such functions is one table. Entries are computed once, in float, with
the functions of the Q/DQ graph. A function of an accumulator has thresholds instead
(`quant2e.integer.arithmetic.thresholds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.thresholds import on_thresholds
from quant2e.integer.arithmetic.values import IntegerContext, Stored, Value, grid_attributes
from quant2e.integer.ops.data_movement import Clamped, Moved

aten = torch.ops.aten

_BITS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.uint16: 16}


class Function(Value):
    """A function of one value. ``root``: what it is a function of;
    ``operands``: node → ``root``, or functions of it.
    """

    def __init__(self, node: Node, root: Value, operands: dict[Node, Value]) -> None:
        super().__init__(node)
        self.root, self.operands = root, operands

    def unit(self) -> float:
        return self.root.unit()

    def apply(self, x: Tensor) -> Tensor:
        """The function on floats ``x`` of the root."""

        def argument(a: Any) -> Any:
            value = self.operands.get(a) if isinstance(a, Node) else None
            return value.apply(x) if isinstance(value, Function) else a if value is None else x

        assert callable(self.node.target)
        y = self.node.target(*map(argument, self.node.args), **self.node.kwargs)
        assert isinstance(y, Tensor)
        return y

    def functions(self) -> dict[Node, Function]:
        """The function and those it is made of."""
        found: dict[Node, Function] = {self.node: self}
        for value in self.operands.values():
            if isinstance(value, Function):
                found |= value.functions()
        return found

    def _quantized(self, ctx: IntegerContext, grid: Grid) -> Node:
        functions, source = self.functions(), self.root
        own = source.grid
        if own is None or own.dtype not in _BITS:
            if not all(node.target in _TAME for node in functions):
                raise NoIntegerFormError(
                    self.node,
                    f"its operand '{source.node.name}' is a sum of integers, and it turns there without end",
                )
            out, count = on_thresholds(ctx, self.node, source, lambda x: _staircase(self, x, grid), grid)
            for node in functions:
                ctx.integer[node.name] = f"{count} thresholds on a sum of integers"
            return out
        integers = source.quantized(ctx, own)
        low = torch.iinfo(own.dtype).min
        steps = torch.arange(2 ** _BITS[own.dtype], dtype=torch.int32) + low
        table = grid.quantize(self.apply(own.dequantize(steps)))
        index = ctx.b.cast(integers, torch.int64)
        if low:
            index = ctx.b.call(aten.sub.Tensor, index, low)
        entries = ctx.b.constant(table, f"{self.node.name}_table")
        out = ctx.b.call(aten.index.Tensor, entries, [index])
        for node in functions:
            ctx.integer[node.name] = f"table of {len(table)} entries"
        ctx.b.record(
            Record(
                name=self.node.name,
                kind="table",
                inputs={"x": integers.name},
                output=out.name,
                constants={"table": table},
                attributes={"first": low} | grid_attributes(grid),
            )
        )
        return out


def _staircase(function: Function, x: Tensor, grid: Grid) -> Tensor:
    """The integers of a function of float64 numbers, int64; ties to even, without the noise of float32."""
    steps = torch.round(function.apply(x) / grid.scale) + grid.zero_point
    return steps.clamp(grid.quant_min, grid.quant_max).to(torch.int64)


def unary_table(ctx: IntegerContext, node: Node) -> Value:
    """The form of a function whose other operands are numbers."""
    tensors = node.all_input_nodes
    if len(tensors) != 1 or operand(node, 0) is not tensors[0]:
        raise NoIntegerFormError(node, "it is no function of one tensor")
    source = ctx.value(tensors[0], node)
    return Function(node, _root(source), {tensors[0]: source})


def joint(ctx: IntegerContext, node: Node) -> Function | None:
    """``x * sigmoid(x)`` and the like: a function of one value, though it has two operands; None for others."""
    values = {n: ctx.values.get(n) for n in node.all_input_nodes}
    known = {n: v for n, v in values.items() if v is not None}
    roots = [_root(v) for v in known.values()]
    if len(known) < len(values) or not any(isinstance(v, Function) for v in known.values()):
        return None
    return Function(node, roots[0], known) if all(_same(roots[0], root) for root in roots) else None


def _root(value: Value) -> Value:
    return value.root if isinstance(value, Function) else value


def _same(a: Value, b: Value) -> bool:
    """Whether two values are equal, element by element: each consumer has its own dequantize op."""
    stored = isinstance(a, Stored) and isinstance(b, Stored) and a.integers is b.integers and a.grid == b.grid
    return a is b or stored


_UNARY = (
    "sigmoid", "tanh", "hardswish", "hardsigmoid", "gelu", "silu", "mish", "exp", "expm1", "log", "log1p", "log2",
    "log_sigmoid", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "sin", "cos", "erf", "elu", "selu", "celu",
    "leaky_relu", "softplus", "square", "floor", "ceil", "round", "sign", "atan", "sinh", "cosh", "hardshrink",
    "softshrink", "threshold", "logit",
)  # fmt: skip
_SCALAR = ("pow.Tensor_Scalar", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar", "div.Tensor")

_WITHOUT_END = frozenset(
    {"sin", "cos", "floor", "ceil", "round", "log", "log2", "log1p", "sqrt", "rsqrt", "logit", "reciprocal"}
)
"""Change without end, or are not defined everywhere: of 8-bit numbers a table lists them, of a sum nothing does."""


def _overloads() -> list[Any]:
    found = [getattr(aten, name).default for name in _UNARY]
    for name in _SCALAR:
        packet, overload = name.split(".")
        found.append(getattr(getattr(aten, packet), overload))
    return found


_TAME = frozenset(t for t in _overloads() if t._schema.name.removeprefix("aten::") not in _WITHOUT_END) | {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.relu.default, aten.relu6.default, aten.hardtanh.default,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
}  # fmt: skip
"""Functions whose staircase ends in both directions; of a tensor and a number."""


def _of_two(ctx: IntegerContext, node: Node) -> Value:
    found = joint(ctx, node)
    if found is None:
        raise NoIntegerFormError(node, "it is no function of one tensor")
    return found


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    **dict.fromkeys(_overloads(), unary_table),
    **dict.fromkeys((aten.maximum.default, aten.minimum.default), _of_two),
}
"""Target → form."""

__all__ = ["FORMS", "Clamped", "Function", "Moved", "Stored", "unary_table"]
