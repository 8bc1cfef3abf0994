"""Rewrites that bring a Q/DQ graph into the form Inductor's int8 patterns match. Each keeps the eager result.

They run on a private copy, in the order of `REWRITES`. What Inductor would lower wrongly is kept away from its
patterns by `inductor_guard`, which runs after them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.inductor_graph import add_constant, call, constant, operands, replace
from quant2e.dialect import qd

aten = torch.ops.aten

LINEAR = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default})
CONVOLUTION = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
        aten.convolution.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    }
)

_TO_STATIC = {
    qd.quantize_per_tensor.tensor: qd.quantize_per_tensor.default,
    qd.quantize_per_tensor.tensor2: qd.quantize_per_tensor.default,
    qd.dequantize_per_tensor.tensor: qd.dequantize_per_tensor.default,
    qd.dequantize_per_tensor.tensor2: qd.dequantize_per_tensor.default,
}
_QPARAM_NAMES = ("scale", "zero_point", "quant_min", "quant_max")


def constant_parameters(gm: GraphModule) -> None:
    """``q/dq.tensor(x, get_attr scale, get_attr zero_point, …)`` => ``q/dq.default(x, float, int, …)``."""
    for node in list(gm.graph.nodes):
        if node.target not in _TO_STATIC:
            continue
        args = operands(node)
        for name in _QPARAM_NAMES:
            value = constant(gm, args[name])
            if value is not None and value.numel() == 1:
                args[name] = value.item()
        if any(isinstance(args[name], Node) for name in _QPARAM_NAMES):
            continue
        kwargs = {"out_dtype": args["out_dtype"]} if args.get("out_dtype") is not None else {}
        with gm.graph.inserting_before(node):
            static = call(
                gm,
                node,
                _TO_STATIC[node.target],
                args["input"],
                float(args["scale"]),
                *(int(args[name]) for name in _QPARAM_NAMES[1:]),
                args["dtype"],
                **kwargs,
            )
        static.meta.update(node.meta)
        replace(gm, node, static)


def explicit_zero_points(gm: GraphModule) -> None:
    """``dequantize_per_channel(w, scales, None, …)`` => ``dequantize_per_channel(w, scales, zeros, …)``."""
    for node in list(gm.graph.nodes):
        if node.target is not qd.dequantize_per_channel.default or operands(node)["zero_points"] is not None:
            continue
        scales = constant(gm, operands(node)["scales"])
        if scales is None:
            continue
        zeros = add_constant(gm, node, "_zero_points", torch.zeros(scales.shape, dtype=torch.int64))
        node.args = (*node.args[:2], zeros, *node.args[3:])


def float_biases(gm: GraphModule) -> None:
    """``dequantize(get_attr int32)`` => ``get_attr float``: int8 kernels take a float bias, and it is small."""
    for node in list(gm.graph.nodes):
        if node.target not in (qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default):
            continue
        args = operands(node)
        value = constant(gm, args["input"])
        if value is None or value.dtype is not torch.int32:
            continue
        known = [constant(gm, arg) if isinstance(arg, Node) else arg for arg in node.args]
        if any(arg is None and isinstance(node.args[i], Node) for i, arg in enumerate(known)):
            continue
        replace(gm, node, add_constant(gm, node, "_float_bias", node.target(*known, **node.kwargs)))


def gathered_rows(gm: GraphModule) -> None:
    """``embedding(dq(table), i)`` => ``dq(table[i])``: integer rows are gathered, never a float table."""
    for node in list(gm.graph.nodes):
        if node.target is not aten.embedding.default or not isinstance(node.args[0], Node):
            continue
        table, index = node.args[0], node.args[1]
        if table.target is qd.dequantize_per_tensor.default:
            with gm.graph.inserting_before(node):
                rows = call(gm, node, aten.embedding.default, table.args[0], index)
                found = call(gm, node, table.target, rows, *table.args[1:], **table.kwargs)
        elif table.target is qd.dequantize_per_channel.default and operands(table)["axis"] == 0:
            with gm.graph.inserting_before(node):
                found = _rows_of_channels(gm, node, operands(table), index)
        else:
            continue
        found.meta.update(node.meta)
        replace(gm, node, found)
        if not table.users:
            gm.graph.erase_node(table)


def _rows_of_channels(gm: GraphModule, node: Node, table: dict[str, Any], index: Any) -> Node:
    """(rows - zero_point[i]) * scale[i], the arithmetic of ``dequantize_per_channel`` on the rows asked for."""
    rows = call(gm, node, aten.embedding.default, table["input"], index)
    scales = call(gm, node, aten.unsqueeze.default, call(gm, node, aten.index.Tensor, table["scales"], [index]), -1)
    if table["zero_points"] is not None:
        points = call(gm, node, aten.index.Tensor, table["zero_points"], [index])
        rows = call(gm, node, aten.sub.Tensor, rows, call(gm, node, aten.unsqueeze.default, points, -1))
    found = call(gm, node, aten.mul.Tensor, rows, scales)
    return call(gm, node, aten.to.dtype, found, table["out_dtype"] or torch.float32)


def weight_of(node: Node) -> Node | None:
    """The second operand of a convolution, linear or matrix product, where a weight sits; None for other ops."""
    names = {"weight", "mat2", "other"}
    if node.target in CONVOLUTION or node.target in LINEAR:
        for name, value in operands(node).items():
            if name in names and isinstance(value, Node):
                return value
    return None


def activation_of(node: Node) -> Node | None:
    """The operand that the weight of `weight_of` is applied to."""
    names = {"input", "mat1", "self"} if node.target is not aten.addmm.default else {"mat1"}
    for name, value in operands(node).items():
        if name in names and isinstance(value, Node):
            return value
    return None


def per_channel_weights(gm: GraphModule) -> None:
    """``dequantize_per_tensor(w, s, z)`` => ``dequantize_per_channel(w, [s, …], [z, …], axis=0)`` for constant weights.

    Exact: both subtract the same integer and multiply by the same float32.
    """
    for node in list(gm.graph.nodes):
        weight = weight_of(node)
        if weight is None or weight.target is not qd.dequantize_per_tensor.default:
            continue
        args = operands(weight)
        value = constant(gm, args["input"])
        if value is None or value.dim() < 2 or value.dtype is not torch.int8:
            continue
        channels = value.shape[0]
        scales = add_constant(gm, node, "_scales", torch.full((channels,), args["scale"], dtype=torch.float32))
        points = add_constant(gm, node, "_zero_points", torch.full((channels,), args["zero_point"], dtype=torch.int64))
        tail = (0, args["quant_min"], args["quant_max"], args["dtype"])
        with gm.graph.inserting_before(node):
            wide = call(gm, weight, qd.dequantize_per_channel.default, args["input"], scales, points, *tail)
        wide.kwargs = dict(weight.kwargs)
        wide.meta.update(weight.meta)
        node.replace_input_with(weight, wide)
        if not weight.users:
            gm.graph.erase_node(weight)


def one_weight_per_user(gm: GraphModule) -> None:
    """A dequantized weight with several users => one dequantize each, with scales of its own.

    The patterns want a single user, and equal nodes would be merged again before they are tried.
    """
    for node in list(gm.graph.nodes):
        if node.target is not qd.dequantize_per_channel.default or len(node.users) < 2:
            continue
        scales = constant(gm, node.args[1])
        if scales is None:
            continue
        for user in list(node.users)[1:]:
            own = add_constant(gm, node, "_scales", scales.clone())
            with gm.graph.inserting_before(node):
                copy = call(gm, node, node.target, node.args[0], own, *node.args[2:], **node.kwargs)
            copy.meta.update(node.meta)
            user.replace_input_with(node, copy)


def convert_after_dequantize(gm: GraphModule) -> None:
    """``dq(x, out_dtype=bfloat16)`` => ``dq(x).to(bfloat16)``, the form whose int8 kernels return bfloat16.

    Exact for 8-bit integers: their differences fit bfloat16 and the product is rounded once in both.
    """
    for node in list(gm.graph.nodes):
        if node.target not in (
            qd.dequantize_per_tensor.default,
            qd.dequantize_per_tensor.tensor,
            qd.dequantize_per_channel.default,
        ):
            continue
        out, args = node.kwargs.get("out_dtype"), operands(node)
        if out in (None, torch.float32) or args["dtype"] not in (torch.uint8, torch.int8):
            continue
        with gm.graph.inserting_before(node):
            wide = call(gm, node, node.target, *node.args)
            narrow = call(gm, node, aten.to.dtype, wide, out)
        narrow.meta.update(node.meta)
        replace(gm, node, narrow)


def dynamic_parameters(gm: GraphModule) -> None:
    """``choose_qparams(x)`` => the same formula in ATen, with the range extended to hold zero.

    Inductor's own decomposition forgets zero: of an input in [5, 6] it makes integers that are wrong by 5. The
    symmetric form has no decomposition at all.
    """
    targets = (qd.choose_qparams.tensor, qd.choose_qparams_symmetric.tensor)
    for node in [n for n in gm.graph.nodes if n.target in targets]:
        args = operands(node)
        low_int, high_int = int(args["quant_min"]), int(args["quant_max"])
        with gm.graph.inserting_before(node):
            both = call(gm, node, aten.aminmax.default, args["input"])
            low = call(gm, node, aten.clamp_max.default, call(gm, node, operator.getitem, both, 0), 0)
            high = call(gm, node, aten.clamp_min.default, call(gm, node, operator.getitem, both, 1), 0)
            eps = call(gm, node, aten.full.default, [1], args["eps"], dtype=torch.float32)
            if node.target is qd.choose_qparams.tensor:
                span = call(gm, node, aten.sub.Tensor, high, low)
                scale = call(gm, node, aten.div.Tensor, span, float(high_int - low_int))
                scale = call(gm, node, aten.maximum.default, scale, eps)
                steps = call(gm, node, aten.round.default, call(gm, node, aten.div.Tensor, low, scale))
                point = call(gm, node, aten.rsub.Scalar, call(gm, node, aten.to.dtype, steps, torch.int32), low_int)
                point = call(gm, node, aten.clamp.default, point, low_int, high_int)
            else:
                span = call(gm, node, aten.maximum.default, call(gm, node, aten.neg.default, low), high)
                scale = call(gm, node, aten.div.Tensor, span, float(high_int - low_int) / 2)
                scale = call(gm, node, aten.maximum.default, scale, eps)
                middle = 128 if args["dtype"] is torch.uint8 else 0
                point = call(gm, node, aten.full.default, [1], middle, dtype=torch.int64)
            scale = call(gm, node, aten.to.dtype, scale, torch.float64)
            point = call(gm, node, aten.to.dtype, point, torch.int64)
        for user in list(node.users):
            replace(gm, user, scale if user.args[1] == 0 else point)
        gm.graph.erase_node(node)


def narrow_ranges(gm: GraphModule) -> None:
    """``quantize(x, quant_min, quant_max)`` => ``quantize(x).clamp(quant_min, quant_max)`` where the dtype is wider.

    Inductor clamps to the dtype, not to the range, when it quantizes with tensor parameters and when an int8
    kernel writes the integers itself.
    """
    for node in list(gm.graph.nodes):
        if node.target not in (qd.quantize_per_tensor.default, qd.quantize_per_tensor.tensor):
            continue
        args = operands(node)
        bounds = torch.iinfo(args["dtype"]) if not args["dtype"].is_floating_point else None
        if bounds is None or (args["quant_min"], args["quant_max"]) == (bounds.min, bounds.max):
            continue
        users = list(node.users)
        with gm.graph.inserting_after(node):
            clamped = call(gm, node, aten.clamp.default, node, args["quant_min"], args["quant_max"])
        clamped.meta.update(node.meta)
        for user in users:
            user.replace_input_with(node, clamped)


def scaled_additions(gm: GraphModule) -> None:
    """``add(x, y, alpha=k)`` => ``add(x, y * k)``: the patterns that fuse an addition do not look at ``alpha``."""
    for node in list(gm.graph.nodes):
        if node.target is not aten.add.Tensor or operands(node)["alpha"] == 1 or not isinstance(node.args[1], Node):
            continue
        with gm.graph.inserting_before(node):
            scaled = call(gm, node, aten.mul.Tensor, node.args[1], operands(node)["alpha"])
        node.args, node.kwargs = (node.args[0], scaled), {}


REWRITES: tuple[Callable[[GraphModule], None], ...] = (
    constant_parameters,
    explicit_zero_points,
    float_biases,
    gathered_rows,
    per_channel_weights,
    one_weight_per_user,
    convert_after_dequantize,
    dynamic_parameters,
    narrow_ranges,
    scaled_additions,
)
