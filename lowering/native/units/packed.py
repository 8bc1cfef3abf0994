"""Steps of convolutions and linear layers, with their weights packed as the kernels read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowering.native.kernels.op import instruction_set
from lowering.native.kernels.pack import (
    LANES,
    STRIP,
    Packed,
    depthwise_rows,
    pack_convolution,
    pack_depthwise,
    padded,
    per_output,
)
from lowering.native.kernels.plan import Arithmetic, RegionConstants, RegionStep, StepKind
from lowering.native.units.arithmetic import arithmetic_of
from lowering.native.units.values import Integers
from lowering.native.units.windows import Pair, ResultPart, Window

_MOST_DEPTHWISE_ROWS = 8
_MOST_REACH, _MOST_REACH_OF_ROWS = 40, 128
"""Columns that the depthwise kernel interleaves at a time hold at least one output whose kernel spans so many; of one
that is a row, every fourth of its columns."""
_TOGETHER = 4
"""Bytes of one lane."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStep:
    """A step whose weight is packed. What it reads, scale, bias and what it writes are still to be filled in.

    ``groups``: whose outputs lie behind each other, each filled up to a multiple of ``lanes``. ``border``: rows above
    and below its image, and pixels left and right of it, that it reads.
    """

    step: RegionStep
    groups: int
    lanes: int
    border: Pair = (0, 0)


def packed_steps(
    constants: RegionConstants, weight: Tensor, x: Integers, parts: Iterable[ResultPart], groups: int
) -> list[PackedStep]:
    """A step for each part of a product's result. ``weight``: int8 ``[outputs, inputs of a group]``, and its height and
    width. ``x``: of the activation.
    """
    return [_packed_part(constants, weight, x, part, groups) for part in parts]


def add_numbers(constants: RegionConstants, packed: Iterable[PackedStep], scale: Tensor, bias: Tensor) -> None:
    """Store scale and bias of each output as the steps read them."""
    places: dict[tuple[int, int], list[int]] = {}
    for one in packed:
        way = (one.groups, one.lanes)
        if way not in places:
            places[way] = [constants.add(per_output(numbers, *way)) for numbers in (scale, bias)]
        one.step.scale, one.step.bias = places[way]


def border_of(packed: Iterable[PackedStep]) -> Pair:
    """What all of them read around their image."""
    borders = [one.border for one in packed]
    return max(h for h, _ in borders), max(w for _, w in borders)


def _packed_part(constants: RegionConstants, weight: Tensor, x: Integers, part: ResultPart, groups: int) -> PackedStep:
    if part.window is None:
        made = _bias_alone(constants, weight.shape[0])
    else:
        if part.rows is not None and part.columns is not None:
            weight = weight[:, :, list(part.rows)][:, :, :, list(part.columns)]
        made = packed_step(constants, weight, x, part.window, groups)
    made.step.every_h, made.step.every_w = part.every
    made.step.from_h, made.step.from_w = part.first
    return made


def _bias_alone(constants: RegionConstants, outputs: int) -> PackedStep:
    """Sums of nothing."""
    nothing = constants.add(torch.zeros(padded(outputs), dtype=torch.int32))
    step = RegionStep(
        kind=StepKind.CONVOLUTION, stride_h=0, stride_w=0, outputs=outputs, taps=0, weight=nothing, init=nothing
    )
    return PackedStep(step=step, groups=1, lanes=LANES)


def _is_depthwise(weight: Tensor, window: Window, groups: int) -> bool:
    """Whether each channel has a kernel of its own, of a size that the kernel for that takes."""
    alone = weight.dim() == 4 and weight.shape[1] == 1 and groups == weight.shape[0] > 1
    (height, width), dilation = window.kernel, window.dilation[1]
    if height == 1:
        return alone and (padded(width, _TOGETHER) - _TOGETHER) * dilation + 1 <= _MOST_REACH_OF_ROWS
    return alone and height <= _MOST_DEPTHWISE_ROWS and (width - 1) * dilation + 1 <= _MOST_REACH


def packed_step(constants: RegionConstants, weight: Tensor, x: Integers, window: Window, groups: int) -> PackedStep:
    """The step of a convolution or linear layer: `packed_steps` of one part."""
    if _is_depthwise(weight, window, groups):
        return _depthwise_step(constants, weight, x, window)
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    step = _step(StepKind.CONVOLUTION, x, window)
    step.groups, step.inputs, step.outputs = groups, weight.shape[1], weight.shape[0] // groups
    rows = groups == 1 and window.dilation[1] == 1
    step.arithmetic = arithmetic_of(weight, x) if instruction_set() == "avx2" else Arithmetic.EXACT
    step.strip = STRIP if instruction_set() == "avx512_vnni" else LANES  # what the registers hold the sums of
    packed = pack_convolution(weight, x.zero, groups, rows=rows, arithmetic=step.arithmetic, strip=step.strip)
    _add(constants, step, packed)
    return PackedStep(step=step, groups=groups, lanes=LANES, border=window.border)


def _depthwise_step(constants: RegionConstants, weight: Tensor, x: Integers, window: Window) -> PackedStep:
    """A kernel of one row is packed as four: in a lane, four of its columns lie in the place of four rows."""
    step, border = _step(StepKind.DEPTHWISE, x, window), window.border
    step.groups, step.inputs, step.outputs = weight.shape[0], 1, 1
    rows = depthwise_rows(window.kernel, window.stride, window.dilation)
    height, width = window.kernel
    if height == 1 < width:
        more = padded(width, _TOGETHER) - width
        weight = pad(weight, (0, more)).unflatten(3, (-1, _TOGETHER))[:, :, 0].transpose(2, 3)
        step.extra, step.dilation_h, step.dilation_w = step.dilation_w, 0, _TOGETHER * step.dilation_w
        step.kernel_h, step.kernel_w = _TOGETHER, weight.shape[3]
        border = border[0], max(border[1], window.after[1] + more * window.dilation[1])
    _add(constants, step, pack_depthwise(weight, x.zero, rows=rows, stride=window.stride[0]))
    return PackedStep(step=step, groups=1, lanes=STRIP, border=border)


def _step(kind: StepKind, x: Integers, window: Window) -> RegionStep:
    return RegionStep(
        kind=kind,
        x_scale=x.scale,
        x_zero=x.zero,
        kernel_h=window.kernel[0],
        kernel_w=window.kernel[1],
        stride_h=window.stride[0],
        stride_w=window.stride[1],
        top=window.before[0],
        left=window.before[1],
        dilation_h=window.dilation[0],
        dilation_w=window.dilation[1],
    )


def _add(constants: RegionConstants, step: RegionStep, packed: Packed) -> None:
    step.taps, step.inner = packed.taps, packed.inner
    step.weight, step.init = constants.add(packed.weight), constants.add(packed.init)
