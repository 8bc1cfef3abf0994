"""Convolutions in one dimension as convolutions in two, of height one.

    squeeze(f(conv2d(unsqueeze(x), unsqueeze(w))))        <=        f(conv1d(x, w))

Inductor's int8 convolution in one dimension computes right and is described wrongly: its shape is forgotten when the
graph is looked at again, so that an addition behind it does not compile, and activations are fused into it that its
kernel refuses when it is called. In two dimensions neither is so. The eager kernel does the same unsqueezing, so the
result is bit-equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit_constant, replace
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_PLAIN, _NAMED = aten.conv1d.default, aten.conv1d.padding
_FUSED = frozenset(
    {
        aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.hardtanh.default,
        aten.hardtanh_.default, aten.hardswish.default, aten.hardswish_.default, aten.silu.default, aten.silu_.default,
        aten.clamp.default, aten.clamp_.default, qd.quantize_per_tensor.default, aten.minimum.default,
        aten.maximum.default,
    }
)  # fmt: skip
"""What may become a part of the kernel, and with it the clamping of integers: the result is squeezed behind it."""


def convolutions_in_two_dimensions(gm: GraphModule) -> int:
    """Rewrite every quantized ``conv1d``, with what is fused into it."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in (_PLAIN, _NAMED):
            continue
        args = operands(node)
        with gm.graph.inserting_before(node):
            x, weight = _flat_input(gm, args["input"]), _flat_weight(gm, args["weight"])
            if x is None or weight is None:
                continue
            target, padding = aten.conv2d.padding, args["padding"]
            if node.target is _PLAIN:
                target, padding = aten.conv2d.default, [0, *args["padding"]]
            strides, dilations = [1, *args["stride"]], [1, *args["dilation"]]
            wide = call(gm, node, target, x, weight, args["bias"], strides, padding, dilations, args["groups"])
        wide.meta["val"] = _unsqueezed(node.meta.get("val"))
        replace(node, wide)
        _squeeze_behind(gm, wide)
        count += 1
    return count


def _flat_input(gm: GraphModule, x: Any) -> Node | None:
    """``dq(x)`` as ``dq(unsqueeze(x))``; None for what is not dequantized."""
    if not isinstance(x, Node):
        return None
    if x.target is aten.to.dtype:
        inner = _flat_input(gm, x.args[0])
        return None if inner is None else call(gm, x, x.target, inner, *x.args[1:])
    if x.target not in (qd.dequantize_per_tensor.default, qd.dequantize_per_tensor.tensor):
        return None
    source = x.args[0]
    assert isinstance(source, Node), "a dequantize op reads a node"
    behind = source.target is aten.squeeze.dim and source.args[1] == 2
    integers = source.args[0] if behind else call(gm, source, aten.unsqueeze.default, source, 2)
    return call(gm, x, x.target, integers, *x.args[1:], **x.kwargs)


def _flat_weight(gm: GraphModule, weight: Any) -> Node | None:
    if not isinstance(weight, Node):
        return None
    if weight.target is aten.to.dtype:
        inner = _flat_weight(gm, weight.args[0])
        return None if inner is None else call(gm, weight, weight.target, inner, *weight.args[1:])
    value = tensor_at(gm, weight.args[0]) if weight.target is qd.dequantize_per_channel.default else None
    if value is None:
        return None
    integers = emit_constant(gm, weight, "_weight_2d", value.unsqueeze(2))
    return call(gm, weight, weight.target, integers, *weight.args[1:], **weight.kwargs)


def _squeeze_behind(gm: GraphModule, wide: Node) -> None:
    last = wide
    while len(last.users) == 1:
        user = next(iter(last.users))
        if user.target not in _FUSED or user.args[0] is not last or not _is_scalar(user):
            break
        user.meta["val"] = _unsqueezed(user.meta.get("val"))
        last = user
    with gm.graph.inserting_after(last):
        squeezed = call(gm, last, aten.squeeze.dim, last, 2)
    value = last.meta.get("val")
    if isinstance(value, Tensor):
        squeezed.meta["val"] = value.squeeze(2)
    last.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)


def _is_scalar(node: Node) -> bool:
    """Whether a minimum or maximum is with a single number."""
    if node.target not in (aten.minimum.default, aten.maximum.default):
        return True
    return isinstance(node.args[1], Node) and node.args[1].target is aten.full.default and node.args[1].args[0] == []


def _unsqueezed(value: Any) -> Any:
    return value.unsqueeze(2) if isinstance(value, Tensor) else value
