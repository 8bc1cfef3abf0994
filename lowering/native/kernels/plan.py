"""Plan of a region: tensors, steps and constants, as the numbers that ``kernels/region.h`` reads.

A plan is an int64 tensor: a header, nine numbers for each `RegionTensor` and as many for each `RegionStep` as it has
fields, in the order of the C++ structs. Floats stand in it as the bits of doubles. Constants are one uint8 tensor.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

VERSION = 3
"""Of the layout of plans, as in ``region.h``."""

ALIGNMENT = 64
"""Bytes: of what lies in the arena and in the constants."""

SLACK = 64
"""Bytes behind a tensor that a kernel may read and not use: groups of four bytes end there."""

NOTHING = -1


class StepKind(IntEnum):
    """What a step computes."""

    QUANTIZE = 0
    DEQUANTIZE = 1
    CONVOLUTION = 2
    DEPTHWISE = 3
    BINARY = 4
    UNARY = 5
    POOL = 6
    CONCAT = 7
    LAYER_NORM = 8
    ATTENTION = 9
    SOFTMAX = 10


class Activation(IntEnum):
    """What is applied to a result, before it is rounded."""

    NONE = 0
    RELU = 1
    CLAMP = 2
    HARDSWISH = 3
    HARDSIGMOID = 4
    GELU = 5
    GELU_TANH = 6
    SILU = 7
    SIGMOID = 8
    TANH = 9
    LEAKY_RELU = 10


class Arithmetic(IntEnum):
    """How sums of products are exact: see `lowering.native.units.arithmetic`."""

    EXACT = 0
    BOUNDED = 1
    SEVEN = 2
    SIGNED = 3


@dataclass(slots=True, kw_only=True)
class RegionTensor:
    """A tensor of a region, for one image: ``h`` rows of ``w`` pixels of ``c`` values, channels last.

    ``floats``: float32 instead of uint8. ``pad``: rows above and below it, and pixels left and right, that hold
    ``zero``. ``w`` of 0: as many as there are rows. ``argument``: of the op, counted over its inputs and outputs; None
    for what lies in the arena, at ``place``. ``shared``: an argument that is the same for every image.
    """

    floats: bool
    h: int
    w: int
    c: int
    pad: tuple[int, int] = (0, 0)
    zero: int = 0
    argument: int | None = None
    shared: bool = False
    place: int = 0

    def bytes(self, rows: int) -> int:
        """What it takes in the arena, where ``rows`` rows are computed at a time."""
        pixels = (self.h + 2 * self.pad[0]) * ((self.w or rows) + 2 * self.pad[1])
        return to_alignment(pixels * self.c * (4 if self.floats else 1) + SLACK)

    def numbers(self) -> tuple[int, ...]:
        """The fields of C++'s ``Tensor``."""
        place = self.place if self.argument is None else -1 - self.argument
        return (place, int(self.floats), self.h, self.w, self.c, *self.pad, self.zero, int(self.shared))


@dataclass(slots=True, kw_only=True)
class RegionStep:
    """One op of a region; the fields of C++'s ``Step``, in its order. Tensors and constants that are not there are -1.

    ``x`` … ``fourth``: values that are read, ``y``: written as integers, ``z``: as floats. ``weight`` … ``init``: bytes
    into the constants. ``inverse``, ``zero``, ``low``, ``high``: of ``y``, with ``inverse`` one divided by its scale.
    ``every_h`` … ``from_w``: rows and columns that a convolution writes; others are written by other steps. ``strip``:
    outputs whose weights are packed together, 64 (and fewer at the end) or 16.
    """

    kind: StepKind
    x: int = NOTHING
    other: int = NOTHING
    third: int = NOTHING
    fourth: int = NOTHING
    y: int = NOTHING
    z: int = NOTHING
    weight: int = NOTHING
    scale: int = NOTHING
    bias: int = NOTHING
    init: int = NOTHING
    arithmetic: Arithmetic = Arithmetic.EXACT
    fast: int = 0
    activation: Activation = Activation.NONE
    a: float = 0.0
    b: float = 0.0
    inverse: float = 0.0
    zero: int = 0
    low: int = 0
    high: int = 255
    x_scale: float = 0.0
    x_zero: int = 0
    other_scale: float = 0.0
    other_zero: int = 0
    kernel_h: int = 1
    kernel_w: int = 1
    stride_h: int = 1
    stride_w: int = 1
    top: int = 0
    left: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1
    inputs: int = 0
    outputs: int = 0
    taps: int = 1
    inner: int = 0
    mode: int = 0
    extra: int = 0
    extra_number: float = 0.0
    every_h: int = 1
    every_w: int = 1
    from_h: int = 0
    from_w: int = 0
    third_scale: float = 0.0
    third_zero: int = 0
    x_first: int = 0
    other_first: int = 0
    third_first: int = 0
    softmax_scale: float = 0.0
    softmax_zero: int = 0
    softmax_low: int = 0
    softmax_high: int = 255
    strip: int = 64

    def numbers(self) -> tuple[int, ...]:
        """The fields of C++'s ``RegionStep``."""
        return tuple(_number(getattr(self, field.name)) for field in fields(self))

    def reads(self) -> tuple[int, ...]:
        """Values that it reads."""
        return tuple(value for value in (self.x, self.other, self.third, self.fourth) if value != NOTHING)

    def writes(self) -> tuple[int, ...]:
        """Values that it writes."""
        return tuple(value for value in (self.y, self.z) if value != NOTHING)


def to_alignment(size: int) -> int:
    """``size``, or the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _number(value: Any) -> int:
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return int(value)


class RegionConstants:
    """Tensors one behind the other, each where `ALIGNMENT` says. Equal tensors given twice are stored once."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._size = 0

    def add(self, value: Tensor) -> int:
        """Store the bytes of ``value``, contiguous; returns where they begin."""
        place = self._size
        raw = value.contiguous().flatten().view(torch.uint8)
        self._parts.append(torch.nn.functional.pad(raw, (0, to_alignment(raw.numel()) - raw.numel())))
        self._size += to_alignment(raw.numel())
        return place

    def tensor(self) -> Tensor:
        """All of them: uint8, with `SLACK` behind the last."""
        return torch.cat([*self._parts, torch.zeros(SLACK, dtype=torch.uint8)])


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionPlan:
    """What the op of a region is called with, besides its inputs. ``outputs``: of each the number of dimensions, its
    type as in ``region.h`` in the place of the first size, which is that of the inputs, and the other sizes.
    ``arena``: bytes that one image takes.
    """

    numbers: Tensor
    constants: Tensor
    outputs: tuple[int, ...]
    arena: int


def region_plan(
    values: list[RegionTensor],
    steps: list[RegionStep],
    constants: RegionConstants,
    inputs: int,
    outputs: list[tuple[int, ...]],
    rows: int,
) -> RegionPlan:
    """Place what lies in the arena, and write everything down.

    ``values`` begin with the inputs. ``outputs``: sizes of each, without the first. ``rows``: at a time, 0 for images.
    """
    arena = _place(values, steps, rows)
    kinds = {value.argument: int(value.floats) for value in values}
    header = (VERSION, len(values), len(steps), arena, inputs, len(outputs), rows, 0)
    numbers = [
        *header,
        *(n for value in values for n in value.numbers()),
        *(n for step in steps for n in step.numbers()),
    ]
    sizes = tuple(n for place, shape in enumerate(outputs) for n in (len(shape) + 1, kinds[inputs + place], *shape))
    return RegionPlan(
        numbers=torch.tensor(numbers, dtype=torch.int64), constants=constants.tensor(), outputs=sizes, arena=arena
    )


def _place(values: list[RegionTensor], steps: list[RegionStep], rows: int) -> int:
    """Give each value of the arena a place that no other has while both are needed; returns the size of the arena."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, step in enumerate(steps):
        for value in (*step.reads(), *step.writes()):
            first.setdefault(value, at)
            last[value] = at
    placed: list[int] = []
    size = 0
    for value in sorted((v for v in first if values[v].argument is None), key=lambda v: -values[v].bytes(rows)):
        alive = [v for v in placed if first[v] <= last[value] and first[value] <= last[v]]
        place = 0
        for other in sorted(alive, key=lambda v: values[v].place):
            if place + values[value].bytes(rows) <= values[other].place:
                break
            place = max(place, values[other].place + values[other].bytes(rows))
        values[value].place = place
        placed.append(value)
        size = max(size, place + values[value].bytes(rows))
    return size
