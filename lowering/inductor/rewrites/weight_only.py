"""Weight-only linear layers for `kernels.weight_only`, which reads a weight as the integers it is stored as.

linear(x, dq(w), b)                         =>    weight_only_linear(x, w, scales, zero_points, b)
linear((x - zero_point) * scale, dq(w), b)  =>    int8_rows_linear(x, scale, zero_point, w, scales, zero_points, b)

The second is of int8 rows with a scale each, as `pipeline.token_parameters` leaves them, by a weight of 4 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.inductor.kernels import weight_only
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
    ``[outputs, groups]``. ``x``: its rows; int8 ones with their scale and zero point, or floats alone.
    """

    product: Product
    x: tuple[Node, ...]
    weight: Tensor
    scale: Tensor
    point: Tensor


def rows_of(gm: GraphModule, node: Node) -> Rows | None:
    """What the kernels need to compute ``node``; None where they cannot.

    They take float32 rows, and a constant int8 weight with a scale per output or per group of inputs.
    """
    dequantize, bias = _dequantize_of(node), operands(node).get("bias")
    value = None if dequantize is None else tensor_at(gm, dequantize.args[0])
    source = activation_of(node)
    x = source.meta.get("val") if source is not None else None
    if dequantize is None or value is None or source is None or not isinstance(x, Tensor):
        return None
    if value.dtype is not torch.int8:
        return None
    if x.dtype is not torch.float32 or x.device.type != "cpu" or value.dim() != 2 or value.shape[1] != x.shape[-1]:
        return None
    if not _outputs_first(node):
        return None
    if operands(dequantize).get("out_dtype") not in (None, torch.float32):
        return None
    parameters = _parameters(gm, dequantize, value)
    if parameters is None:
        return None
    scale, point = parameters
    sizes: tuple[Any, ...] = tuple(x.shape[:-1])  # ints, and symbols where they vary
    rows = math.prod(size if isinstance(size, int) else int(size.node.hint or 1) for size in sizes)
    fits = int(value.min()) >= -8 and int(value.max()) <= 7
    narrow = torch.equal(scale, scale.to(torch.bfloat16).to(torch.float32))
    int8_rows = _int8_rows(source) if fits else None
    product = Product(
        x=(rows, value.shape[1]),
        weight=(value.shape[0], value.shape[1]),
        bias=bias is not None,
        float_rows=True,
        group=value.shape[1] // scale.shape[1],
        group_bytes=(2 if narrow else 4) + bool(point.any()),
        bits=4 if fits else 8,
        int8_rows=int8_rows is not None,
        varies=any(not isinstance(size, int) for size in sizes),
    )
    return Rows(product, int8_rows or (source,), value, scale, point)


def _int8_rows(source: Node) -> tuple[Node, Node, Node] | None:
    """Integers, scale and zero point of rows that are dequantized by arithmetic, each with a scale of its own."""
    product = source.args[0] if source.target is aten.to.dtype else source
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return None
    difference, scale = product.args
    if not isinstance(difference, Node) or difference.target is not aten.sub.Tensor:
        return None
    found = (difference.args[0], scale, difference.args[1])
    integers, *parameters = (node.meta.get("val") if isinstance(node, Node) else None for node in found)
    if not isinstance(integers, Tensor) or integers.dtype is not torch.int8:
        return None
    each = (*integers.shape[:-1], 1)
    if not all(isinstance(value, Tensor) and tuple(value.shape) == each for value in parameters):
        return None
    return cast("tuple[Node, Node, Node]", found)


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
    if not torch.equal(point, point.to(torch.int8)):
        return None
    return scale.contiguous(), point.contiguous()


def compute_by_rows(gm: GraphModule, node: Node, rows: Rows) -> None:
    """Let a kernel compute ``node``."""
    op = weight_only.load_kernel(weight_only.INT8_ROWS if rows.product.int8_rows else weight_only.FLOAT_ROWS)
    assert op is not None, "chosen, so it was measured"
    args: dict[str, Any] = operands(node)
    bias = args.get("bias") if node.target is not aten.addmm.default else args["self"]
    packed = weight_only.pack(rows.weight, rows.scale, rows.point, bits=rows.product.bits)
    parts = {"weight": packed.weight, "scale": packed.scale, "point": packed.zero_point}
    if bias is None:
        parts["bias"] = torch.empty(0)
    made = [emit_constant(gm, node, f"_rows_{name}", part) for name, part in parts.items()]
    if bias is not None:
        made.append(bias)
    if rows.product.int8_rows:
        made.append(emit_constant(gm, node, "_rows_totals", packed.totals))
    with gm.graph.inserting_before(node):
        x, *parameters = (call(gm, node, aten.contiguous.default, operand) for operand in rows.x)
        parameters = [call(gm, node, aten.to.dtype, operand, torch.float32) for operand in parameters]
        computed = call(gm, node, op, x, *parameters, *made, rows.weight.shape[0])
    computed.meta["val"] = node.meta.get("val")
    replace(node, computed)
