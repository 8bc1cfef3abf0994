"""Weight-only linear layers for `kernels.few_rows`, which reads a weight as the integers it is stored as.

linear(x, dq(w), b)        =>        few_rows_linear(x, w, scales, zero_points, b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.kernels import few_rows
from lowering.inductor.kernels.engines import Product
from lowering.inductor.rewrites.graph import call
from lowering.inductor.rewrites.weights import LINEAR, TRANSPOSES, activation_of, weight_of
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.edit import emit_constant, replace
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rows:
    """A weight-only linear layer. ``weight``: int8 ``[outputs, inputs]``; ``scale``, ``point``:
    ``[outputs, groups]``.
    """

    product: Product
    weight: Tensor
    scale: Tensor
    point: Tensor


def rows_of(gm: GraphModule, node: Node) -> Rows | None:
    """What the kernel needs to compute ``node``; None where it cannot.

    It takes float32 rows, whose number does not vary, and a constant int8 weight with a scale per output or per group
    of inputs.
    """
    dequantize, bias = _dequantize_of(node), operands(node).get("bias")
    value = None if dequantize is None else tensor_at(gm, dequantize.args[0])
    source = activation_of(node)
    x = source.meta.get("val") if source is not None else None
    if dequantize is None or value is None or not isinstance(x, Tensor) or value.dtype is not torch.int8:
        return None
    if x.dtype is not torch.float32 or x.device.type != "cpu" or value.dim() != 2 or value.shape[1] != x.shape[-1]:
        return None
    if not _outputs_first(node):
        return None
    if any(not isinstance(size, int) for size in x.shape) or operands(dequantize).get("out_dtype") not in (
        None,
        torch.float32,
    ):
        return None
    parameters = _parameters(gm, dequantize, value)
    if parameters is None:
        return None
    scale, point = parameters
    group = value.shape[1] // scale.shape[1]
    fits = int(value.min()) >= -8 and int(value.max()) <= 7 and group % few_rows.BLOCK == 0
    product = Product(
        x=(torch.Size(x.shape[:-1]).numel(), value.shape[1]),
        weight=(value.shape[0], value.shape[1]),
        bias=bias is not None,
        float_rows=True,
        group=group,
        packed=fits,
    )
    return Rows(product, value, scale, point)


def _dequantize_of(node: Node) -> Node | None:
    """The dequantize node of a weight that ``linear`` reads, or a product through an op that permutes axes."""
    weight = weight_of(node)
    if node.target not in LINEAR or weight is None or node.target is aten.bmm.default:
        return None
    if node.target is not aten.linear.default:
        if weight.target not in TRANSPOSES or not isinstance(weight.args[0], Node):
            return None
        weight = weight.args[0]
    if node.target is aten.addmm.default and any(operands(node)[name] != 1 for name in ("alpha", "beta")):
        return None
    known = (qd.dequantize_per_channel.default, qd.dequantize_per_channel_group.default)
    return weight if weight.target in known else None


def _outputs_first(node: Node) -> bool:
    """Whether a stored matrix has the axes ``[outputs, inputs]``: that of ``linear``, or of a product that turns it.

    An op that permutes axes may leave them in their places, as ``permute(0, 1)`` does.
    """
    if node.target is aten.linear.default:
        return True
    turn = weight_of(node)
    assert turn is not None, f"'{node.name}' has a weight"
    assert callable(turn.target), f"'{turn.name}' permutes axes"
    shown: Tensor = turn.target(torch.empty(2, 3, device="meta"), *turn.args[1:], **turn.kwargs)
    return shown.shape == (3, 2)


def _parameters(gm: GraphModule, dequantize: Node, value: Tensor) -> tuple[Tensor, Tensor] | None:
    args = operands(dequantize)
    scale, point = tensor_at(gm, args["scales"]), tensor_at(gm, args["zero_points"])
    if scale is None or args.get("axis", 0) != 0:
        return None
    if args["zero_points"] is not None and point is None:
        return None
    scale = scale.to(torch.float32).reshape(value.shape[0], -1)
    point = torch.zeros_like(scale) if point is None else point.to(torch.float32).reshape(value.shape[0], -1)
    return scale.contiguous(), point.contiguous()


def compute_by_rows(gm: GraphModule, node: Node, rows: Rows) -> None:
    """Let the kernel compute ``node``."""
    op = few_rows.load_kernel()
    assert op is not None, "chosen, so it was measured"
    args: dict[str, Any] = operands(node)
    bias = args.get("bias") if node.target is not aten.addmm.default else args["self"]
    parts = {
        "weight": few_rows.packed(rows.weight) if rows.product.packed else rows.weight.contiguous(),
        "scale": rows.scale,
        "point": rows.point,
    }
    made = [emit_constant(gm, node, f"_rows_{name}", part) for name, part in parts.items()]
    if bias is None:
        bias = emit_constant(gm, node, "_rows_bias", torch.zeros(rows.weight.shape[0]))
    with gm.graph.inserting_before(node):
        x = call(gm, node, aten.contiguous.default, activation_of(node))
        computed = call(gm, node, op, x, *made, bias, rows.product.packed)
    computed.meta["val"] = node.meta.get("val")
    replace(node, computed)
