"""Hoisting of broadcast values: what many numbers share, an attention mask above all, is computed once.

Inductor computes pointwise values inside of what reads them. A mask of 128 by 128 that the scores of 12 heads in 6
layers read would be computed 72 times, conversions from integers included, and take longer than the softmax behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from quant2e.graph.dataflow import readers
from quant2e.graph.effects import is_in_place, is_view, writes
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE

aten = torch.ops.aten

FACTOR = 4
"""How many times as many numbers a reader has, at the least, for a value to be computed before it."""

_POINTWISE = frozenset({aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Tensor})
"""Pointwise ops that torch does not tag as such."""


def shared_values_first(gm: GraphModule) -> int:
    """``x + mask`` => ``x + prims.inductor_force_stride_order(mask, …)``, which has Inductor write the mask to memory.

    For values that readers broadcast to at least `FACTOR` times their size. Sizes that vary are left to Inductor.
    """
    written, count = written_first(), 0
    for node in list(gm.graph.nodes):
        value = node.meta.get("val")
        if not _computed(node) or not isinstance(value, Tensor) or not _fixed(value):
            continue
        behind = {user: list(readers(user, is_view)) if is_view(user) else [user] for user in node.users}
        if any(writes(reader) for found in behind.values() for reader in found):
            continue  # who reads it afterwards reads something else
        users = [user for user, found in behind.items() if any(_widens(reader, value) for reader in found)]
        if users:
            with gm.graph.inserting_after(node):
                made = call(gm, node, written, node, tuple(value.stride()))
            made.meta["val"] = value
            for user in users:
                user.replace_input_with(node, made)
            count += 1
    return count


def _computed(node: Node) -> bool:
    """Whether a node is a result that is not quantized, in memory of its own."""
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target not in DEQUANTIZE | QUANTIZE
        and not is_view(node)
        and not is_in_place(node)
    )


def _fixed(value: Tensor) -> bool:
    return value.numel() > 0 and all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _widens(reader: Node, value: Any) -> bool:
    """Whether ``reader`` computes several numbers with each of the value's."""
    made = reader.meta.get("val")
    if not isinstance(reader.target, torch._ops.OpOverload) or not isinstance(made, Tensor) or not _fixed(made):
        return False
    pointwise = torch.Tag.pointwise in reader.target.tags or reader.target in _POINTWISE
    return pointwise and made.numel() >= FACTOR * value.numel()


def written_first() -> Any:
    """The op by which Inductor writes a value to memory before what reads it: takes the value and its strides."""
    import torch._inductor.inductor_prims

    return torch.ops.prims.inductor_force_stride_order.default
