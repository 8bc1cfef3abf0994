"""Sums behind convolutions, in a form that OpenVINO adds inside of the convolution's kernel.

    quantize(conv(x) + y)  =  quantize(fake_quantize(conv(x)) + y)        on a grid that rounds like the floats do

OpenVINO (2026.4) takes an addition into the kernel of a convolution only where it finds the convolution, its bias or a
FakeQuantize in front of the sum, and not the multiplication with which it brings products back to floats: the kernel
then returns floats, four times the bytes, and a second one adds. A FakeQuantize of 2^22 + 1 levels, over a range that
holds every result that the integers can give, clips nothing and moves no result by more than one part in four million
of that range; so the sum goes where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowering.openvino.session import import_openvino

LEVELS = 2**22 + 1
"""Steps that float32 counts exactly, with one at 0."""

_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
_CLAMPS = frozenset({"Relu", "Clamp", "Minimum", "Maximum"})


def sums_inside(model: Any) -> int:
    """Rewrite the sums of an ``openvino.Model`` in place, where the other operand is dequantized and the result is
    quantized; returns how many.

    A convolution that reads the other operand itself is left out: OpenVINO adds in place, over what it would read.
    """
    return sum(_inside(node) for node in model.get_ordered_ops() if node.get_type_name() == "Add")


def _inside(add: Any) -> bool:
    if not _is_quantized(add):
        return False
    for place in (0, 1):
        branch, other = add.input_value(place), add.input_value(1 - place)
        known, product = _dequantized(other.get_node()), _product(branch.get_node())
        if known is None or product is None or len(_readers(branch.get_node())) != 1:
            continue
        if product.x.integers != known.integers and branch.get_partial_shape() == other.get_partial_shape():
            _insert(add, place, product.bound())
            return True
    return False


def _insert(add: Any, place: int, bound: float) -> None:
    ops = import_openvino().opset13
    ends = [ops.constant(np.float32(end)) for end in (-bound, bound)]
    grid = ops.fake_quantize(add.input_value(place), *ends, *ends, LEVELS)
    add.input(place).replace_source_output(grid.output(0))


def _readers(node: Any) -> list[Any]:
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def _is_quantized(add: Any) -> bool:
    """Whether a sum, perhaps clamped, goes into one FakeQuantize."""
    node = add
    while len(readers := _readers(node)) == 1:
        node = readers[0]
        if node.get_type_name() not in _CLAMPS:
            return bool(node.get_type_name() == "FakeQuantize")
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dequantized:
    """A tensor that is dequantized as a whole: the op that quantizes it, and a magnitude that none of it exceeds."""

    integers: str
    most: float


def _dequantized(node: Any) -> _Dequantized | None:
    if node.get_type_name() != "Multiply" or (scale := _number(node.input_value(1))) is None:
        return None
    inside, zero = node.input_value(0).get_node(), 0.0
    if inside.get_type_name() == "Subtract":
        found = _number(inside.input_value(1))
        if found is None:
            return None
        inside, zero = inside.input_value(0).get_node(), found
    inside = _whole_range(inside)
    if inside.get_type_name() != "FakeQuantize":
        return None
    ends = [_number(inside.input_value(place)) for place in (3, 4)]
    known = [abs(end - zero) * scale for end in ends if end is not None]
    return _Dequantized(integers=inside.get_name(), most=max(known)) if len(known) == len(ends) else None


def _whole_range(integers: Any) -> Any:
    """Integers before they are converted, and cut to a narrower range than their dtype's."""
    while True:
        if integers.get_type_name() == "Convert":
            place = 0
        elif integers.get_type_name() in ("Minimum", "Maximum"):
            place = int(_number(integers.input_value(0)) is not None)
        else:
            return integers
        integers = integers.input_value(place).get_node()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A convolution of a dequantized tensor: ``weight`` with its outputs first, ``bias`` of each output or of all."""

    x: _Dequantized
    weight: np.ndarray
    bias: np.ndarray

    def bound(self) -> float:
        """The largest magnitude that it can return; 1 where that is nothing."""
        sums = np.abs(self.weight.astype(np.float64)).reshape(len(self.weight), -1).sum(-1)
        return float(sums.max() * self.x.most + np.abs(self.bias).max()) or 1.0


def _product(node: Any) -> _Product | None:
    bias: np.ndarray | None = np.zeros(1)
    if node.get_type_name() == "Add":
        added = node.input_value(1)
        while added.get_node().get_type_name() == "Reshape":  # to a rank that may be read from the batch
            added = added.get_node().input_value(0)
        bias, node = _constant(added), node.input_value(0).get_node()
    if bias is None or node.get_type_name() not in _CONVOLUTIONS:
        return None
    x, weight = _dequantized(node.input_value(0).get_node()), _constant(node.input_value(1))
    if x is None or weight is None:
        return None
    if node.get_type_name() == "GroupConvolution":
        weight = weight.reshape(-1, *weight.shape[2:])
    return _Product(x=x, weight=weight, bias=bias)


def _number(output: Any) -> float | None:
    """A constant of one number; None for anything else."""
    value = _constant(output)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def _constant(output: Any) -> np.ndarray | None:
    """The values of what depends on constants alone; None for anything else."""
    node = output.get_node()
    if any(above.get_type_name() in ("Parameter", "ReadValue") for above in _above(node)):
        return None
    if node.get_type_name() == "Constant":
        return np.asarray(node.get_data())
    openvino = import_openvino()
    found = openvino.Tensor(output.get_element_type(), openvino.Shape(output.get_shape()))
    return np.asarray(found.data) if openvino.Model([output], []).evaluate([found], []) else None


def _above(node: Any) -> Iterator[Any]:
    """A node, and all that it depends on."""
    seen, waiting = {node.get_name()}, [node]
    while waiting:
        node = waiting.pop()
        yield node
        for each in node.input_values():
            if each.get_node().get_name() not in seen:
                seen.add(each.get_node().get_name())
                waiting.append(each.get_node())
