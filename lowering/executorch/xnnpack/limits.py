"""Limits of XNNPACK, checked before a graph is handed over, so that a program that converts also runs.

Each limit is one that ExecuTorch 1.4's partitioner and serializer let through, to fail when the program is loaded
or to compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.data_movement import CLAMPS
from lowering.executorch.xnnpack.legalize.dynamic_quantization import DYNAMIC_CONVOLUTIONS, chooser_of
from quant2e.errors import LoweringError, where
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import literal, operand
from quant2e.graph.fake_values import node_tensor, shape_of
from quant2e.graph.qdq_ops import CHOOSE_PER_TENSOR, CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, qd

_ATEN = torch.ops.aten
_PER_TENSOR = (qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default)
_WEIGHTED = (
    _ATEN.linear.default,
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.conv_transpose2d.input,
)
ACCUMULATOR_RATIO = 256.0
"""Scale of input times scale of weight over scale of result: XNNPACK builds no operator from here on."""

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def check_limits(module: GraphModule) -> tuple[str, ...]:
    """Raise `LoweringError` naming every node beyond XNNPACK's limits; return what it computes differently.

    ``module``: the legal Q/DQ graph.
    """
    problems = [
        problem for node in module.graph.nodes if node.op == "call_function" for problem in _problems(module, node)
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise LoweringError(f"XNNPACK cannot run this graph:\n  {listed}")
    return tuple(note for node in module.graph.nodes if node.op == "call_function" for note in _notes(node))


def beside_float16(module: GraphModule) -> frozenset[Node]:
    """The quantize and dequantize nodes that XNNPACK computes beside float16: of dynamic linears and convolutions.

    Their weights have 8 bits per channel, or 4 in groups; with 4 per channel a program does not load. What is quantized
    with parameters known in advance is refused: a static float16 convolution computes garbage.
    """
    found: set[Node] = set()
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in (_ATEN.linear.default, _ATEN.conv2d.default):
            continue
        x, weight = operand(node, "input"), operand(node, "weight")
        floats = node_tensor(x)
        if chooser_of(x) is None or floats is None or floats.dtype is not torch.float16:
            continue
        per_channel = weight.target is qd.dequantize_per_channel.default
        if not (per_channel and (operand(weight, "quant_min"), operand(weight, "quant_max")) == (-8, 7)):
            found |= {x, operand(x, "input"), weight}
    return frozenset(found)


def _problems(module: GraphModule, node: Node) -> Iterator[str]:
    if node.target in QUANTIZE or node.target in DEQUANTIZE or node.target in CHOOSE_QPARAMS:
        yield from _dtype_problems(node)
    if node.target in _PER_TENSOR:
        yield from _scale_problems(node, node.args[1])
        yield from _zero_point_problems(node)
    if node.target is qd.dequantize_per_channel.default:
        scales = tensor_at(module, node.args[1])
        if scales is not None:
            bad = ~scales.isfinite() | (scales.abs() < _SMALLEST_NORMAL) | (scales < 0)
            if bad.any():
                worst = int(bad.nonzero()[0])
                yield from _scale_problems(node, float(scales.flatten()[worst]), f" of channel {worst}")
    if node.target is qd.dequantize_per_channel_group.default:
        yield from _group_problems(module, node)
    if node.target in _WEIGHTED:
        yield from _weight_problems(module, node)
        yield from _bias_problems(module, node)
        yield from _accumulator_problems(module, node)


def _dtype_problems(node: Node) -> Iterator[str]:
    dtypes = [arg for arg in node.args if isinstance(arg, torch.dtype)]
    dtype = dtypes[0] if dtypes else torch.int8
    if dtype is torch.int8 or (dtype is torch.int32 and node.target in DEQUANTIZE):
        return
    hint = "; XNNPACK takes int8: quantize for XNNPACK (XNNPACKQuantizer), or lower with to_inductor"
    yield f"{where(node)} is {str(dtype).removeprefix('torch.')}{hint}"


def _scale_problems(node: Node, scale: object, which: str = "") -> Iterator[str]:
    if not isinstance(scale, int | float):
        return
    if not math.isfinite(scale) or scale < _SMALLEST_NORMAL:
        yield (
            f"{where(node)}: scale {scale:g}{which} is not a positive, finite, normal float32; "
            f"calibrate with data that reaches this tensor, or leave the op in float"
        )


def _zero_point_problems(node: Node) -> Iterator[str]:
    arguments: tuple[Any, ...] = node.args
    zero_point, low, high = arguments[2:5]
    if isinstance(zero_point, int) and not low <= zero_point <= high:
        yield f"{where(node)}: zero point {zero_point} is outside of [{low}, {high}]"


def _weight_problems(module: GraphModule, node: Node) -> Iterator[str]:
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.target not in DEQUANTIZE:
        return
    if weight.target is qd.dequantize_per_channel.default:
        zeros = tensor_at(module, weight.args[2])
        if zeros is not None and zeros.any():
            channel = int(zeros.nonzero()[0])
            yield (
                f"{where(node)}: its weight has zero point {int(zeros[channel])} in channel {channel}, and XNNPACK "
                f"drops the zero points of channels; use torch.per_channel_symmetric for weights"
            )
    elif weight.target is qd.dequantize_per_tensor.default and weight.args[2] != 0:
        yield (
            f"{where(node)}: its weight has zero point {weight.args[2]}; XNNPACK takes weights with zero point 0: "
            f"use torch.per_tensor_symmetric for weights"
        )


def _group_problems(module: GraphModule, node: Node) -> Iterator[str]:
    """Weights in groups: XNNPACK reads them from a program file in 4 bits, in groups of a multiple of 32."""
    arguments: tuple[Any, ...] = node.args
    low, high, group = arguments[3], arguments[4], arguments[6]
    columns = shape_of(node)[-1]
    if group % 32 or int(columns) % group:
        yield (
            f"{where(node)} has groups of {group} of {columns} columns; XNNPACK takes groups of a multiple of 32 that "
            f"divides the columns: choose another group_size"
        )
    if (low, high) not in ((-8, 7), (0, 15)):
        yield (
            f"{where(node)} has integers in [{low}, {high}] in groups; XNNPACK takes groups of 4-bit weights only: use "
            f"[-8, 7], or one scale per channel"
        )

    zeros = tensor_at(module, arguments[2])
    if zeros is not None and zeros.any():
        yield (
            f"{where(node)} has zero point {int(zeros[zeros != 0][0])} in a group; XNNPACK takes zero point "
            "0 for weights: use a "
            f"symmetric scheme"
        )


def _bias_problems(module: GraphModule, node: Node) -> Iterator[str]:
    bias = node.args[2] if len(node.args) > 2 else None
    if not isinstance(bias, Node) or bias.target not in DEQUANTIZE:
        return
    zero: Any = bias.args[2]
    if isinstance(zero, Node):
        values = tensor_at(module, zero)
        zero = int(values.abs().max()) if values is not None else 0
    if zero:
        yield (
            f"{where(node)}: its bias has zero point {zero}; XNNPACK takes zero point 0 for int32: use a symmetric one"
        )


def _accumulator_problems(module: GraphModule, node: Node) -> Iterator[str]:
    """Sums, products and means take any ratio of scales; a product with a weight is refused when it is loaded."""
    x, weight, out = node.args[0], node.args[1], _quantize_behind(node)
    if not isinstance(x, Node) or x.target is not qd.dequantize_per_tensor.default or out is None:
        return
    largest = _largest_scale(module, weight)
    scales: tuple[Any, Any] = (x.args[1], out.args[1])
    if largest is not None and scales[0] * largest / scales[1] >= ACCUMULATOR_RATIO:
        yield (
            f"{where(node)}: scale of the input {scales[0]:.3g} times scale of the weight {largest:.3g} is "
            f"{scales[0] * largest / scales[1]:.3g} times the scale of the result {scales[1]:.3g}; "
            "XNNPACK takes less than "
            f"{ACCUMULATOR_RATIO:g}. Calibrate with data that reaches the result, or leave the op in float"
        )


def _quantize_behind(node: Node) -> Node | None:
    """The quantize that follows an op, behind a fused clamp or not."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in CLAMPS:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and users[0].target is qd.quantize_per_tensor.default else None


def _largest_scale(module: GraphModule, weight: object) -> float | None:
    if not isinstance(weight, Node):
        return None
    scale: Any = weight.args[1] if weight.target in DEQUANTIZE else None
    if isinstance(scale, Node):
        scales = tensor_at(module, scale)
        return float(scales.max()) if scales is not None else None
    return scale if isinstance(scale, int | float) else None


_AXIS: Mapping[Any, int] = {_ATEN.conv_transpose2d.input: 1}
"""Along which axis a weight may have a scale per channel; 0 unless it is here."""


def _axis_notes(node: Node) -> Iterator[str]:
    weight = node.args[1] if node.target in _WEIGHTED else None
    if not isinstance(weight, Node) or weight.target is not qd.dequantize_per_channel.default:
        return
    axis, expected = weight.args[3], _AXIS.get(node.target, 0)
    if axis != expected:
        yield (
            f"{where(node)} has a scale per channel along axis {axis} of its weight; XNNPACK takes axis {expected}, so "
            f"the op runs in float and its weight is dequantized on each call: quantize it with ch_axis={expected}"
        )


def _notes(node: Node) -> Iterator[str]:
    if node.target is qd.quantize_per_tensor.default:
        arguments: tuple[Any, ...] = node.args
        low, high = arguments[3:5]
        if low > -127 or high < 127:
            yield (
                f"{where(node)} is limited to [{low}, {high}] in the graph; XNNPACK limits it to "
                "[-128, 127], so values "
                f"beyond the calibrated range are cut off later"
            )
    yield from _axis_notes(node)
    chooser = chooser_of(node.args[0]) if node.target in DYNAMIC_CONVOLUTIONS else None
    if chooser is None:
        return
    per_tensor = chooser.target in CHOOSE_PER_TENSOR
    if _reads_pixels(node):
        graph = "tensor" if per_tensor else "image"
        yield f"{where(node)}: XNNPACK quantizes the input of this 1 × 1 convolution per pixel, the graph per {graph}"
    elif per_tensor and shape_of(node)[0] != 1:
        yield f"{where(node)}: XNNPACK quantizes the input of a dynamic convolution per image, the graph per tensor"


def _reads_pixels(node: Node) -> bool:
    """Whether XNNPACK computes a convolution as a product of pixels: one by one, without strides, padding or groups."""
    plain = {"stride": 1, "padding": 0, "groups": 1}
    ones = all(set(_numbers(literal(node, name))) <= {value} for name, value in plain.items())
    return node.target is _ATEN.conv2d.default and ones and tuple(shape_of(node.all_input_nodes[1])[2:]) == (1, 1)


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
