"""Constant folding.

f(constants)  =  a constant.

Positions, masks and rows looked up at fixed positions are computed once, here, instead of on every call. Nothing is
computed that would make the program bigger: dequantized weights stay integers, and a result larger than what it is
computed from, beyond a floor, is left in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.edit import emit_constant
from quant2e.graph.effects import writes
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE

FLOOR = 64 * 1024
"""Results up to this many bytes are stored whatever they are computed from (a causal mask comes from nothing)."""


def fold_constants(module: GraphModule) -> int:
    """Replace what depends on constants only; returns how many constants took the place of computations."""
    values: dict[Node, Any] = {}
    bytes_of: dict[Node, int] = {}  # what a value is computed from, of the nodes whose values are small enough
    for node in list(Constants(module.graph)):
        if (tensor := tensor_at(module, node)) is not None:
            bytes_of[node] = tensor.nbytes
        elif _foldable(node) and all(source in bytes_of for source in node.all_input_nodes):
            result = evaluate(module, node, values)
            bytes_in = sum(bytes_of[source] for source in node.all_input_nodes)
            if isinstance(result, Tensor) and result.nbytes <= max(bytes_in, FLOOR):
                bytes_of[node] = bytes_in
            else:
                del values[node]
    count = 0
    for node in bytes_of:
        if node.op == "get_attr" or all(user in bytes_of for user in node.users):
            continue
        stored = emit_constant(module, node, "folded", values[node].detach().clone().contiguous())
        node.replace_all_uses_with(stored)
        count += 1
    return count


def _foldable(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or writes(node):
        return False
    if target in QUANTIZE or target in DEQUANTIZE or target in CHOOSE_QPARAMS:
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)
