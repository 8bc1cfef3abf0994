"""Embedding lookup before dequantization.

embedding(dequantize(table), ids)  =  dequantize(embedding(table, ids)).

Rows are dequantized after they are gathered, so the table stays in integers in the file and in memory, and the
work is that of the rows asked for. The same integers meet the same scales in the same float operations, so the
result is bit-equal.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import qd

_ATEN = torch.ops.aten


def gather_then_dequantize(module: GraphModule) -> int:
    """Rewrite every lookup in a dequantized table; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (_ATEN.embedding.default, _ATEN.index_select.default):
            continue
        dequantize = node.args[0]
        if (
            not isinstance(dequantize, Node)
            or tensor_at(module, dequantize.args[0] if dequantize.args else None) is None
        ):
            continue
        if node.target is _ATEN.index_select.default and node.args[1] not in (0, -dequantize.meta["val"].dim()):
            continue
        rows = _rows(module, node, dequantize)
        if rows is not None:
            node.replace_all_uses_with(rows)
            module.graph.erase_node(node)
            count += 1
    return count


def _gather(node: Node, table: Node) -> Node:
    ids = node.args[1] if node.target is _ATEN.embedding.default else node.args[2]
    if node.target is _ATEN.embedding.default:
        return emit(node, _ATEN.embedding.default, table, ids)
    return emit(node, _ATEN.index_select.default, table, 0, ids)


def _rows(module: GraphModule, node: Node, dequantize: Node) -> Node | None:
    """The float rows, or None when the table's quantization is not one that has a scale per row, column or table."""
    dtype = dequantize.kwargs.get("out_dtype") or torch.float32
    if dequantize.target is qd.dequantize_per_tensor.default:
        _, scale, zero_point, *_ = dequantize.args
        values = _centred(
            module, node, _gather(node, _node(dequantize.args[0])), torch.tensor(zero_point), gather=False
        )
        scales = emit_constant(module, node, "embedding_scale", torch.tensor(scale, dtype=torch.float32))
        return _cast(emit(node, _ATEN.mul.Tensor, values, scales), node, dtype)
    if dequantize.target is qd.dequantize_per_channel_group.default:
        return _group_rows(module, node, dequantize)
    if dequantize.target is not qd.dequantize_per_channel.default:
        return None
    table, scales_at, zeros_at, axis = dequantize.args[:4]
    scale_of, zero_of = tensor_at(module, scales_at), tensor_at(module, zeros_at)
    if scale_of is None or (zeros_at is not None and zero_of is None) or axis not in (0, 1):
        return None
    if dequantize.meta["val"].dim() != 2:
        return None
    per_row = axis == 0
    shape = (-1, 1) if per_row else (-1,)
    values = _gather(node, _node(table))
    zeros = torch.zeros((), dtype=torch.int64) if zero_of is None or not zero_of.any() else zero_of.reshape(shape)
    values = _centred(module, node, values, zeros, gather=zeros.dim() == 2)
    scales = emit_constant(module, node, "embedding_scales", scale_of.reshape(shape).contiguous())
    if per_row:
        scales = _gather(node, scales)
    return _cast(emit(node, _ATEN.mul.Tensor, values, scales), node, dtype)


def _group_rows(module: GraphModule, node: Node, dequantize: Node) -> Node | None:
    """Rows of a table with a scale per group of columns."""
    table, scales_at, zeros_at, *_, group, dtype = dequantize.args
    scale_of, zero_of = tensor_at(module, scales_at), tensor_at(module, zeros_at)
    if scale_of is None or (zeros_at is not None and zero_of is None) or not isinstance(group, int):
        return None
    values = _gather(node, _node(table))
    columns = int(shape_of(values)[-1])
    rank = len(shape_of(values))
    grouped = emit(node, _ATEN.unflatten.int, values, rank - 1, [columns // group, group])
    zeros = torch.zeros((), dtype=torch.int64)
    if zero_of is not None and zero_of.any():
        zeros = zero_of.reshape(len(scale_of), -1, 1)
    centred = _centred(module, node, grouped, zeros, gather=zeros.dim() == 3)
    scales = _gather(
        node, emit_constant(module, node, "embedding_scales", scale_of.reshape(len(scale_of), -1).contiguous())
    )
    scaled = emit(node, _ATEN.mul.Tensor, centred, emit(node, _ATEN.unsqueeze.default, scales, rank))
    return _cast(emit(node, _ATEN.flatten.using_ints, scaled, rank - 1, rank), node, dtype)


def _gather_any(node: Node, table: Node) -> Node:
    """`_gather`; rows of more than one dimension are flattened for it, and taken apart again."""
    if len(shape_of(table)) == 2:
        return _gather(node, table)
    shape = [int(size) for size in shape_of(table)[1:]]
    rows = _gather(node, emit(node, _ATEN.flatten.using_ints, table, 1))
    return emit(node, _ATEN.unflatten.int, rows, len(shape_of(rows)) - 1, shape)


def _node(arg: object) -> Node:
    assert isinstance(arg, Node)
    return arg


def _centred(module: GraphModule, node: Node, values: Node, zeros: torch.Tensor, *, gather: bool) -> Node:
    """float(rows) - zero points. Integers up to 2^24 are exact in float32, so the order of cast and sum is free."""
    values = emit(node, _ATEN.to.dtype, values, torch.float32)
    if not zeros.any():
        return values
    offset = emit_constant(module, node, "embedding_zero_points", zeros.to(torch.float32))
    return emit(node, _ATEN.sub.Tensor, values, _gather_any(node, offset) if gather else offset)


def _cast(node: Node, like: Node, dtype: object) -> Node:
    return node if dtype is torch.float32 else emit(like, _ATEN.to.dtype, node, dtype)
