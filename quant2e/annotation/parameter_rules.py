"""Rules of the numbers in quantize and dequantize ops: scales, zero points, ranges, and the dtypes they belong to.

Each row is a rule: its name, and a function that says what is wrong with a node, or None.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import DEQUANTIZE, qd

_PER_CHANNEL = (qd.quantize_per_channel.default, qd.dequantize_per_channel.default)
_PER_GROUP = (qd.quantize_per_channel_group.default, qd.dequantize_per_channel_group.default)
_PER_TENSOR = (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default)
_OPS = frozenset(
    {*_PER_TENSOR, qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor, *_PER_CHANNEL, *_PER_GROUP}
)
"""The ops that name an integer range and a storage dtype."""

_SCALE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _dequantizes_its_dtype(node: Node) -> str | None:
    x, dtype = operand(node, "input"), operand(node, "dtype")
    if node.target not in DEQUANTIZE or node.target not in _OPS or not isinstance(x, Node):
        return None
    tensor = node_tensor(x)
    if tensor is not None and tensor.dtype != dtype:
        return f"it dequantizes {dtype}, but '{x.name}' is {tensor.dtype}"
    return None


def _range_fits(node: Node) -> str | None:
    if node.target not in _OPS:
        return None
    low, high, dtype = (operand(node, name) for name in ("quant_min", "quant_max", "dtype"))
    bounds = INTEGER_BOUNDS.get(dtype) if isinstance(dtype, torch.dtype) else None
    if bounds is None or not isinstance(low, int) or not isinstance(high, int):
        return None
    return None if bounds[0] <= low <= high <= bounds[1] else f"the range [{low}, {high}] does not fit {dtype}"


def _scales_fit_channels(node: Node) -> str | None:
    if node.target not in _PER_CHANNEL:
        return None
    x, scale, axis = (operand(node, name) for name in ("input", "scales", "axis"))
    if not isinstance(x, Node) or not isinstance(scale, Node) or not isinstance(axis, int):
        return None
    tensor, scales = node_tensor(x), node_tensor(scale)
    if tensor is None or scales is None:
        return None
    if not -tensor.dim() <= axis < tensor.dim():
        return f"its channel axis is {axis}, but '{x.name}' has {tensor.dim()} dimensions"
    if isinstance(tensor.shape[axis], int) and tensor.shape[axis] != scales.numel():
        return f"{scales.numel()} scales for {tensor.shape[axis]} channels along axis {axis}"
    return None


def _scales_fit_groups(node: Node) -> str | None:
    x, scale, size = (operand(node, name) for name in ("input", "scales", "group_size"))
    if node.target not in _PER_GROUP or not isinstance(x, Node) or not isinstance(scale, Node):
        return None
    tensor, scales = node_tensor(x), node_tensor(scale)
    if tensor is None or scales is None or not isinstance(size, int):
        return None
    if size < 1:
        return f"its groups have {size} values"
    if any(type(number) is not int for number in tensor.shape):
        return None
    if tensor.dim() != 2 or tensor.shape[1] % size:
        return f"groups of {size} do not divide the rows of '{x.name}', which is {list(tensor.shape)}"
    wanted = tensor.numel() // size
    return None if scales.numel() == wanted else f"{scales.numel()} scales for {wanted} groups"


def _positive_scale(node: Node) -> str | None:
    scale = operand(node, "scale" if node.target in _PER_TENSOR else "scales")
    if node.target in _PER_TENSOR and isinstance(scale, (int, float)):
        plain = not isinstance(scale, bool) and 0 < scale < float("inf")
        return None if plain else f"its scale is {scale}"
    if node.target in (*_PER_CHANNEL, *_PER_GROUP) and isinstance(scale, Node):
        owner = node.graph.owning_module
        scales = None if owner is None else tensor_at(owner, scale)
        if scales is not None and scales.dtype not in _SCALE_DTYPES:
            return f"its scales are {scales.dtype}"
        if scales is not None and not bool((torch.isfinite(scales) & (scales > 0)).all()):
            return "one of its scales is not a positive, finite number"
    return None


PARAMETER_RULES: tuple[tuple[str, Callable[[Node], str | None]], ...] = (
    ("a dequantize reads the dtype it names", _dequantizes_its_dtype),
    ("the integer range fits the dtype", _range_fits),
    ("one scale per channel", _scales_fit_channels),
    ("one scale per group", _scales_fit_groups),
    ("scales are positive and finite", _positive_scale),
)
"""What holds for the parameters of every op that quantizes or dequantizes."""
