"""Conv1d → conv2d: convolutions in one dimension as convolutions in two, of height one.

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
from quant2e.annotation.pattern import Arg, Match, Op
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit_constant
from quant2e.graph.qdq_ops import qd
from quant2e.passes.rewrite import Rewrite

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


def _is_quantized(match: Match) -> bool | str:
    """Whether both operands are dequantized, perhaps converted, and the weight is a constant per output channel."""
    node, x, weight = match.root, *(_behind_conversions(match.edges[name][0]) for name in ("x", "weight"))
    if x.target not in (qd.dequantize_per_tensor.default, qd.dequantize_per_tensor.tensor):
        return f"the input of '{node.name}' is not dequantized"
    owner = node.graph.owning_module
    assert owner is not None, "the graph of a module"
    constant = weight.target is qd.dequantize_per_channel.default and tensor_at(owner, weight.args[0]) is not None
    return constant or f"the weight of '{node.name}' is no constant with a scale per channel"


def _behind_conversions(node: Node) -> Node:
    while node.target is aten.to.dtype and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _in_two_dimensions(gm: GraphModule, match: Match) -> Node:
    node, args = match.root, operands(match.root)
    with gm.graph.inserting_before(node):
        x, weight = _flat_input(gm, match.edges["x"][0]), _flat_weight(gm, match.edges["weight"][0])
        target, padding = aten.conv2d.padding, args["padding"]
        if node.target is _PLAIN:
            target, padding = aten.conv2d.default, [0, *args["padding"]]
        strides, dilations = [1, *args["stride"]], [1, *args["dilation"]]
        wide = call(gm, node, target, x, weight, args["bias"], strides, padding, dilations, args["groups"])
    wide.meta["val"] = _unsqueezed(node.meta.get("val"))
    last = _last_fused(node)
    if last is node:
        with gm.graph.inserting_before(node):
            return _squeezed(gm, wide, node.meta.get("val"))
    with gm.graph.inserting_after(last):
        squeezed = _squeezed(gm, last, last.meta.get("val"))
    last.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)
    while last is not node:
        last.meta["val"] = _unsqueezed(last.meta.get("val"))
        last = last.args[0]
    return wide


convolutions_in_two_dimensions = Rewrite(
    "convolutions_in_two_dimensions",
    Op(frozenset({_PLAIN, _NAMED}), (Arg("x"), Arg("weight"))),
    _in_two_dimensions,
    _is_quantized,
)
"""Every quantized ``conv1d``, with what is fused into it."""


def _flat_input(gm: GraphModule, x: Any) -> Node:
    """``dq(x)`` as ``dq(unsqueeze(x))``."""
    if x.target is aten.to.dtype:
        return call(gm, x, x.target, _flat_input(gm, x.args[0]), *x.args[1:])
    source = x.args[0]
    assert isinstance(source, Node), "a dequantize op reads a node"
    behind = source.target is aten.squeeze.dim and source.args[1] == 2
    integers = source.args[0] if behind else call(gm, source, aten.unsqueeze.default, source, 2)
    return call(gm, x, x.target, integers, *x.args[1:], **x.kwargs)


def _flat_weight(gm: GraphModule, weight: Any) -> Node:
    if weight.target is aten.to.dtype:
        return call(gm, weight, weight.target, _flat_weight(gm, weight.args[0]), *weight.args[1:])
    value = tensor_at(gm, weight.args[0])
    assert value is not None, "matched"
    integers = emit_constant(gm, weight, "_weight_2d", value.unsqueeze(2))
    return call(gm, weight, weight.target, integers, *weight.args[1:], **weight.kwargs)


def _last_fused(last: Any) -> Any:
    """The last of the ops behind a convolution that become parts of its kernel; itself without any."""
    while len(last.users) == 1:
        user = next(iter(last.users))
        if user.target not in _FUSED or user.args[0] is not last or not _is_scalar(user):
            break
        last = user
    return last


def _squeezed(gm: GraphModule, wide: Node, value: Any) -> Node:
    """``wide`` in one dimension again; ``value``: what that is."""
    squeezed = call(gm, wide, aten.squeeze.dim, wide, 2)
    if isinstance(value, Tensor):
        squeezed.meta["val"] = value
    return squeezed


def _is_scalar(node: Node) -> bool:
    """Whether a minimum or maximum is with a single number."""
    if node.target not in (aten.minimum.default, aten.maximum.default):
        return True
    return isinstance(node.args[1], Node) and node.args[1].target is aten.full.default and node.args[1].args[0] == []


def _unsqueezed(value: Any) -> Any:
    return value.unsqueeze(2) if isinstance(value, Tensor) else value
