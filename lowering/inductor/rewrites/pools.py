"""Pools of one and of three dimensions as pools of integers in two.

    q(max_pool1d(dq(x)))  =  squeeze(q(max_pool2d(dq(unsqueeze(x)))))      with the same parameters in front and behind
    q(max_pool3d(dq(x)))  =  pool_depth(pool_image(x))
    adaptive_avg_pool3d(x, sizes)  =  avg_pool3d(x, window)                where every window has the same size

Inductor has one pool of integers, the largest value in two dimensions, and it has no averages of three dimensions with
sizes of the result: those it hands to a kernel that wants floats in memory. A largest value over a box is the largest
over its depth of the largest over its layers, whatever the stride, padding and dilation of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import qd
from quant2e.passes.rewrite import Rewrite, RewriteTable

aten = torch.ops.aten

_SIZES = ("kernel_size", "stride", "padding", "dilation")
_PLAIN = (1, 1, 0, 1)
"""These sizes, of a dimension that is not pooled."""


def _requantized(pool: Any) -> Op:
    """The pattern ``q(pool(dq(x)))``."""
    dequantized = Op(frozenset({qd.dequantize_per_tensor.default}), (Arg("x"),))
    return Op(frozenset({qd.quantize_per_tensor.default}), (Op(frozenset({pool}), (dequantized,)),))


def _keeps_parameters(match: Match) -> bool | str:
    """Whether integers go in and come out with the same parameters, and the sizes that are written down are fixed."""
    dequantize, pool, quantize = match.nodes
    if dequantize.args[1:6] != quantize.args[1:6]:
        return f"'{quantize.name}' has other parameters than '{dequantize.name}'"
    before, after = shape_of(dequantize), shape_of(pool)
    if len(before) != len(_sizes(pool)[0]) + 2:
        return f"'{pool.name}' has no batch"
    fixed = len(before) == 3 or (isinstance(before[2], int) and isinstance(after[3], int))
    return fixed or f"the image of '{pool.name}' varies in size"


def _sizes(pool: Node) -> list[list[int]]:
    """Kernel, stride, padding and dilation of a pool, with one number for each dimension."""
    dimensions = 1 if pool.target is aten.max_pool1d.default else 3
    listed = [list(operand(pool, name)) for name in _SIZES]
    listed[1] = listed[1] or listed[0]
    return [each * dimensions if len(each) == 1 else each for each in listed]


def _pooled(gm: GraphModule, match: Match, x: Node, sizes: list[list[int]]) -> Node:
    """``q(max_pool2d(dq(x)))`` for the pool that matched; ``sizes``: kernel, stride, padding and dilation."""
    dequantize, pool, quantize = match.nodes
    floats = call(gm, pool, dequantize.target, x, *dequantize.args[1:])
    largest = call(gm, pool, aten.max_pool2d.default, floats, *sizes, operand(pool, "ceil_mode"))
    return call(gm, pool, quantize.target, largest, *quantize.args[1:])


def _in_one_dimension(gm: GraphModule, match: Match) -> Node:
    x, pool = match.edges["x"][0], match.nodes[1]
    sizes = [[filled, *each] for filled, each in zip(_PLAIN, _sizes(pool), strict=True)]
    with gm.graph.inserting_before(match.root):
        behind = x.target is aten.squeeze.dim and x.args[1] == 2
        flat: Any = x.args[0] if behind else call(gm, pool, aten.unsqueeze.default, x, 2)
        return call(gm, pool, aten.squeeze.dim, _pooled(gm, match, flat, sizes), 2)


def _in_three_dimensions(gm: GraphModule, match: Match) -> Node:
    x, (dequantize, pool, _) = match.edges["x"][0], match.nodes
    depth, height = shape_of(dequantize)[2], shape_of(pool)[3]
    sizes = _sizes(pool)

    def emit(target: Any, *args: Any) -> Node:
        return call(gm, pool, target, *args)

    with gm.graph.inserting_before(match.root):
        layers = emit(aten.flatten.using_ints, emit(aten.permute.default, x, [0, 2, 1, 3, 4]), 0, 1)
        layers = _pooled(gm, match, layers, [each[1:] for each in sizes])
        image = emit(aten.permute.default, emit(aten.unflatten.int, layers, 0, [-1, depth]), [0, 2, 1, 3, 4])
        columns = emit(aten.flatten.using_ints, image, 3, 4)
        columns = _pooled(gm, match, columns, [[each[0], filled] for filled, each in zip(_PLAIN, sizes, strict=True)])
        return emit(aten.unflatten.int, columns, 3, [height, -1])


def _averages_boxes(node: Node) -> bool | str:
    """Whether all windows of an adaptive average have one size, which does not vary."""
    pairs: list[tuple[Any, Any]] = [*zip(shape_of(operand(node, 0))[-3:], shape_of(node)[-3:], strict=True)]
    if not all(isinstance(size, int) for pair in pairs for size in pair):
        return f"the image of '{node.name}' varies in size"
    return all(size % out == 0 for size, out in pairs) or f"the windows of '{node.name}' differ in size"


def _average(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    window = [size // out for size, out in zip(shape_of(x)[-3:], shape_of(node)[-3:], strict=True)]
    with gm.graph.inserting_before(node):
        if all(out == 1 for out in shape_of(node)[-3:]):
            return call(gm, node, aten.mean.dim, x, [-3, -2, -1], True)
        return call(gm, node, aten.avg_pool3d.default, x, window)


pools_in_two_dimensions = RewriteTable(
    "pools_in_two_dimensions",
    (
        Rewrite("line", _requantized(aten.max_pool1d.default), _in_one_dimension, _keeps_parameters),
        Rewrite("volume", _requantized(aten.max_pool3d.default), _in_three_dimensions, _keeps_parameters),
        Rewrite(
            "boxes", Op(frozenset({aten.adaptive_avg_pool3d.default}), (Arg("x"),), when=_averages_boxes), _average
        ),
    ),
)
"""Every pool that one of the equations above holds for."""
