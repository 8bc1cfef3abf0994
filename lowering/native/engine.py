"""The native kernels as an engine: what a product takes by itself, measured beside the other engines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowering.inductor.kernels.engines import Product, Run
from lowering.native.kernels.op import load_op
from lowering.native.kernels.pack import per_output
from lowering.native.kernels.plan import Constants, Kind, Step, Value, plan_of
from lowering.native.units.products import POINT, Window, packed_step
from lowering.native.units.values import Integers

NATIVE = "native"

_X = Integers(scale=0.02, zero=3, low=0, high=255)


@dataclass(frozen=True, slots=True)
class Native:
    """Our own int8 kernels, as a region calls them."""

    name: str = NATIVE

    def computes(self, product: Product) -> bool:
        """Whether both operands are integers, in at most two dimensions of space, and there is a C++ compiler."""
        plain = not product.float_rows and product.output_padding is None and len(product.weight) in (2, 4)
        return plain and load_op() is not None

    def prepare(self, product: Product) -> Run | None:
        """A call of a region that copies its input to where a step reads it, and computes the product."""
        op = load_op()
        if op is None or not self.computes(product):
            return None
        constants = Constants()
        window = POINT if product.is_linear else _window(product)
        weight = torch.randint(-127, 128, product.weight, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        step, to = packed_step(constants, weight, _X, window, product.groups)
        groups = 1 if step.kind is Kind.DEPTHWISE else product.groups
        numbers = constants.add(per_output(torch.full((product.weight[0],), 1e-3), groups, to))
        step.scale, step.bias, step.inverse, step.fast = numbers, numbers, 1.0, int(product.integers)
        x, y = _images(product, window)
        step.x = 1
        if product.integers:
            step.y = 2
        else:
            step.z = 2
        n, (h, w, c) = (1, x) if product.is_linear else (product.x[0], x)
        values = [
            Value(floats=False, h=h, w=w, c=c, argument=0),
            Value(floats=False, h=h, w=w, c=c, pad=window.border, zero=_X.zero),
            Value(floats=not product.integers, h=y[0], w=y[1], c=product.weight[0]),
        ]
        plan = plan_of(values, [Step(kind=Kind.CONCAT, x=0, y=1), step], constants, 1, [], 0)
        given = [torch.zeros(n, h, w, c, dtype=torch.uint8)]
        return lambda: op(given, plan.numbers, plan.constants, plan.outputs)


def _window(product: Product) -> Window:
    before = (product.padding[0], product.padding[-1])
    return Window(
        kernel=(product.weight[2], product.weight[3]),
        stride=(product.stride[0], product.stride[-1]),
        before=before,
        dilation=(product.dilation[0], product.dilation[-1]),
        after=before,
    )


def _images(product: Product, window: Window) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Height, width and channels of what goes in, and height and width of what comes out."""
    if product.is_linear:
        return (1, product.x[0], product.x[1]), (1, product.x[0])
    x = (product.x[2], product.x[3], product.x[1])
    sizes = [
        (x[i] + 2 * window.before[i] - window.dilation[i] * (window.kernel[i] - 1) - 1) // window.stride[i] + 1
        for i in range(2)
    ]
    return x, (sizes[0], sizes[1])
