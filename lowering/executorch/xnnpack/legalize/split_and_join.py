"""Splits and joins of tensors as slices and concatenations only.

    split, chunk     =  one slice per part that is used
    stack(x, y; d)   =  cat(unsqueeze(x, d), unsqueeze(y, d); d)
    roll(x, s; d)    =  cat(x[-s:], x[:-s]; d)
    select(x, d, i)  =  squeeze(slice(x, d, i, i + 1), d), and unbind is one select per part
    op(expand(x), y) =  op(x, y)   where op broadcasts x to the same shape
    cat([x])         =  x          as DenseNet begins each block
    cat([dequantize(q), dequantize(q)])  =  cat([dequantize(q), dequantize'(q)])    one dequantize for each operand

XNNPACK slices, views and concatenates; it does not split, stack, roll, expand or drop a dimension. Its partitioner
counts the nodes that a concatenation reads, and takes it from two on.
"""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import unary
from lowering.executorch.xnnpack.legalize.reshape import BROADCASTING
from quant2e.annotation.pattern import Match
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.passes.rewrite import Rewrite

_ATEN = torch.ops.aten
_SPLITS = frozenset({_ATEN.split.Tensor, _ATEN.split.sizes, _ATEN.split_with_sizes.default, _ATEN.chunk.default})


def slices_and_joins(module: GraphModule) -> int:
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
        sliced = emit(part, _ATEN.slice.Tensor, x, dim, ends[index], ends[index + 1])
        part.replace_all_uses_with(sliced)
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
            if user.target in BROADCASTING and _broadcasts(user, node, x):
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


def _index(node: Node) -> tuple[Any, Any, Any]:
    """The tensor that a node selects from, the dimension, and the place."""
    if node.target is operator.getitem:
        unbind: Any = node.args[0]
        return operand(unbind, 0), operand(unbind, "dim"), node.args[1]
    return operand(node, 0), operand(node, "dim"), operand(node, "index")


def _from_fixed(node: Node) -> bool | str:
    if node.target is operator.getitem and getattr(node.args[0], "target", None) is not _ATEN.unbind.int:
        return f"'{node.name}' picks no part of an unbind"
    x, dim, index = _index(node)
    if not isinstance(x, Node) or not isinstance(dim, int) or not isinstance(index, int):
        return f"'{node.name}' selects at a place that varies"
    shape = shape_of(x)
    dim %= len(shape)
    rest = [*shape[:dim], *shape[dim + 1 :]]
    if not rest or not isinstance(shape[dim], int) or sum(not isinstance(size, int) for size in rest) > 1:
        return f"'{node.name}' leaves nothing, or several sizes that vary"
    return True


def _sliced(_: GraphModule, match: Match) -> Node:
    node = match.root
    x, dim, index = _index(node)
    dim %= len(shape_of(x))
    index %= int(shape_of(x)[dim])
    part = emit(node, _ATEN.slice.Tensor, x, dim, index, index + 1)
    # one_view spells the unknown size out as -1
    return emit(node, _ATEN.squeeze.dims, part, [dim])


slice_selects = Rewrite("slice_selects", unary(_ATEN.select.int, operator.getitem, when=_from_fixed), _sliced)
"""Selections from a dimension of fixed size."""


def distinct_operands(module: GraphModule) -> int:
    """Give operands that are concatenated with themselves a dequantize of their own; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.cat.default:
            continue
        parts, seen = list(node.args[0]), set()
        for index, part in enumerate(parts):
            if isinstance(part, Node) and part in seen and part.target in DEQUANTIZE:
                parts[index] = emit(node, part.target, *part.args, **part.kwargs)
                count += 1
            seen.add(part)
        node.args = (parts, *node.args[1:])
    return count


def lone_operands(module: GraphModule) -> int:
    """Let readers of a concatenation of one tensor read that tensor; returns how many concatenations had any.

    A result of the graph stays a tensor of its own.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.cat.default or len(node.args[0]) != 1:
            continue
        readers = [user for user in node.users if user.op != "output"]
        node.replace_all_uses_with(node.args[0][0], delete_user_cb=lambda user: user.op != "output")
        count += bool(readers)
    return count
