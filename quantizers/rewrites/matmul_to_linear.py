"""addmm(b, x, w)  =  linear(x, wᵀ, b)      and      x @ w  =  linear(x, wᵀ)      where ``w`` is constant.

Backends know one product with a constant weight, linear. Some models (GPT-2's Conv1D) spell it otherwise. The node
keeps its name and its metadata; only what it calls changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit
from quant2e.graph.fake_values import node_tensor

aten = torch.ops.aten

ORIGINAL_TARGET = "original_target"
"""Key in ``node.meta`` of what a rewritten node called before, so that settings for that op still find it."""


def products_as_linear(gm: GraphModule, wanted: Callable[[Node], bool]) -> bool:
    """Rewrite the products that ``wanted`` answers True for. Returns whether any was."""
    constants, changed = Constants(gm.graph), False
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or (parts := _parts(node)) is None or not wanted(node):
            continue
        x, weight, bias = parts
        if x in constants or weight not in constants or (bias is not None and bias not in constants):
            continue
        transposed = emit(node, aten.t.default, weight)
        node.meta[ORIGINAL_TARGET] = node.target
        node.target, node.kwargs = aten.linear.default, {}
        node.args = (x, transposed) if bias is None else (x, transposed, bias)
        changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return changed


def _parts(node: Node) -> tuple[Node, Node, Node | None] | None:
    """Input, weight and bias of a product of a matrix (or a stack of rows) and a matrix; None for other nodes."""
    bias = None
    if node.target is aten.addmm.default:
        if operand(node, "alpha") not in (None, 1) or operand(node, "beta") not in (None, 1):
            return None
        bias, x, weight = (operand(node, i) for i in range(3))
        if _rank(bias) != 1:
            return None
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight = (operand(node, i) for i in range(2))
    else:
        return None
    if not isinstance(x, Node) or not isinstance(weight, Node) or (_rank(x) or 0) < 1 or _rank(weight) != 2:
        return None
    return x, weight, bias


def _rank(node: object) -> int | None:
    tensor = node_tensor(node)
    return None if tensor is None else tensor.dim()
