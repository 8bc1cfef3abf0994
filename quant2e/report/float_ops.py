"""Float ops of a captured graph, before anything is rewritten: the rows of the report.

Only ops that produce a float tensor count. Multiply-accumulates follow from the shapes of convolutions and matrix
products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.errors import module_path, source_line
from quant2e.graph.fake_values import example_shape, is_float

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class FloatOp:
    """One op of the captured graph that produces a float tensor.

    ``macs``: multiply-accumulates at the example shapes; 0 for ops that are not products.
    """

    name: str
    target: str
    module: str
    source: str
    macs: int


def list_float_ops(gm: GraphModule) -> tuple[FloatOp, ...]:
    """The float ops of a captured graph, in graph order."""
    return tuple(
        FloatOp(node.name, str(node.target), module_path(node), source_line(node), count_macs(node))
        for node in gm.graph.nodes
        if node.op == "call_function" and is_float(node)
    )


def count_macs(node: Node) -> int:
    """Multiply-accumulates of a convolution or a matrix product; 0 for any other op."""
    if node.op != "call_function":
        return 0
    family = _FAMILY.get(getattr(node.target, "overloadpacket", None))
    out = example_shape(node)
    if family is None or out is None:
        return 0
    if family == "einsum":
        return _einsum_macs(node, out)
    operands = [example_shape(arg) for arg in node.args]
    if family == "attention":
        q, k = operands[0], operands[1]
        return 0 if q is None or k is None else 2 * math.prod(q) * k[-2]
    if family in ("linear", "addmm"):
        inner = operands[0] if family == "linear" else operands[1]
        return 0 if not inner else math.prod(out) * inner[-1]
    weight = operands[1] if len(operands) > 1 else None
    if weight is None:
        return 0
    if family == "conv":
        return math.prod(out) * math.prod(weight[1:])
    # Transposed: every input element meets each of its group's weights once.
    return 0 if operands[0] is None else math.prod(operands[0]) * math.prod(weight[1:])


def _einsum_macs(node: Node, out: tuple[int, ...]) -> int:
    """One for each combination of indices, when there is more than one operand."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    subscripts, arrow, result = equation.partition("->")
    if "," not in subscripts or not isinstance(operands, (list, tuple)):
        return 0
    if not arrow:  # the letters that occur once
        result = "".join(letter for letter in set(subscripts) - {",", "."} if subscripts.count(letter) == 1)
    sizes: dict[str, int] = {}
    for letters, operand in zip(subscripts.split(","), operands, strict=False):
        shape = example_shape(operand) or ()
        before, _, after = letters.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(shape), strict=False)) if after else {}
    broadcast = out[: len(out) - len(result.replace("...", ""))] if "..." in subscripts else ()
    return math.prod(sizes.values()) * math.prod(broadcast)


_FAMILY: dict[Any, str] = {
    **dict.fromkeys((aten.linear, aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot), "linear"),
    **dict.fromkeys((aten.addmm, aten.baddbmm), "addmm"),
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution), "conv"),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), "transposed"),
    aten.scaled_dot_product_attention: "attention",
    aten.einsum: "einsum",
}
