"""Attention decomposition.

attention(q, k, v, mask)  =  softmax(q·kᵀ·scale + bias)·v · seen

with bias = mask in finite numbers (a masked place holds the lowest float, not -inf) and seen = 0 for the rows that
a mask hides altogether. Torch's own decomposition finds those rows by comparing every score of every head with
-inf, ops that no delegate takes; here they are found on the mask, once. A masked score is lower than any other by
more than exp can represent, so its weight is exactly 0 either way.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.matmul import product
from quant2e.graph.edit import emit, emit_constant, emit_number
from quant2e.graph.fake_values import shape_of

_ATEN = torch.ops.aten
_LOWEST = torch.finfo(torch.float32).min


def plain_attention(module: GraphModule) -> int:
    """Rewrite scaled dot product attention without dropout, of float32 tensors with static head sizes."""
    count = 0
    masks: dict[Node, tuple[Node, Node]] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.scaled_dot_product_attention.default:
            continue
        result = _attention(module, node, masks)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            count += 1
    return count


def _arguments(node: Node) -> dict[str, object]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return {"attn_mask": None, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _attention(module: GraphModule, node: Node, masks: dict[Node, tuple[Node, Node]]) -> Node | None:
    given = _arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    if given.get("dropout_p") or given.get("enable_gqa") or query.meta["val"].dtype is not torch.float32:
        return None
    if len({len(shape_of(x)) for x in (query, key, value)}) != 1 or len(shape_of(query)) not in (3, 4):
        return None
    if shape_of(query)[:-2] != shape_of(key)[:-2] or shape_of(query)[:-2] != shape_of(value)[:-2]:
        return None
    mask = given["attn_mask"]
    if given.get("is_causal"):
        mask = _causal(module, node, query, key)
        if mask is None:
            return None
    scale = given.get("scale")
    factor = float(scale) if isinstance(scale, int | float) else 1 / math.sqrt(int(shape_of(query)[-1]))
    scaled = emit(node, _ATEN.mul.Tensor, query, emit_number(module, node, factor))
    scores = product(node, scaled, emit(node, _ATEN.transpose.int, key, -2, -1))
    if not isinstance(mask, Node):
        return product(node, emit(node, _ATEN.softmax.int, scores, -1), value)
    if mask not in masks:
        masks[mask] = _finite(mask, node, causal=bool(given.get("is_causal")))
    bias, seen = masks[mask]
    weights = emit(node, _ATEN.softmax.int, emit(node, _ATEN.add.Tensor, scores, bias), -1)
    result = product(node, weights, value)
    return result if given.get("is_causal") else emit(node, _ATEN.mul.Tensor, result, seen)


def _finite(mask: Node, like: Node, *, causal: bool) -> tuple[Node, Node]:
    """The mask as finite numbers to add, and 1 for the rows that see something, 0 for the others."""
    if mask.meta["val"].dtype is torch.bool:
        visible = emit(like, _ATEN.to.dtype, mask, torch.float32)
        # (1 - visible) * lowest, by two ops that delegates take
        hidden = emit(like, _ATEN.sub.Tensor, visible, 1.0)
        bias = emit(like, _ATEN.mul.Tensor, hidden, -_LOWEST)
    else:
        bias = emit(like, _ATEN.clamp.default, mask, _LOWEST)
        visible = emit(like, _ATEN.to.dtype, emit(like, _ATEN.gt.Scalar, mask, -math.inf), torch.float32)
    seen = visible if causal else emit(like, _ATEN.amax.default, visible, [-1], True)
    return bias, seen


def _causal(module: GraphModule, node: Node, query: Node, key: Node) -> Node | None:
    rows, columns = shape_of(query)[-2], shape_of(key)[-2]
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return emit_constant(module, node, "causal_mask", torch.ones(rows, columns, dtype=torch.bool).tril())
