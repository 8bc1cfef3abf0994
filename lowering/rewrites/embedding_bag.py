"""Embedding bag decomposition.

embedding_bag(table, ids, offsets)  =  for each bag, the sum, mean or maximum of embedding(table, ids).

Runtimes have lookups and reductions, but no bags. Bags of one length, which is what two-dimensional ids export to,
are reduced along it; the rows of others are added up at the place of their bag. After this a bag's table is a
lookup's, so it is gathered in integers too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_number
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten
_BAGS = (_ATEN.embedding_bag.default, _ATEN.embedding_bag.padding_idx)
_MEAN, _MAX = 1, 2


def decompose_embedding_bags(module: GraphModule) -> int:
    """Write every embedding bag as a lookup and a reduction; returns how many.

    As documented for ``include_last_offset``, rows behind the last offset are in no bag. The maximum of bags of
    different lengths takes memory for bags x rows x columns; everything else takes that for the rows.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target not in _BAGS:
            continue
        results = [user for user in node.users if user.users]
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in results):
            continue  # the places of the rows, or the sizes of the bags, are asked for
        bags = _bags(module, node)
        for user in results:
            user.replace_all_uses_with(bags)
        for user in list(node.users):
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        count += 1
    return count


def _bags(module: GraphModule, node: Node) -> Node:
    """The bags ``node`` returns first, [bags, columns]."""
    table, ids, offsets, mode, weights = (
        operand(node, name) for name in ("weight", "indices", "offsets", "mode", "per_sample_weights")
    )
    padding = operand(node, "padding_idx") if node.target is _ATEN.embedding_bag.padding_idx else None
    closed = operand(node, "include_last_offset")
    rows = emit(node, _ATEN.embedding.default, table, ids)
    if weights is not None:
        rows = emit(node, _ATEN.mul.Tensor, rows, emit(node, _ATEN.unsqueeze.default, weights, 1))
    counted = None
    if padding is not None:
        counted = emit(node, _ATEN.ne.Scalar, ids, padding % int(shape_of(table)[0]))
    length = None if closed else _one_length(offsets, ids)
    if length is not None:
        members = None if counted is None else emit(node, _ATEN.unflatten.int, counted, 0, [-1, length])
        return _reduced(module, node, emit(node, _ATEN.unflatten.int, rows, 0, [-1, length]), members, mode)
    place = _place(node, ids, offsets)
    if mode == _MAX:
        members = emit(node, _ATEN.eq.Tensor, emit(node, _ATEN.unsqueeze.default, place, 0), _numbered(node, offsets))
        if counted is not None:
            members = emit(node, _ATEN.logical_and.default, members, counted)
        bags = _reduced(module, node, emit(node, _ATEN.unsqueeze.default, rows, 0), members, mode)
    else:
        bags = _added_up(module, node, rows, place, offsets, counted, mode)
    return emit(node, _ATEN.slice.Tensor, bags, 0, 0, -1) if closed else bags


def _one_length(offsets: Node, ids: Node) -> int | None:
    """How many rows every bag has, where the offsets are multiples of one number up to the number of ids."""
    if offsets.target is not _ATEN.arange.start_step or len(offsets.args) != 3:
        return None
    start: Any
    end: Any
    step: Any
    start, end, step = (one.meta["val"] if isinstance(one, Node) else one for one in offsets.args)
    rows: Any = shape_of(ids)[0]
    whole = start == 0 and isinstance(step, int) and step > 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy: not while importing

    return step if whole and statically_known_true(end == rows) and statically_known_true(rows % step == 0) else None


def _reduced(module: GraphModule, node: Node, rows: Node, members: Node | None, mode: int) -> Node:
    """[bags, columns] of rows [bags or 1, rows, columns]; ``members``, [bags, rows], says which of them count."""
    if members is None:
        op = {_MEAN: _ATEN.mean.dim, _MAX: _ATEN.amax.default}.get(mode, _ATEN.sum.dim_IntList)
        return emit(node, op, rows, [1])
    members = emit(node, _ATEN.unsqueeze.default, members, 2)
    found = emit(
        node, _ATEN.where.self, members, rows, _like(module, node, rows, float("-inf") if mode == _MAX else 0.0)
    )
    if mode == _MAX:
        highest = emit(node, _ATEN.amax.default, found, [1])
        return emit(
            node, _ATEN.where.self, emit(node, _ATEN.any.dim, members, 1), highest, _like(module, node, rows, 0.0)
        )
    total = emit(node, _ATEN.sum.dim_IntList, found, [1])
    return _averaged(node, total, emit(node, _ATEN.sum.dim_IntList, members, [1])) if mode == _MEAN else total


def _added_up(
    module: GraphModule, node: Node, rows: Node, place: Node, offsets: Node, counted: Node | None, mode: int
) -> Node:
    """Sums or means, [offsets, columns], of rows [rows, columns] that go to the bags at ``place``, [rows]."""
    if counted is not None:
        counted = emit(node, _ATEN.unsqueeze.default, counted, 1)
        rows = emit(node, _ATEN.where.self, counted, rows, _like(module, node, rows, 0.0))
    column, bags = (emit(node, _ATEN.unsqueeze.default, one, 1) for one in (place, offsets))
    total = _scattered(node, rows, column, bags)
    if mode != _MEAN:
        return total
    dtype = rows.meta["val"].dtype
    ones = emit(node, _ATEN.full_like.default, column, 1, dtype=dtype)
    if counted is not None:
        ones = emit(node, _ATEN.to.dtype, counted, dtype)
    return _averaged(node, total, _scattered(node, ones, column, bags))


def _scattered(node: Node, values: Node, column: Node, bags: Node) -> Node:
    """Zeros of as many rows as ``bags``, with every row of ``values`` added to the row that ``column`` says."""
    width = int(shape_of(values)[1])
    wide = emit(node, _ATEN.expand.default, bags, [-1, width])
    nothing = emit(node, _ATEN.full_like.default, wide, 0, dtype=values.meta["val"].dtype)
    return emit(
        node, _ATEN.scatter_add.default, nothing, 0, emit(node, _ATEN.expand.default, column, [-1, width]), values
    )


def _averaged(node: Node, total: Node, size: Node) -> Node:
    """Total over size; an empty bag stays zero."""
    size = emit(node, _ATEN.to.dtype, size, total.meta["val"].dtype)
    return emit(node, _ATEN.div.Tensor, total, emit(node, _ATEN.clamp.default, size, 1))


def _place(node: Node, ids: Node, offsets: Node) -> Node:
    """The bag of every row, [rows]: how many offsets are at or in front of it, less one."""
    row = emit(node, _ATEN.unsqueeze.default, _counting(node, ids), 1)
    before = emit(node, _ATEN.lt.Tensor, emit(node, _ATEN.unsqueeze.default, offsets, 0), row)
    return emit(node, _ATEN.sub.Tensor, emit(node, _ATEN.sum.dim_IntList, before, [1]), _one(node, ids))


def _numbered(node: Node, offsets: Node) -> Node:
    """0, 1, 2, … as a column, one for each offset."""
    numbers = emit(node, _ATEN.sub.Tensor, _counting(node, offsets), _one(node, offsets))
    return emit(node, _ATEN.unsqueeze.default, numbers, 1)


def _one(node: Node, like: Node) -> Node:
    return emit(node, _ATEN.full_like.default, like, 1, dtype=torch.int64)


def _counting(node: Node, like: Node) -> Node:
    """1, 2, 3, … in int64, as many as ``like`` has, also where that is not known before it runs."""
    return emit(node, _ATEN.cumsum.default, _one(node, like), 0)


def _like(module: GraphModule, node: Node, rows: Node, value: float) -> Node:
    """A number in the dtype of the rows."""
    found, dtype = emit_number(module, node, value), rows.meta["val"].dtype
    return found if dtype is torch.float32 else emit(node, _ATEN.to.dtype, found, dtype)
