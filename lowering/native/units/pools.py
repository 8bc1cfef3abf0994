"""Pools of images, as units of a region."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import RegionStep, StepKind
from lowering.native.units.unit import Emitter, Ending, Unit, ending_of, finish
from lowering.native.units.values import image_of, integers_of, pair, quantizes, stored
from quant2e.graph.dataflow import operands

aten = torch.ops.aten

_LARGEST = aten.max_pool2d.default
_AVERAGE = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim})
_BY_ALL, _BY_INSIDE = 1, 2


def pool_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of a pool; why there is none; None for other ops."""
    del gm
    if node.target is not _LARGEST and node.target not in _AVERAGE:
        return None
    operand = node.args[0]
    source = stored(operand) or operand
    x, y = image_of(source), image_of(node)
    if not isinstance(source, Node) or x is None or y is None or len(source.meta["val"].shape) != 4:
        return "its operand is no image, or its sizes vary"
    if node.target is _LARGEST and source is operand:
        return "its operand is float"
    step = _largest(node) if node.target is _LARGEST else _average(node, x, y)
    if isinstance(step, str):
        return step
    ending = ending_of(node, taken, adds=False)
    if node.target is _LARGEST and not _same_scale(source, ending):
        return "its result is rounded with another scale than its operand has"
    dequantizes = node.all_input_nodes if source is not operand else []

    def emit(emitter: Emitter) -> None:
        step.x = emitter.read(source)
        if (integers := integers_of(source)) is not None and source is not operand:
            step.x_scale, step.x_zero = integers.scale, integers.zero
        finish(emitter, step, ending=ending)

    return Unit(nodes=(*dequantizes, node, *ending.nodes), reads=(source,), writes=ending.writes, emit=emit)


def _same_scale(source: Node, ending: Ending) -> bool:
    """Whether the largest byte is the result as it is."""
    wanted = ending.integers
    if wanted is None or ending.floats is not None or ending.activation.kind or not quantizes(wanted):
        return False
    return integers_of(wanted) == integers_of(source)


def _largest(node: Node) -> RegionStep:
    given = operands(node)
    kernel = pair(given["kernel_size"])
    stride = pair(given["stride"]) if given["stride"] else kernel
    padding, dilation = pair(given["padding"]), pair(given["dilation"])
    return RegionStep(
        kind=StepKind.POOL, kernel_h=kernel[0], kernel_w=kernel[1], stride_h=stride[0], stride_w=stride[1],
        top=padding[0], left=padding[1], dilation_h=dilation[0], dilation_w=dilation[1],
    )  # fmt: skip


def _average(node: Node, x: tuple[int, int, int], y: tuple[int, int, int]) -> RegionStep | str:
    given = operands(node)
    if node.target is aten.avg_pool2d.default:
        kernel = pair(given["kernel_size"])
        stride = pair(given["stride"]) if given["stride"] else kernel
        padding = pair(given["padding"])
        if given["ceil_mode"]:
            return "an average with ceil_mode"
        mode = _BY_ALL if given["count_include_pad"] or given["divisor_override"] else _BY_INSIDE
        count = given["divisor_override"] or kernel[0] * kernel[1]
    else:
        if node.target is aten.mean.dim:
            dims = {dim % 4 for dim in given["dim"] or ()}
            if dims != {2, 3}:
                return "a mean along other axes than height and width"
        if x[0] % y[0] or x[1] % y[1]:
            return "windows of different sizes"
        kernel = stride = (x[0] // y[0], x[1] // y[1])
        padding, mode, count = (0, 0), _BY_ALL, kernel[0] * kernel[1]
    return RegionStep(
        kind=StepKind.POOL, kernel_h=kernel[0], kernel_w=kernel[1], stride_h=stride[0], stride_w=stride[1],
        top=padding[0], left=padding[1], mode=mode, extra=int(count),
    )  # fmt: skip
