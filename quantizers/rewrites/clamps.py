"""Clamps as activations.

clamp(x, 0)  =  relu(x)      and      clamp(x, low, high)  =  hardtanh(x, low, high)      where ``x`` is a product.

Backends fuse these two spellings into the product in front of them. The node keeps its name and its metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.dataflow import operand
from quant2e.passes.rewrite import Rewrite
from quantizers.rewrites.matmul_to_linear import ORIGINAL_TARGET

aten = torch.ops.aten

_CLAMPS: dict[Any, Any] = {
    **dict.fromkeys((aten.clamp.default, aten.clip.default, aten.clamp_min.default), ""),
    **dict.fromkeys((aten.clamp_.default, aten.clip_.default, aten.clamp_min_.default), "_"),
}
"""Clamp → what its in-place form ends in."""


def clamps_as_fused(wanted: Callable[[Node], bool]) -> Rewrite:
    """The clamps that ``wanted`` answers True for, in the spelling that is fused."""
    clamp = Op(frozenset(_CLAMPS), (Arg("x"),), when=_has_a_spelling, aliased=True)
    return Rewrite("clamps_as_fused", clamp, _respelled, lambda match: wanted(match.root) or "it is not wanted")


def _has_a_spelling(node: Node) -> bool | str:
    low, high = operand(node, "min"), operand(node, "max")
    relu, hardtanh = low == 0 and high is None, _are_numbers(low, high) and low < high
    return relu or hardtanh or f"'{node.name}' clamps to [{low}, {high}], which is neither relu nor hardtanh"


def _respelled(_: GraphModule, match: Match) -> Node:
    node, suffix = match.root, _CLAMPS[match.root.target]
    x, low, high = match.edges["x"][0], operand(node, "min"), operand(node, "max")
    node.meta[ORIGINAL_TARGET] = node.target
    if high is None:
        node.target, node.args, node.kwargs = getattr(aten, f"relu{suffix}").default, (x,), {}
    else:
        node.target, node.args, node.kwargs = getattr(aten, f"hardtanh{suffix}").default, (x, low, high), {}
    return node


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
