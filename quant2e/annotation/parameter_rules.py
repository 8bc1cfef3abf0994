"""Rules of the numbers in quantize and dequantize ops: scales, zero points, ranges, and the dtypes they belong to.

Each row is a rule: its name, and a function that says what is wrong with a node, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.graph.attributes import tensor_at
from quant2e.graph.fake_values import node_tensor
from quant2e.graph.qdq_ops import DEQUANTIZE, qd

_PER_CHANNEL = (qd.quantize_per_channel.default, qd.dequantize_per_channel.default)
_PER_GROUP = (qd.quantize_per_channel_group.default, qd.dequantize_per_channel_group.default)
_PER_TENSOR = (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default)
_DTYPE_ARGUMENT: dict[Any, int] = {
    **dict.fromkeys((*_PER_TENSOR, qd.quantize_per_tensor.tensor, qd.dequantize_per_tensor.tensor), 5),
    **dict.fromkeys(_PER_CHANNEL, 6),
    **dict.fromkeys(_PER_GROUP, 5),
}
"""Position of the storage dtype among the arguments; the two before it are the integer range."""

_SCALE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _dequantizes_its_dtype(node: Node) -> str | None:
    position = _DTYPE_ARGUMENT.get(node.target)
    if node.target not in DEQUANTIZE or position is None or not isinstance(node.args[0], Node):
        return None
    tensor = node_tensor(node.args[0])
    if tensor is not None and tensor.dtype != node.args[position]:
        return f"it dequantizes {node.args[position]}, but '{node.args[0].name}' is {tensor.dtype}"
    return None


def _range_fits(node: Node) -> str | None:
    position = _DTYPE_ARGUMENT.get(node.target)
    if position is None:
        return None
    low, high, dtype = node.args[position - 2 : position + 1]
    bounds = INTEGER_BOUNDS.get(dtype) if isinstance(dtype, torch.dtype) else None
    if bounds is None or not isinstance(low, int) or not isinstance(high, int):
        return None
    return None if bounds[0] <= low <= high <= bounds[1] else f"the range [{low}, {high}] does not fit {dtype}"


def _scales_fit_channels(node: Node) -> str | None:
    if node.target not in _PER_CHANNEL:
        return None
    x, scale, _, axis = node.args[:4]
    if not isinstance(x, Node) or not isinstance(scale, Node) or not isinstance(axis, int):
        return None
    tensor, scales = node_tensor(x), node_tensor(scale)
    if tensor is None or scales is None:
        return None
    if axis >= tensor.dim():
        return f"its channel axis is {axis}, but '{x.name}' has {tensor.dim()} dimensions"
    if isinstance(tensor.shape[axis], int) and tensor.shape[axis] != scales.numel():
        return f"{scales.numel()} scales for {tensor.shape[axis]} channels along axis {axis}"
    return None


def _scales_fit_groups(node: Node) -> str | None:
    if node.target not in _PER_GROUP or not isinstance(node.args[0], Node) or not isinstance(node.args[1], Node):
        return None
    tensor, scales, size = node_tensor(node.args[0]), node_tensor(node.args[1]), node.args[6]
    if tensor is None or scales is None or not isinstance(size, int):
        return None
    if size < 1:
        return f"its groups have {size} values"
    if any(type(number) is not int for number in tensor.shape):
        return None
    if tensor.dim() != 2 or tensor.shape[1] % size:
        return f"groups of {size} do not divide the rows of '{node.args[0].name}', which is {list(tensor.shape)}"
    wanted = tensor.numel() // size
    return None if scales.numel() == wanted else f"{scales.numel()} scales for {wanted} groups"


def _positive_scale(node: Node) -> str | None:
    if node.target in _PER_TENSOR and isinstance(node.args[1], float):
        return None if 0 < node.args[1] < float("inf") else f"its scale is {node.args[1]}"
    if node.target in (*_PER_CHANNEL, *_PER_GROUP) and isinstance(node.args[1], Node):
        owner = node.graph.owning_module
        scales = None if owner is None else tensor_at(owner, node.args[1])
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
