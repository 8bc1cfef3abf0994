"""Constant folding.

f(constants)  =  a constant.

Positions, masks and rows looked up at fixed positions are computed once, here, instead of on every call. Nothing is
computed that would make the file bigger: dequantized weights stay integers, and a result larger than what it is
computed from, beyond a floor, is left in the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from quant2e.graph.attributes import tensor_at
from quant2e.graph.constants import Constants
from quant2e.graph.edit import emit_constant
from quant2e.graph.effects import writes
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE

FLOOR = 64 * 1024
"""Results up to this many bytes are stored whatever they are computed from (a causal mask comes from nothing)."""


def fold_constants(module: GraphModule) -> int:
    """Replace what depends on constants only; returns how many constants took the place of computations."""
    values: dict[Node, Tensor] = {}
    roots: dict[Node, int] = {}
    with torch.no_grad():
        for node in list(Constants(module.graph)):
            _evaluate(module, node, values, roots)
    count = 0
    for node, value in values.items():
        if node.op == "get_attr" or all(user in values for user in node.users):
            continue
        stored = emit_constant(module, node, "folded", value.detach().clone().contiguous())
        node.replace_all_uses_with(stored)
        count += 1
    return count


def _evaluate(module: GraphModule, node: Node, values: dict[Node, Tensor], roots: dict[Node, int]) -> None:
    if node.op == "get_attr":
        tensor = tensor_at(module, node)
        if tensor is not None:
            values[node], roots[node] = tensor, tensor.nbytes
        return
    if not _foldable(node) or any(source not in values for source in node.all_input_nodes):
        return
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    result = node.target(*args, **kwargs) if callable(node.target) else None
    bytes_in = sum(roots[source] for source in node.all_input_nodes)
    if isinstance(result, Tensor) and result.nbytes <= max(bytes_in, FLOOR):
        values[node], roots[node] = result, bytes_in


def _foldable(node: Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or writes(node):
        return False
    if target in QUANTIZE or target in DEQUANTIZE or target in CHOOSE_QPARAMS:
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)
