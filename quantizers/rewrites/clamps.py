"""clamp(x, 0)  =  relu(x)      and      clamp(x, low, high)  =  hardtanh(x, low, high)      where ``x`` is a product.

Backends fuse these two spellings into the product in front of them. The node keeps its name and its metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.dataflow import operand
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

aten = torch.ops.aten

_CLAMPS: dict[Any, Any] = {
    **dict.fromkeys((aten.clamp.default, aten.clip.default, aten.clamp_min.default), ""),
    **dict.fromkeys((aten.clamp_.default, aten.clip_.default, aten.clamp_min_.default), "_"),
}
"""Clamp → what its in-place form ends in."""


def clamps_as_fused(gm: GraphModule, wanted: Callable[[Node], bool]) -> bool:
    """Rewrite the clamps that ``wanted`` answers True for. Returns whether any was."""
    changed = False
    for node in gm.graph.nodes:
        suffix = _CLAMPS.get(node.target)
        if suffix is None or not isinstance(x := operand(node, 0), Node) or not wanted(node):
            continue
        low, high = operand(node, "min"), operand(node, "max")
        args: tuple[Any, ...] = (x,)
        if low == 0 and high is None:
            target = getattr(aten, f"relu{suffix}").default
        elif _are_numbers(low, high) and low < high:
            target, args = getattr(aten, f"hardtanh{suffix}").default, (x, low, high)
        else:
            continue
        node.meta[ORIGINAL_TARGET] = node.target
        node.target, node.args, node.kwargs = target, args, {}
        changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return changed


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
