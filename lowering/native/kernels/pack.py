"""Packing of weights: the order in which the kernels read them, and what belongs to each output.

``kernels/README.md`` shows the order in a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowering.native.kernels.plan import Arithmetic

LANES = 16
STRIP = 64
"""Outputs that are computed together: four registers of `LANES`."""
SHIFT = 128
"""What `Arithmetic.SIGNED` takes away from activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """``weight``: int8. ``init``: int32, what sums begin with. ``taps``, ``inner``: of one group, and bytes of each.

    Of `Arithmetic.SIGNED`, ``init`` holds two numbers for each output: behind all the first, what sums of activations
    minus 128 begin with.
    """

    weight: Tensor
    init: Tensor
    taps: int
    inner: int


def padded(count: int, to: int = LANES) -> int:
    """``count``, or the next multiple of ``to``."""
    return -(-count // to) * to


def pack_convolution(
    weight: Tensor, zero_point: int, groups: int, *, rows: bool, arithmetic: Arithmetic, strip: int = STRIP
) -> Packed:
    """Pack an int8 weight ``[outputs, inputs of a group, height, width]`` for activations with this zero point.

    ``rows``: whether a tap is a row of the kernel, whose bytes lie side by side in the image. Of each group, strips of
    64 outputs (then 32, then 16), or of ``strip`` at the most, hold for each tap and each four inputs the four bytes of
    every output.
    """
    outputs, _, height, width = weight.shape
    by_tap = weight.permute(0, 2, 3, 1)  # [outputs, height, width, inputs]
    taps = height if rows else height * width
    by_tap = by_tap.reshape(groups, outputs // groups, taps, -1)
    inner = padded(by_tap.shape[3], 4)
    zeros = (zero_point, zero_point - SHIFT) if arithmetic is Arithmetic.SIGNED else (zero_point,)
    init = torch.stack([_init(by_tap.flatten(2), zero) for zero in zeros])
    filled = pad(by_tap, (0, inner - by_tap.shape[3], 0, 0, 0, padded(outputs // groups) - outputs // groups))
    parts = [part for group in filled for part in _strips(group, strip)]
    init = pad(init, (0, padded(init.shape[2]) - init.shape[2])).flatten()
    return Packed(weight=torch.cat(parts), init=init, taps=taps, inner=inner)


def _strips(group: Tensor, most: int) -> list[Tensor]:
    """``[outputs, taps, inner]`` as strips of outputs, each ``[taps, inner / 4, outputs of the strip, 4]``, flat."""
    made, at = [], 0
    outputs, taps, inner = group.shape
    while at < outputs:
        left = outputs - at
        wide = next(width for width in (STRIP, STRIP // 2, LANES) if width <= min(left, most))
        strip = group[at : at + wide].reshape(wide, taps, inner // 4, 4)
        made.append(strip.permute(1, 2, 0, 3).flatten())
        at += wide
    return made


def pack_depthwise(weight: Tensor, zero_point: int, *, rows: int = 0, stride: int = 1) -> Packed:
    """Pack an int8 weight ``[channels, 1, height, width]``, of at most 8 rows.

    For each 64 channels, for each column of the kernel and each four rows: the four bytes of every channel. ``rows`` of
    outputs that are computed together (`depthwise_rows`) have weights of their own side by side there, each moved down
    by ``stride`` rows; 0 for sizes that have no kernel of their own.
    """
    channels, _, height, width = weight.shape
    init = _init(weight.reshape(1, channels, -1), zero_point)
    groups, more = padded(height, 4) // 4, padded(channels, STRIP) - channels
    below = [groups * 4 - height - stride * row for row in range(max(1, rows))]
    moved = [pad(weight[:, 0], (0, 0, stride * row, space, 0, more)) for row, space in enumerate(below)]
    blocks = torch.stack(moved, 1).reshape(-1, STRIP, max(1, rows), groups, 4, width).permute(0, 5, 3, 2, 1, 4)
    return Packed(weight=blocks.flatten(), init=pad(init.flatten(), (0, more)), taps=1, inner=rows)


def depthwise_rows(kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> int:
    """Rows of outputs that the four or eight rows hold which are interleaved for a kernel; 0 for rare sizes."""
    size, step = kernel[0], stride[0]
    if kernel != (size, size) or stride != (step, step) or dilation != (1, 1):
        return 0
    return {(3, 1): 2, (3, 2): 1, (5, 1): 2, (5, 2): 2, (7, 1): 2}.get((size, step), 0)


def _init(by_output: Tensor, zero_point: int) -> Tensor:
    """``[groups, outputs]``: what the zero point of the activation takes away from every sum."""
    return (-zero_point * by_output.sum(2, dtype=torch.int64)).to(torch.int32)


def per_output(values: Tensor, groups: int, to: int = LANES) -> Tensor:
    """Float32 numbers of each output, with as many zeros behind each group as the kernels read."""
    by_group = values.to(torch.float32).reshape(groups, -1)
    filled = pad(by_group, (0, padded(by_group.shape[1], to) - by_group.shape[1])).flatten()
    return pad(filled, (0, STRIP))  # the last strip is read whole
