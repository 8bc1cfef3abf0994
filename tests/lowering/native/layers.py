"""Single convolutions and linear layers as regions: bytes in, sums out, beside what int64 says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from lowering.native.kernels.op import load_region_op
from lowering.native.kernels.pack import LANES, STRIP, pack_convolution
from lowering.native.kernels.plan import (
    Arithmetic,
    RegionConstants,
    RegionPlan,
    RegionStep,
    RegionTensor,
    StepKind,
    region_plan,
)
from lowering.native.units.packed import add_numbers, packed_step
from lowering.native.units.values import Integers
from lowering.native.units.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """``weight``: int8 ``[outputs, inputs of a group, height, width]``. ``image``: height and width of an input.

    ``padding``: pixels above, below, left and right. ``zero``, ``low``, ``high``: of the activation's bytes.
    """

    weight: Tensor
    image: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    zero: int = 0
    low: int = 0
    high: int = 255

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def integers(self) -> Integers:
        return Integers(scale=1.0, zero=self.zero, low=self.low, high=self.high)

    @property
    def kernel(self) -> tuple[int, int]:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def sizes(self) -> tuple[int, int]:
        """Height and width of the result."""
        edges = (self.padding[0] + self.padding[1], self.padding[2] + self.padding[3])
        h, w = (
            (self.image[i] + edges[i] - (self.kernel[i] - 1) * self.dilation[i] - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return h, w

    def sums(self, x: Tensor) -> Tensor:
        """The exact sums for bytes ``x``: int64 ``[n, outputs, height, width]``."""
        top, bottom, left, right = self.padding
        moved = pad(x.double() - self.zero, (left, right, top, bottom))
        exact = conv2d(moved, self.weight.double(), None, self.stride, 0, self.dilation, self.groups)
        return exact.to(torch.int64)

    def window(self) -> Window:
        after = tuple(
            (self.sizes[i] - 1) * self.stride[i] + (self.kernel[i] - 1) * self.dilation[i] - self.padding[2 * i]
            - (self.image[i] - 1)
            for i in (0, 1)
        )  # fmt: skip
        before = (self.padding[0], self.padding[2])
        return Window(
            kernel=self.kernel, stride=self.stride, before=before, dilation=self.dilation, after=(after[0], after[1])
        )


def planned(
    layer: Layer, *, scale: float = 1.0, rows: int = 0, arithmetic: Arithmetic | None = None
) -> tuple[RegionPlan, RegionStep]:
    """The plan that makes bytes of floats, and floats of the sums, ``scale`` times as large; and the product's step.

    ``rows``: of a matrix, at a time. ``arithmetic``: instead of the one that is chosen; weights are then packed as
    other instruction sets want them, which every one reads.
    """
    (h, w), (height, width), inputs, constants = layer.image, layer.sizes, layer.inputs, RegionConstants()
    ready = packed_step(constants, layer.weight, layer.integers, layer.window(), layer.groups)
    step, outputs = ready.step, layer.weight.shape[0]
    values = [
        RegionTensor(floats=True, h=h, w=0 if rows else w, c=inputs, argument=0),
        RegionTensor(floats=False, h=h, w=0 if rows else w, c=inputs, pad=ready.border, zero=layer.zero),
        RegionTensor(floats=True, h=height, w=0 if rows else width, c=layer.weight.shape[0], argument=1),
    ]
    if arithmetic is not None and step.kind is StepKind.CONVOLUTION:
        by_rows = layer.groups == 1 and layer.dilation[1] == 1
        step.strip = LANES if step.strip == STRIP else STRIP
        packed = pack_convolution(
            layer.weight, layer.zero, layer.groups, rows=by_rows, arithmetic=arithmetic, strip=step.strip
        )
        step.arithmetic, step.weight, step.init = arithmetic, constants.add(packed.weight), constants.add(packed.init)
    step.x, step.z = 1, 2
    add_numbers(constants, [ready], torch.full((outputs,), scale), torch.zeros(outputs))
    quantize = RegionStep(
        kind=StepKind.QUANTIZE, x=0, y=1, inverse=1.0, zero=layer.zero, low=layer.low, high=layer.high
    )
    shape = (layer.weight.shape[0],) if rows else (layer.weight.shape[0], height, width)
    return region_plan(values, [quantize, step], constants, 1, [shape], rows), step


Op = Callable[[Sequence[Tensor], Tensor, Tensor, Sequence[int]], list[Tensor]]


def found(name: str, layer: Layer, x: Tensor, *, rows: int = 0, arithmetic: Arithmetic | None = None) -> Tensor:
    """The sums that kernels for instruction set ``name`` make of bytes ``x``: float32, as `Layer.sums`."""
    op = load_region_op(name)
    assert op is not None, "a test that needs a compiler says so"
    plan, _ = planned(layer, rows=rows, arithmetic=arithmetic)
    floats = x.float() - layer.zero
    (made,) = op([floats[:, :, 0, 0] if rows else floats], plan.numbers, plan.constants, plan.outputs)
    return made[:, :, None, None] if rows else made
