"""Quantized embedding lookups: the rows asked for are dequantized, never the table.

    embedding(dq(table), i)          =>        dq(table[i])
    embedding_bag(dq(table), i, …)   =>        embedding_bag(dq(table[i]), 0 1 2 …, …)

Each rewrite does the arithmetic of the dequantize op on the rows, in its order, so the result is bit-equal. A table of
4 bits lies in memory two values to a byte, and only the rows that are read are unpacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit_constant, replace, take_over
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_BAGS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)


def gathered_rows(gm: GraphModule) -> int:
    """``embedding(dq(table), i)`` => ``dq(table[i])``, and so for bags:
    integer rows are gathered, never a float table.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not aten.embedding.default and node.target not in _BAGS:
            continue
        table, index = node.args[0], node.args[1]
        if not isinstance(table, Node) or not isinstance(index, Node):
            continue
        with gm.graph.inserting_before(node):
            rows = _rows(gm, node, table, index)
            if rows is None:
                continue
            if node.target in _BAGS:
                _bag_of_rows(gm, node, rows, index)
            else:
                take_over(rows, node)
                replace(node, rows)
        count += 1
        if not table.users:
            gm.graph.erase_node(table)
    return count


def _rows(gm: GraphModule, node: Node, table: Node, index: Node) -> Node | None:
    """The rows of a dequantized table, dequantized after they were picked; None for a table that is not dequantized."""
    if table.target is qd.dequantize_per_tensor.default:
        rows = _gathered(gm, node, table.args[0], index)
        return call(gm, node, table.target, rows, *table.args[1:], **table.kwargs)
    args = operands(table)
    if table.target is qd.dequantize_per_channel.default and args["axis"] == 0:
        return _rows_of_channels(gm, node, args, index)
    if table.target is qd.dequantize_per_channel_group.default:
        return _rows_of_groups(gm, node, args, index)
    return None


def _gathered(gm: GraphModule, node: Node, table: Any, index: Node) -> Node:
    """Rows of an integer table. Of 4-bit values: byte ``i`` of a row holds value ``i`` in its low half and value
    ``i + columns / 2`` in its high half, each plus 8.
    """
    integers = tensor_at(gm, table)
    if integers is None or not _is_of_four_bits(integers):
        return call(gm, node, aten.embedding.default, table, index)
    low, high = (integers + 8).to(torch.uint8).chunk(2, dim=1)
    packed = call(gm, node, aten.embedding.default, emit_constant(gm, node, "_packed", low | (high << 4)), index)
    halves = (
        call(gm, node, aten.bitwise_and.Scalar, packed, 15),
        call(gm, node, aten.bitwise_right_shift.Tensor_Scalar, packed, 4),
    )
    signed = [call(gm, node, aten.sub.Tensor, call(gm, node, aten.to.dtype, half, torch.int8), 8) for half in halves]
    return call(gm, node, aten.cat.default, signed, -1)


def _is_of_four_bits(table: Tensor) -> bool:
    if table.dtype is not torch.int8 or table.dim() != 2 or table.shape[1] % 2 or not table.numel():
        return False
    low, high = table.aminmax()
    return int(low) >= -8 and int(high) <= 7


def _rows_of_channels(gm: GraphModule, node: Node, table: dict[str, Any], index: Node) -> Node:
    """(rows - zero_point[i]) * scale[i]."""
    rows = _gathered(gm, node, table["input"], index)
    scales = call(gm, node, aten.unsqueeze.default, call(gm, node, aten.index.Tensor, table["scales"], [index]), -1)
    if table["zero_points"] is not None:
        points = call(gm, node, aten.index.Tensor, table["zero_points"], [index])
        rows = call(gm, node, aten.sub.Tensor, rows, call(gm, node, aten.unsqueeze.default, points, -1))
    found = call(gm, node, aten.mul.Tensor, rows, scales)
    return call(gm, node, aten.to.dtype, found, table["out_dtype"] or torch.float32)


def _rows_of_groups(gm: GraphModule, node: Node, table: dict[str, Any], index: Node) -> Node | None:
    """(rows - zero_point[i]) * scale[i] on rows cut into groups."""
    integers, size = tensor_at(gm, table["input"]), table["group_size"]
    if integers is None or integers.shape[1] % size:
        return None
    groups = integers.shape[1] // size
    rows = _gathered(gm, node, table["input"], index)
    found = call(gm, node, aten.unflatten.int, rows, -1, [groups, size])
    for name, op in (("zero_points", aten.sub.Tensor), ("scales", aten.mul.Tensor)):
        if table[name] is None:
            continue
        value = tensor_at(gm, table[name])
        if value is None:
            return None
        source = table[name] if value.dim() == 2 else emit_constant(gm, node, f"_{name}", value.reshape(-1, groups))
        picked = call(gm, node, aten.index.Tensor, source, [index])
        found = call(gm, node, op, found, call(gm, node, aten.unsqueeze.default, picked, -1))
    flat = call(gm, node, aten.flatten.using_ints, found, -2, -1)
    return call(gm, node, aten.to.dtype, flat, table["output_dtype"])


def _bag_of_rows(gm: GraphModule, bag: Node, rows: Node, index: Node) -> None:
    """Let a bag sum up rows that were picked already: by their place, or as padding, which is left out of every bag."""
    value = index.meta["val"]
    assert isinstance(value, Tensor), "an index is a tensor"
    count: Any = value.shape[0]
    length = count if isinstance(count, int) else call(gm, bag, aten.sym_size.int, index, 0)
    places = call(gm, bag, aten.arange.default, length, dtype=value.dtype, device=value.device)
    args = operands(bag)
    padding = args.get("padding_idx")
    if padding is not None and padding >= 0:
        # Row 0 of what is summed up is no row of the table: it stands for padding.
        dtype = bag.meta["val"][0].dtype
        nothing = call(gm, bag, aten.full.default, [1, bag.meta["val"][0].shape[1]], 0.0, dtype=dtype)
        rows = call(gm, bag, aten.cat.default, [nothing, rows])
        is_padding = call(gm, bag, aten.eq.Scalar, index, padding)
        places = call(gm, bag, aten.masked_fill.Scalar, call(gm, bag, aten.add.Tensor, places, 1), is_padding, 0)
        args["padding_idx"] = 0
    bag.args, bag.kwargs = (rows, places, *list(args.values())[2:]), {}
