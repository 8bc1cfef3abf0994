"""Functions of one number: a table with an entry for each integer of the operand.

    out = table[x],        table[i] = q(f(dq(i)))

256 entries for 8 bits, 65,536 for 16. A chain of such functions is one table. Entries are computed once, in float, with
the functions of the Q/DQ graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.dataflow import is_in_place, operand
from quant2e.integer.build import NoIntegerFormError, Record
from quant2e.integer.grid import Grid
from quant2e.integer.moves import Clamped, Moved
from quant2e.integer.values import Context, Stored, Value, grid_attributes

aten = torch.ops.aten

_BITS = {torch.int8: 8, torch.uint8: 8, torch.int16: 16, torch.uint16: 16}


class Function(Value):
    """A function of one operand. ``source``: the operand's value."""

    def __init__(self, node: Node, source: Value) -> None:
        super().__init__(node)
        self.source = source

    def apply(self, x: Tensor) -> Tensor:
        """The function on floats."""
        assert callable(self.node.target)
        args = tuple(x if a is self.source.node else a for a in self.node.args)
        y = self.node.target(*args, **self.node.kwargs)
        assert isinstance(y, Tensor)
        return y

    def _quantized(self, ctx: Context, grid: Grid) -> Node:
        chain: list[Function] = [self]
        while isinstance(source := chain[-1].source, Function):
            chain.append(source)
        own = source.grid
        if own is None:
            raise NoIntegerFormError(
                self.node, f"its operand '{source.node.name}' is not quantized by itself, so no table can be read"
            )
        if own.dtype not in _BITS:
            raise NoIntegerFormError(self.node, f"its operand is {own.dtype}, too wide for a table")
        integers = source.quantized(ctx, own)
        low = torch.iinfo(own.dtype).min
        steps = torch.arange(2 ** _BITS[own.dtype], dtype=torch.int32) + low
        values = own.dequantize(steps)
        for function in reversed(chain):
            values = function.apply(values)
        table = grid.quantize(values)
        index = ctx.b.cast(integers, torch.int64)
        if low:
            index = ctx.b.call(aten.sub.Tensor, index, low)
        entries = ctx.b.constant(table, f"{self.node.name}_table")
        out = ctx.b.call(aten.index.Tensor, entries, [index])
        for function in chain:
            ctx.integer[function.node.name] = f"table of {len(table)} entries"
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


def unary(ctx: Context, node: Node) -> Value:
    """The form of a function whose other operands are numbers."""
    tensors = node.all_input_nodes
    if len(tensors) != 1 or operand(node, 0) is not tensors[0] or is_in_place(node):
        raise NoIntegerFormError(node, "it is no function of one tensor")
    return Function(node, ctx.value(tensors[0], node))


_UNARY = (
    "sigmoid", "tanh", "hardswish", "hardsigmoid", "gelu", "silu", "mish", "exp", "expm1", "log", "log1p", "log2",
    "log_sigmoid", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "sin", "cos", "erf", "elu", "selu", "celu",
    "leaky_relu", "softplus", "square", "floor", "ceil", "round", "sign", "atan", "sinh", "cosh", "hardshrink",
    "softshrink", "threshold", "logit",
)  # fmt: skip
_SCALAR = ("pow.Tensor_Scalar", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar", "div.Tensor")


def _overloads() -> list[Any]:
    found = [getattr(aten, name).default for name in _UNARY]
    for name in _SCALAR:
        packet, overload = name.split(".")
        found.append(getattr(getattr(aten, packet), overload))
    return found


FORMS: Mapping[Any, Callable[[Context, Node], Value]] = dict.fromkeys(_overloads(), unary)
"""Target → form."""

__all__ = ["FORMS", "Clamped", "Function", "Moved", "Stored", "unary"]
