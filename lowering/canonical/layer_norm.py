"""layer_norm(x)  =  (x - m) · rsqrt(v + eps) · w + b,  with m and v as products with a vector of 1/n.

XNNPACK has no layer norm and no mean over one dimension; it has everything on the right. A model whose blocks are
joined by layer norms becomes one delegate instead of a pair per block.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.canonical.edit import constant, emit, shape_of

_ATEN = torch.ops.aten


def open_layer_norm(module: GraphModule) -> int:
    """Rewrite layer norms over the last dimension of float32 tensors; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.layer_norm.default:
            continue
        x, shape = node.args[:2]
        if not isinstance(x, Node) or not isinstance(shape, list | tuple) or len(shape) != 1:
            continue
        size: int | torch.SymInt = shape_of(x)[-1]
        if x.meta["val"].dtype is not torch.float32 or not isinstance(size, int) or len(shape_of(x)) < 2:
            continue
        node.replace_all_uses_with(_normalised(module, node, x, size))
        module.graph.erase_node(node)
        count += 1
    return count


def _normalised(module: GraphModule, node: Node, x: Node, size: int) -> Node:
    weight = node.args[2] if len(node.args) > 2 else None
    bias = node.args[3] if len(node.args) > 3 else None
    eps = node.args[4] if len(node.args) > 4 else 1e-5
    average = constant(module, node, "layer_norm_average", torch.full((1, size), 1 / size))
    centred = emit(node, _ATEN.sub.Tensor, x, emit(node, _ATEN.linear.default, x, average))
    variance = emit(node, _ATEN.linear.default, emit(node, _ATEN.mul.Tensor, centred, centred), average)
    epsilon = constant(module, node, "layer_norm_eps", torch.tensor([eps], dtype=torch.float32))
    spread = emit(node, _ATEN.rsqrt.default, emit(node, _ATEN.add.Tensor, variance, epsilon))
    result = emit(node, _ATEN.mul.Tensor, centred, spread)
    if isinstance(weight, Node):
        result = emit(node, _ATEN.mul.Tensor, result, weight)
    if isinstance(bias, Node):
        result = emit(node, _ATEN.add.Tensor, result, bias)
    return result
