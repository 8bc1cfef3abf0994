"""Functionalization: in-place ops become their functional forms, so that one table of integer forms serves both.

y = relu_(x);  z = f(x)        =>        y = relu(x);  z = f(y)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quant2e.graph.effects import aliases, is_in_place
from quant2e.graph.fake_values import node_tensor, value_of_call
from quant2e.graph.mutation import seen_through, written_nodes

aten = torch.ops.aten


def use_functional_ops(gm: GraphModule) -> int:
    """Replace every in-place ATen op whose write nobody sees through another name; returns how many.

    Readers of the written tensor that come later read the result. An op that writes to a buffer, an input or a tensor
    that has views is left as it is, and so are one that returns nothing, and one whose functional form gives another
    dtype (an in-place op keeps that of its operand).
    """
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    count = 0
    for node in list(gm.graph.nodes):
        if not is_in_place(node) or seen_through(node) is not None:
            continue
        target = _functional(node.target)
        written = operand(node, 0)
        if target is None or not isinstance(written, Node) or written not in aliases(node):
            continue
        before, node.target = node.target, target
        if not _keeps_dtype(node, written):
            node.target = before
            continue
        for user in list(written.users):
            if user is not node and place[user] > place[node]:
                user.replace_input_with(written, node)
        count += 1
    return count


def _keeps_dtype(node: Node, written: Node) -> bool:
    """Whether the result of ``node`` has the dtype of ``written``, as far as the graph knows it."""
    wanted, found = node_tensor(written), value_of_call(node)
    return wanted is None or not isinstance(found, Tensor) or found.dtype is wanted.dtype


def exposed(gm: GraphModule) -> frozenset[Node]:
    """What the in-place ops that are left write to, under any of its names: integers would not see the write."""
    return frozenset(node for node in written_nodes(gm.graph) if not is_in_place(node))


def _functional(target: Any) -> Any:
    """The overload that computes what an in-place one writes; None when ATen has none with the same operands."""
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if not name.endswith("_") or found is None:
        return None
    given, wanted = ([a.name for a in t._schema.arguments] for t in (target, found))
    return found if given == wanted[: len(given)] else None
