"""Copies of what is written in place: behind a quantize or dequantize op, memory is the graph's own.

v = view(dq(x)); relu_(v)        =>        v = view(dq(x) * 1); relu_(v)

Rewrites give each reader a dequantize op of its own, look for one behind views, and move integers: all of them sound
where its result is read, and a lost write where its memory is written. None of them looks through a product.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from lowering.inductor.rewrites.graph import call
from quant2e.graph.mutation import written_nodes
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE

aten = torch.ops.aten


def copies_where_written(gm: GraphModule) -> int:
    """``dq(x)``, written in place => ``dq(x) * 1``, and ``q(x)`` => ``q(x) | 0``; returns how many."""
    count = 0
    written = written_nodes(gm.graph)
    for node in list(gm.graph.nodes):
        if node not in written or node.target not in DEQUANTIZE | QUANTIZE:
            continue
        op, number = (aten.mul.Tensor, 1.0) if node.target in DEQUANTIZE else (aten.bitwise_or.Scalar, 0)
        with gm.graph.inserting_after(node):
            copy = call(gm, node, op, node, number)
        if (value := node.meta.get("val")) is not None:
            copy.meta["val"] = value
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        count += 1
    return count
