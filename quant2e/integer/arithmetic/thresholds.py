"""Threshold functions of an accumulator: the sum on a fine grid, and thresholds on it.

    t = requantize(acc) on 23 bits,        out = values[#{i: thresholds[i] <= t}]

An accumulator has too many values for a table with an entry for each; its output has 256. So the table lists where the
output changes: a staircase, found in float64 when the graph is written. The fine grid is the accumulator's own scale
times a power of two, wide enough for every number at which the output still changes; one of its steps is some 10⁻⁵
output steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Value, grid_attributes

aten = torch.ops.aten

BITS = 22
"""Bits of a number on the fine grid, without its sign."""

_FIRST_STRIDE = 2**10
_OCTAVES = 40
_PER_OCTAVE = 64

Staircase = Callable[[Tensor], Tensor]
"""Float64 numbers to the integers of the output, int64."""


def on_thresholds(ctx: IntegerContext, node: Node, source: Value, function: Staircase, grid: Grid) -> tuple[Node, int]:
    """The integers on ``grid`` of a function of ``source``, and how many thresholds it takes.

    Raises `NoIntegerFormError` when ``source`` cannot be requantized, or the output still changes at very large
    numbers.
    """
    fine = fine_grid(node, function, source.unit())
    thresholds, values = changes(function, fine)
    t = source.quantized(ctx, fine)
    kept = values.to(grid.dtype)
    places = ctx.b.constant(thresholds.to(torch.int32), f"{node.name}_thresholds")
    passed = ctx.b.call(aten.bucketize.Tensor, t, places, right=True)
    out = ctx.b.call(aten.index.Tensor, ctx.b.constant(kept, f"{node.name}_values"), [passed])
    ctx.b.record(
        Record(
            name=node.name,
            kind="thresholds",
            inputs={"x": t.name},
            output=out.name,
            constants={"thresholds": thresholds.to(torch.int32), "values": kept},
            attributes={"in_scale": fine.scale} | grid_attributes(grid),
        )
    )
    return out, len(thresholds)


def fine_grid(node: Node, function: Staircase, unit: float) -> Grid:
    """``unit`` times a power of two, such that the output changes within ``2**BITS`` steps of zero only."""
    powers = torch.exp2(
        torch.arange(-_OCTAVES * _PER_OCTAVE, _OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE
    )
    x = torch.cat([-powers.flip(0), torch.zeros(1, dtype=torch.float64), powers])
    steps = (function(x).diff() != 0).nonzero().flatten()
    reach = 2.0**-_OCTAVES
    if len(steps):
        first, last = int(steps[0]), int(steps[-1])
        if first == 0 or last == len(x) - 2:
            raise NoIntegerFormError(node, "its result changes at numbers beyond any accumulator")
        reach = max(abs(float(x[first])), abs(float(x[last + 1])))
    exponent = math.ceil(math.log2(reach / unit)) - BITS
    scale = math.ldexp(unit, exponent)
    return Grid(scale=scale, zero_point=0, quant_min=-(2**BITS), quant_max=2**BITS, dtype=torch.int32)


def changes(function: Staircase, fine: Grid) -> tuple[Tensor, Tensor]:
    """Where the output changes on the fine grid (int64, rising), and its values before, between and after (one more).

    The grid is sampled, and each interval whose ends differ is halved until neighbours are left. Between equal samples
    the function counts as constant: at a turning point that leaves out less than a hundredth of an output step.
    """
    at = torch.arange(fine.quant_min, fine.quant_max + 1, _FIRST_STRIDE)
    out = function(at.to(torch.float64) * fine.scale)
    changed = (out.diff() != 0).nonzero().flatten()
    left, right, left_out, right_out = at[changed], at[changed + 1], out[changed], out[changed + 1]
    stride = _FIRST_STRIDE
    while stride > 1:
        stride //= 2
        middle = left + stride
        middle_out = function(middle.to(torch.float64) * fine.scale)
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
        left_out, right_out = torch.cat([left_out, middle_out]), torch.cat([middle_out, right_out])
        keep = left_out != right_out
        left, right, left_out, right_out = left[keep], right[keep], left_out[keep], right_out[keep]
    order = right.argsort()
    return right[order], torch.cat([out[:1], right_out[order]])
