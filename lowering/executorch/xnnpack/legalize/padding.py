"""Padding: cropped by slices, and quantized again on the grid that it was read from.

    pad(x, [-1, 2])           =  pad(x[1:], [0, 2])
    pad(dequantize(A)) → op   =  pad(dequantize(A)) → quantize(A) → dequantize(A) → op      for zeros

XNNPACK does not crop, and takes a padding between a dequantize and anything but a convolution for one of integers, in a
program that fails when it is loaded. Zero lies on every grid, so the values stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.data_movement import requantized
from quant2e.graph.dataflow import literal, operand
from quant2e.graph.edit import emit, replace
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import qd

_ATEN = torch.ops.aten
_PADS = frozenset({_ATEN.pad.default, _ATEN.constant_pad_nd.default})
_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
_TAKE_PADDED = frozenset({_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.convolution.default, _QUANTIZE})


def crops_as_slices(module: GraphModule) -> int:
    """Slice where a padding with a constant is negative; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.target not in _PADS or operand(node, "mode") not in (None, "constant"):
            continue
        edges = literal(node, "pad")
        if edges is None or not all(isinstance(edge, int) for edge in edges) or min(edges, default=0) >= 0:
            continue
        x = operand(node, 0)
        for place in range(0, len(edges), 2):
            before, after = (max(-edge, 0) for edge in edges[place : place + 2])
            if before or after:
                dim = len(shape_of(x)) - 1 - place // 2
                x = emit(node, _ATEN.slice.Tensor, x, dim, before, -after if after else _END)
        rest = [max(edge, 0) for edge in edges]
        value = operand(node, "value")
        replace(node, emit(node, _ATEN.constant_pad_nd.default, x, rest, value or 0.0) if any(rest) else x)
        count += 1
    return count


_END = 2**63 - 1
"""The end of a dimension, whatever its size, as torch.export writes it."""


def closed_pads(module: GraphModule) -> int:
    """Close paddings of dequantized tensors by a pair of their own; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        source: Any = operand(node, 0) if node.target in _PADS else None
        if not isinstance(source, Node) or source.target is not _DEQUANTIZE or source.kwargs.get("out_dtype"):
            continue
        if operand(node, "mode") not in (None, "constant") or operand(node, "value") not in (None, 0, 0.0):
            continue
        if all(user.target in _TAKE_PADDED for user in node.users):
            continue
        grid = source.args[1:]
        users = list(node.users)
        pair = requantized(node.next, node, grid)
        for user in users:
            user.replace_input_with(node, pair)
        count += 1
    return count
