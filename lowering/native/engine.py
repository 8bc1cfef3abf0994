"""The native kernels as an engine: what a product takes by itself, measured beside the other engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowering.inductor.kernels.engines import Product, Run
from lowering.native.kernels.op import instruction_set, load_region_op
from lowering.native.kernels.plan import (
    SLACK,
    Arithmetic,
    RegionConstants,
    RegionStep,
    RegionTensor,
    StepKind,
    region_plan,
)
from lowering.native.units.arithmetic import arithmetic_of
from lowering.native.units.packed import add_numbers, border_of, packed_steps
from lowering.native.units.values import Integers
from lowering.native.units.windows import POINT, Pair, ResultPart, plain_window, transposed_parts

NATIVE = "native"

_RANGES = {4: (127, 64), 2: (255, 64), 1: (255, 127)}
"""Products that fit together into 16 bits → the largest activation and the largest weight of a measurement."""

_TOGETHER = {Arithmetic.SEVEN: 4, Arithmetic.BOUNDED: 2}


def products_together(weight: Tensor, x: Integers) -> int:
    """`Product.together` of an int8 weight, output channels first; 4 where the instruction set makes no difference."""
    return 4 if instruction_set() != "avx2" else _TOGETHER.get(arithmetic_of(weight, x), 1)


@dataclass(frozen=True, slots=True)
class Native:
    """Our own int8 kernels, as a region calls them."""

    name: str = NATIVE

    def computes(self, product: Product) -> bool:
        """Whether both operands are integers, in at most two dimensions of space, and there is a C++ compiler."""
        return not product.float_rows and len(product.weight) in (2, 4) and load_region_op() is not None

    def prepare(self, product: Product) -> Run | None:
        """A call of a region that computes the product of each image. It reads the same one each time, which is in the
        cache as the result of a step before is, and copies it only where a step wants zeros around it.
        """
        op = load_region_op()
        if op is None or not self.computes(product):
            return None
        constants, parts = RegionConstants(), _parts(product)
        outputs = _outputs(product)
        inputs = product.x[1] // product.groups
        sizes = (outputs, inputs, *product.weight[2:])
        high, most = _RANGES[product.together]
        x = Integers(scale=0.02, zero=3, low=0, high=high)
        weight = torch.randint(-most, most + 1, sizes, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        packed = packed_steps(constants, weight, x, parts, product.groups)
        numbers = torch.full((outputs,), 1e-3)
        add_numbers(constants, packed, numbers, numbers)
        steps = [one.step for one in packed]
        border = border_of(packed)
        copied = border != (0, 0)
        for step in steps:
            step.inverse, step.fast, step.x = 1.0, int(product.integers), int(copied)
            if product.integers:
                step.y = 2
            else:
                step.z = 2
        n, (h, w), (height, width) = 1 if product.is_linear else product.x[0], _image(product), _result(product)
        values = [
            RegionTensor(floats=False, h=h, w=w, c=product.x[1], argument=0),
            RegionTensor(floats=False, h=h, w=w, c=product.x[1], pad=border, zero=x.zero),
            RegionTensor(floats=not product.integers, h=height, w=width, c=outputs),
        ]
        copy = [RegionStep(kind=StepKind.CONCAT, x=0, y=1)] if copied else []
        plan = region_plan(values, [*copy, *steps], constants, 1, [], 0)
        bytes_read = torch.zeros(h * w * product.x[1] + SLACK, dtype=torch.uint8)  # as in the arena: a little further
        images = bytes_read.as_strided((n, h, w, product.x[1]), (0, w * product.x[1], product.x[1], 1))
        return lambda: op([images], plan.numbers, plan.constants, plan.outputs)


def _parts(product: Product) -> tuple[ResultPart, ...]:
    if product.is_linear:
        return (ResultPart(window=POINT),)
    kernel = (product.weight[2], product.weight[3])
    stride, padding, dilation = (_both(sizes) for sizes in (product.stride, product.padding, product.dilation))
    sizes = (kernel, stride, padding, dilation, _image(product), _result(product))
    return (ResultPart(window=plain_window(*sizes)),) if product.output_padding is None else transposed_parts(*sizes)


def _outputs(product: Product) -> int:
    return product.weight[0] if product.output_padding is None else product.weight[1] * product.groups


def _image(product: Product) -> Pair:
    """Height and width of what goes in."""
    return (1, product.x[0]) if product.is_linear else (product.x[2], product.x[3])


def _result(product: Product) -> Pair:
    """Height and width of what comes out."""
    if product.is_linear:
        return _image(product)
    more, made = product.output_padding, []
    for i, x in enumerate(_image(product)):
        stride, padding, dilation = (_both(n)[i] for n in (product.stride, product.padding, product.dilation))
        reach = dilation * (product.weight[2 + i] - 1)
        if more is None:
            made.append((x + 2 * padding - reach - 1) // stride + 1)
        else:
            made.append((x - 1) * stride - 2 * padding + reach + _both(more)[i] + 1)
    return made[0], made[1]


def _both(sizes: tuple[int, ...]) -> Pair:
    return sizes[0], sizes[-1]
