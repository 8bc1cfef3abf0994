"""Nearest upsampling as concatenations.

upsample_nearest(x, by m × n)  =  each value m × n times: concatenations of x with itself, seen as one image.

    [.., H, W]  →  view [.., H·W, 1]  →  cat of n  =  [.., H, n·W]  →  view [.., H, 1, n·W]  →  cat of m  =  [.., m·H,
    n·W]

XNNPACK has no nearest neighbour. Moving values is exact, between integers as well.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import fixed, unary
from quant2e.annotation.pattern import Match
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten
_UPSAMPLES = frozenset({_ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest2d.default})


def _whole_factors(node: Node) -> bool | str:
    before, after = shape_of(operand(node, 0)), shape_of(node)
    if not fixed(*before, *after):
        return f"'{node.name}' has sizes that vary"
    whole = all(int(big) % int(small) == 0 for big, small in zip(after[2:], before[2:], strict=True))
    return whole or f"'{node.name}' does not repeat every value equally often"


def _nearest(_: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    after = [int(size) for size in shape_of(node)]
    batch, channels, height, width = (int(size) for size in shape_of(x))
    down, across = after[2] // height, after[3] // width
    wide = _repeated(node, x, [batch, channels, height * width, 1], across)
    tall = _repeated(node, wide, [batch, channels, height, width * across], down)
    return emit(node, _ATEN.reshape.default, tall, after)


def _repeated(node: Node, x: Node, shape: list[int], times: int) -> Node:
    """``x`` seen as ``shape``, so many times beside itself in the last dimension."""
    # XNNPACK wants different tensors to concatenate: one view per copy
    copies = [emit(node, _ATEN.reshape.default, x, shape) for _ in range(times)]
    return emit(node, _ATEN.cat.default, copies, -1) if times > 1 else copies[0]


repeat_nearest = Rewrite("repeat_nearest", unary(*_UPSAMPLES, when=_whole_factors), _nearest)
"""Upsampling of images of fixed size by whole factors."""
