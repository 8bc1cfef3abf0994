"""Padding by name as padding by numbers: int8 convolutions whose size stays, of even kernels as well.

    conv(dq(x), w; "same")        =>        conv(dq(pad(x)), w; numbers)

A kernel of even size keeps the size of its image by one value more at the end of a dimension than at its start. No
kernel pads so; the value that is missing is put behind the integers, where it is the zero point. Where the zero point
is found at run time, a zero is put behind what is quantized: every range holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.weights import activation_of, dequantized, weight_of
from quant2e.graph.dataflow import operands
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_BY_NUMBERS: Mapping[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def numbered_padding(gm: GraphModule) -> int:
    """Every quantized convolution with padding by name; returns how many."""
    found = [node for node in gm.graph.nodes if node.target in _BY_NUMBERS]
    return sum(_renamed(gm, node) for node in found)


def _renamed(gm: GraphModule, node: Node) -> bool:
    args, weight, x = operands(node), weight_of(node), activation_of(node)
    source = dequantized(weight)
    if source is None or source.target is not qd.dequantize_per_channel.default or x is None:
        return False
    kernel = operands(source)["input"].meta["val"].shape[2:]
    dilation = [*args["dilation"]] * (len(kernel) if len(args["dilation"]) == 1 else 1)
    total = [d * (k - 1) if args["padding"] == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    if any(each % 2 for each in total):
        ends = [end for each in reversed(total) for end in (0, each % 2)]
        padded = _padded(gm, node, x, ends)
        if padded is None:
            return False
        node.replace_input_with(x, padded)
        x = padded
    padding = [each // 2 for each in total]
    node.target = _BY_NUMBERS[node.target]
    node.args = (x, weight, args["bias"], args["stride"], padding, args["dilation"], args["groups"])
    node.kwargs = {}
    return True


def _padded(gm: GraphModule, node: Node, x: Node, ends: list[int]) -> Node | None:
    """``dq(x)`` of integers with a value more at some ends; None where nothing can be put there."""
    integers: Any = x.args[0]
    with gm.graph.inserting_before(node):
        if x.target is qd.dequantize_per_tensor.default:
            wide = call(gm, x, aten.constant_pad_nd.default, integers, ends, x.args[2])
        elif x.target is qd.dequantize_per_tensor.tensor and integers.target is qd.quantize_per_tensor.tensor:
            behind = call(gm, integers, aten.constant_pad_nd.default, integers.args[0], ends, 0.0)
            wide = call(gm, integers, integers.target, behind, *integers.args[1:])
        else:
            return None
        return call(gm, x, x.target, wide, *x.args[1:], **x.kwargs)
