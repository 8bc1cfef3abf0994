"""Taking tensors apart and putting them together by slices and concatenations only.

    split, chunk     =  one slice per part that is used
    stack(x, y; d)   =  cat(unsqueeze(x, d), unsqueeze(y, d); d)
    roll(x, s; d)    =  cat(x[-s:], x[:-s]; d)
    op(expand(x), y) =  op(x, y)   where op broadcasts x to the same shape

XNNPACK slices and concatenates; it does not split, stack, roll or expand.
"""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten
_SPLITS = frozenset({_ATEN.split.Tensor, _ATEN.split.sizes, _ATEN.split_with_sizes.default, _ATEN.chunk.default})
_BROADCASTING = frozenset({_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor})


def slice_pieces(module: GraphModule) -> int:
    """Rewrite splits along a dimension of fixed size, stacks, and rolls; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _SPLITS:
            count += _split(node)
        elif node.target is _ATEN.stack.default:
            count += _stacked(node)
        elif node.target is _ATEN.roll.default:
            count += _rolled(node)
    return count


def _split(node: Node) -> int:
    x, dim = node.args[0], operand(node, "dim") or 0
    if not isinstance(x, Node) or not isinstance(shape_of(x)[dim], int):
        return 0
    dim %= len(shape_of(x))
    ends = [0, *accumulate(int(part.shape[dim]) for part in node.meta["val"])]
    for part in [user for user in node.users if user.target is operator.getitem]:
        index = part.args[1]
        assert isinstance(index, int)
        index %= len(ends) - 1
        piece = emit(part, _ATEN.slice.Tensor, x, dim, ends[index], ends[index + 1])
        part.replace_all_uses_with(piece)
        node.graph.erase_node(part)
    return 1


def _stacked(node: Node) -> int:
    parts, dim = operand(node, 0), operand(node, "dim") or 0
    if not isinstance(parts, list | tuple) or len(parts) < 2:
        return 0
    dim %= len(shape_of(node))
    raised = {part: emit(node, _ATEN.unsqueeze.default, part, dim) for part in dict.fromkeys(parts)}
    _replace(node, emit(node, _ATEN.cat.default, [raised[part] for part in parts], dim))
    return 1


def _rolled(node: Node) -> int:
    x, shifts, dims = node.args[0], operand(node, "shifts"), operand(node, "dims")
    if not isinstance(x, Node) or not dims or not all(isinstance(size, int) for size in shape_of(x)):
        return 0
    result: Node = x
    for shift, dim in zip(shifts, dims, strict=True):
        size = int(shape_of(x)[dim])
        cut = -shift % size
        if cut:
            tail = emit(node, _ATEN.slice.Tensor, result, dim, cut, size)
            head = emit(node, _ATEN.slice.Tensor, result, dim, 0, cut)
            result = emit(node, _ATEN.cat.default, [tail, head], dim)
    _replace(node, result)
    return 1


def implicit_expand(module: GraphModule) -> int:
    """Drop expansions that change nothing, or that arithmetic does by itself; returns how many uses."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (_ATEN.expand.default, _ATEN.expand_as.default):
            continue
        x: Any = node.args[0]
        if shape_of(x) == shape_of(node):
            node.replace_all_uses_with(x)
            count += 1
            continue
        for user in list(node.users):
            if user.target in _BROADCASTING and _broadcasts(user, node, x):
                user.replace_input_with(node, x)
                count += 1
    return count


def _broadcasts(user: Node, expanded: Node, x: Node) -> bool:
    others = [arg for arg in user.args[:2] if arg is not expanded]
    if len(others) != 1 or not isinstance(others[0], Node):
        return False
    return bool(torch.broadcast_shapes(shape_of(x), shape_of(others[0])) == shape_of(user))


def _replace(node: Node, result: Node) -> None:
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
