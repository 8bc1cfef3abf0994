"""Inserted factors: a division in front of layers that read a tensor on which no factor can be.

linear(x, w), x a residual that others read  =>  linear(x/1, w)          1 can become s, and w become w·s

It divides, since quantizers round the operands of products, and leave quotients float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.channels.scaling import channel_scaling
from quant2e.accuracy.algorithms.channels.search import INSERTED
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.fake_values import node_tensor
from quant2e.passes.dead_code import prune_unused_attributes, remove_dead_code

aten = torch.ops.aten


def insert_factors(gm: GraphModule) -> tuple[Node, ...]:
    """Put ``x / 1`` in front of the linears that read an x without factors, one for all of them, in place."""
    readers: dict[Node, list[Node]] = {}
    for each in channel_scaling(gm).strengths:
        reads_none = each.reads is not None and not bool(each.reads.any())
        if reads_none and each.is_matrix and each.source is not None and each.node.target is aten.linear.default:
            readers.setdefault(each.source, []).append(each.node)
    made = []
    for source, nodes in readers.items():
        value = node_tensor(source)
        if value is None or not isinstance(value.shape[-1], int):
            continue
        place = min(nodes)
        weight = tensor_at(gm, operand(place, "weight"))
        ones = torch.ones(value.shape[-1], dtype=value.dtype, device=None if weight is None else weight.device)
        node = emit(place, aten.div.Tensor, source, emit_constant(gm, place, f"{source.name}_factor", ones))
        node.meta[INSERTED] = True
        for reader in nodes:
            reader.replace_input_with(source, node)
        made.append(node)
    gm.recompile()
    return tuple(made)


def drop_unused(gm: GraphModule, inserted: Sequence[Node]) -> None:
    """Drop those that are still a division by 1, in place."""
    for node in inserted:
        factor = tensor_at(gm, node.args[1])
        if factor is not None and bool((factor == 1.0).all()):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    if inserted:
        remove_dead_code(gm)
        prune_unused_attributes(gm)
        gm.recompile()
