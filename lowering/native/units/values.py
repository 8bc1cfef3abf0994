"""What a region computes with, read off a Q/DQ graph: integers with their scale, and the images that tensors are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.qdq_ops import qd

OFFSET = 128
"""Regions compute with unsigned bytes: a signed one is stored with this much more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers:
    """How integers stand for numbers, as they are stored: unsigned, ``(q - zero) * scale``, ``low`` to ``high``."""

    scale: float
    zero: int
    low: int
    high: int

    def nearest(self, number: float) -> int:
        """The integer that a number becomes, as torch rounds it."""
        inverse = torch.tensor(1.0) / torch.tensor(self.scale, dtype=torch.float32)
        rounded = torch.round(torch.tensor(number, dtype=torch.float32) * inverse)
        return int(rounded.clamp(-1e6, 1e6).item()) + self.zero

    @property
    def inverse(self) -> float:
        """One divided by the scale, in float32 as torch divides."""
        return float(torch.tensor(1.0) / torch.tensor(self.scale, dtype=torch.float32))


_PAIR = {qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default}


def integers_of(node: object) -> Integers | None:
    """The parameters of a quantize or dequantize op whose parameters are numbers, of bytes; None for any other node."""
    if not isinstance(node, Node) or node.target not in _PAIR:
        return None
    given = operands(node)
    if given["dtype"] not in (torch.int8, torch.uint8) or given.get("out_dtype") not in (None, torch.float32):
        return None
    offset = OFFSET if given["dtype"] is torch.int8 else 0
    low, high = int(given["quant_min"]) + offset, int(given["quant_max"]) + offset
    scale, zero = float(given["scale"]), int(given["zero_point"]) + offset
    if not 0 <= low <= zero <= high <= 255 or scale <= 0:
        return None
    return Integers(scale=scale, zero=zero, low=low, high=high)


def quantizes(node: object) -> bool:
    """Whether a node makes bytes of floats, by parameters that are numbers."""
    return isinstance(node, Node) and node.target is qd.quantize_per_tensor.default and integers_of(node) is not None


def is_between_units(node: object) -> bool:
    """Whether a node makes bytes of floats that nothing reads but dequantize ops with the same parameters."""
    return isinstance(node, Node) and quantizes(node) and all(stored(user) is node for user in node.users)


def stored(node: object) -> Node | None:
    """The quantize op whose integers a dequantize op reads, with the same parameters; None for any other node."""
    if not isinstance(node, Node) or node.target is not qd.dequantize_per_tensor.default:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or not quantizes(source):
        return None
    return source if integers_of(source) == integers_of(node) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A constant weight: ``integers`` int8, outputs first; ``scale``: float32, one per output."""

    integers: Tensor
    scale: Tensor


def weight_at(gm: GraphModule, node: object) -> Weight | None:
    """What a dequantize op of a constant symmetric int8 weight reads, whose outputs come first; else None."""
    return _weight_by(gm, node, 0)


def transposed_weight_at(gm: GraphModule, node: object, groups: int) -> Weight | None:
    """As `weight_at`, of a weight ``[inputs, outputs of a group, height, width]``: as a plain convolution has it."""
    found = _weight_by(gm, node, 1)
    if found is None:
        return None
    grouped = found.integers.unflatten(0, (groups, -1)).transpose(1, 2)
    return Weight(integers=grouped.flatten(0, 1).contiguous(), scale=found.scale.repeat(groups))


def _weight_by(gm: GraphModule, node: object, axis: int) -> Weight | None:
    """A weight as it is stored, with a scale for each place along ``axis``."""
    if not isinstance(node, Node):
        return None
    value = tensor_at(gm, node.args[0]) if node.args else None
    if value is None or value.dtype is not torch.int8:
        return None
    given = operands(node)
    if node.target is qd.dequantize_per_channel.default:
        scale, zeros = tensor_at(gm, given["scales"]), given["zero_points"]
        points = tensor_at(gm, zeros)
        if scale is None or given["axis"] != axis or (zeros is not None and (points is None or bool(points.any()))):
            return None
        return Weight(integers=value.detach(), scale=scale.detach().to(torch.float32))
    if node.target is qd.dequantize_per_tensor.default and given["zero_point"] == 0:
        return Weight(integers=value.detach(), scale=torch.full((value.shape[axis],), float(given["scale"])))
    return None


def image_shape(node: object) -> tuple[Any, ...] | None:
    """Sizes of a float32 or byte tensor on the CPU, the first of which may be a symbol; None for any other."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return None
    if value.dtype not in (torch.float32, torch.int8, torch.uint8) or value.dim() not in (2, 3, 4):
        return None
    sizes: tuple[Any, ...] = tuple(value.shape)
    return sizes if all(isinstance(size, int) and size for size in sizes[1:]) else None


def pair(value: Any) -> tuple[int, int]:
    """A size of height and width, which ops may be given as one number for both."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return int(values[0]), int(values[-1])


def same_size(one: Any, two: Any) -> bool:
    """Whether two sizes are the same number, or the same symbol; no condition is put on a symbol."""
    if isinstance(one, int) and isinstance(two, int):
        return one == two
    if isinstance(one, int) or isinstance(two, int):
        return False
    return bool(one.node.expr == two.node.expr)


def equal_shapes(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    """Whether two tensors have the same sizes."""
    return len(one) == len(two) and all(same_size(a, b) for a, b in zip(one, two, strict=True))


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same shape have the same strides, where an axis has more than one step."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(same_size(size, 1) or same_size(a, b) for size, a, b in strides)


def lies_in(value: Tensor, order: Sequence[int]) -> bool:
    """Whether a tensor is dense, with its axes in this order in memory, the outermost first."""
    wanted: Any = 1
    for axis in reversed(order):
        size = value.shape[axis]
        if same_size(size, 1):
            continue
        if not same_size(value.stride(axis), wanted):
            return False
        wanted = wanted * size
    return True


def image_of(node: object) -> tuple[int, int, int] | None:
    """Height, width and channels of one sample: a tensor ``[n, c, h, w]``, ``[n, rows, c]`` or ``[n, c]``."""
    shape = image_shape(node)
    if shape is None:
        return None
    if len(shape) == 4:
        return shape[2], shape[3], shape[1]
    return (1, shape[1], shape[2]) if len(shape) == 3 else (1, 1, shape[1])
