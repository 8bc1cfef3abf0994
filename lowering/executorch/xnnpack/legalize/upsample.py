"""upsample_nearest(x, by m × n)  =  each value m × n times: concatenations of x with itself, seen as one image.

    [.., H, W]  →  view [.., H·W, 1]  →  cat of n  =  [.., H, n·W]  →  view [.., H, 1, n·W]  →  cat of m  =  [.., m·H,
    n·W]

XNNPACK has no nearest neighbour. Moving values is exact, between integers as well.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten
_UPSAMPLES = frozenset({_ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest2d.default})


def repeat_nearest(module: GraphModule) -> int:
    """Rewrite upsampling of images of fixed size by whole factors; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        x = node.args[0] if node.op == "call_function" and node.target in _UPSAMPLES else None
        if not isinstance(x, Node):
            continue
        before, after = shape_of(x), shape_of(node)
        if not all(isinstance(size, int) for size in (*before, *after)):
            continue
        batch, channels, height, width = (int(size) for size in before)
        down, across = int(after[2]) // height, int(after[3]) // width
        if (down * height, across * width) != tuple(after[2:]):
            continue
        wide = _repeated(node, x, [batch, channels, height * width, 1], across)
        tall = _repeated(node, wide, [batch, channels, height, width * across], down)
        result = emit(node, _ATEN.reshape.default, tall, list(after))
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
        count += 1
    return count


def _repeated(node: Node, x: Node, shape: list[int], times: int) -> Node:
    """``x`` seen as ``shape``, so many times beside itself in the last dimension."""
    # XNNPACK wants different tensors to concatenate: one view per copy
    copies = [emit(node, _ATEN.reshape.default, x, shape) for _ in range(times)]
    return emit(node, _ATEN.cat.default, copies, -1) if times > 1 else copies[0]
