"""Transposed convolutions as parts that plain ones write: exact sums, on every instruction set of this processor."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowering.native.kernels.op import instruction_sets, load_region_op
from lowering.native.kernels.plan import RegionConstants, RegionStep, RegionTensor, StepKind, region_plan
from lowering.native.units.packed import add_numbers, border_of, packed_steps
from lowering.native.units.values import Integers
from lowering.native.units.windows import transposed_parts
from quant2e.observers.native.build import compiler
from tests.lowering.native.test_sums import FILLS, RANGES, filled

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there are no kernels")

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turned:
    """``weight``: int8 ``[inputs, outputs of a group, height, width]``, as torch has it."""

    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    more: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    zero: int = 0
    low: int = 0
    high: int = 255

    def sums(self, x: Tensor) -> Tensor:
        """Exact sums for bytes ``x``: int64."""
        moved = x.double() - self.zero
        sizes = (self.stride, self.padding, self.more, self.groups, self.dilation)
        return F.conv_transpose2d(moved, self.weight.double(), None, *sizes).to(torch.int64)

    def plain(self) -> Tensor:
        """The weight with its outputs first."""
        return self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


def found(name: str, layer: Turned, x: Tensor, bias: Tensor) -> Tensor:
    """Sums and bias by the kernels of an instruction set: float32."""
    op = load_region_op(name)
    assert op is not None, "a test that needs a compiler says so"
    n, inputs, h, w = x.shape
    _, outputs, height, width = layer.sums(x).shape
    kernel = (layer.weight.shape[2], layer.weight.shape[3])
    parts = transposed_parts(kernel, layer.stride, layer.padding, layer.dilation, (h, w), (height, width))
    constants, integers = RegionConstants(), Integers(scale=1.0, zero=layer.zero, low=layer.low, high=layer.high)
    packed = packed_steps(constants, layer.plain(), integers, parts, layer.groups)
    add_numbers(constants, packed, torch.ones(outputs), bias)
    values = [
        RegionTensor(floats=True, h=h, w=w, c=inputs, argument=0),
        RegionTensor(floats=False, h=h, w=w, c=inputs, pad=border_of(packed), zero=layer.zero),
        RegionTensor(floats=True, h=height, w=width, c=outputs, argument=1),
    ]
    steps = [RegionStep(kind=StepKind.QUANTIZE, x=0, y=1, inverse=1.0, zero=layer.zero, low=layer.low, high=layer.high)]
    for one in packed:
        one.step.x, one.step.z = 1, 2
        steps.append(one.step)
    plan = region_plan(values, steps, constants, 1, [(outputs, height, width)], 0)
    (made,) = op([x.float() - layer.zero], plan.numbers, plan.constants, plan.outputs)
    assert made.shape[0] == n
    return made


def generated(seed: int) -> tuple[Turned, Tensor]:
    """A layer and bytes for it."""
    pick = random.Random(seed)

    def two(low: int, high: int) -> Pair:
        return pick.randint(low, high), pick.randint(low, high)

    low, high = pick.choice(RANGES)
    kind = pick.choice(["one group", "one group", "grouped", "depthwise"])
    inputs, outputs, groups = pick.randint(1, 70), pick.randint(1, 90), 1
    if kind == "grouped":
        groups = pick.randint(2, 4)
        inputs, outputs = groups * pick.randint(1, 9), pick.randint(1, 20)
    if kind == "depthwise":
        groups, outputs = inputs, 1
    stride, dilation, kernel = two(1, 4), pick.choice([(1, 1), two(1, 4)]), two(1, 6)
    more = tuple(pick.randint(0, max(stride[i], dilation[i]) - 1) for i in (0, 1))
    image = two(1, 7)
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    most = [((image[i] - 1) * stride[i] + reach[i] + more[i] - 1) // 2 for i in (0, 1)]
    padding = tuple(pick.randint(0, min(6, most[i])) for i in (0, 1))
    weight = filled(pick.choice(FILLS), (inputs, outputs, *kernel), -128, 127, seed).to(torch.int8)
    layer = Turned(
        weight=weight, stride=stride, padding=(padding[0], padding[1]), more=(more[0], more[1]), dilation=dilation,
        groups=groups, zero=pick.choice([low, high, pick.randint(low, high)]), low=low, high=high,
    )  # fmt: skip
    return layer, filled(pick.choice(FILLS), (pick.randint(1, 2), inputs, *image), low, high, seed + 1)


def compare(name: str, seed: int) -> None:
    layer, x = generated(seed)
    exact = layer.sums(x)
    bias = torch.arange(exact.shape[1], dtype=torch.float32)
    wanted = exact + bias.long()[:, None, None]
    got = found(name, layer, x, bias)
    assert torch.equal(got, wanted.float()), f"{name}, seed {seed}, {layer.weight.shape} {layer}"


@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_sums_are_exact(name: str, seed: int) -> None:
    compare(name, seed)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", instruction_sets())
def test_sums_of_a_thousand_layers_are_exact(name: str) -> None:
    for seed in range(1000):
        compare(name, seed)


@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
def test_where_the_kernel_does_not_reach_there_is_the_bias(name: str) -> None:
    layer = Turned(weight=torch.ones(3, 5, 2, 1, dtype=torch.int8), stride=(3, 4), more=(2, 1), zero=9)
    x, bias = torch.full((1, 3, 2, 2), 10), torch.arange(5.0)
    got = found(name, layer, x, bias)
    assert torch.equal(got, layer.sums(x) + bias[:, None, None])
    assert torch.equal(got[0, :, 2], bias[:, None].expand(5, got.shape[3]))


PARTS = [
    # kernel, stride, padding, dilation, image, result, for each part: places of the kernel, before, dilation, after
    ("2 by 2", 2, 2, 0, 1, 5, 10, [((0,), 0, 1, 0), ((1,), 0, 1, 0)]),
    ("overlapping", 4, 2, 1, 1, 5, 10, [((3, 1), 1, 1, 0), ((2, 0), 0, 1, 1)]),
    ("uneven, with a row more", 3, 2, 1, 1, 5, 10, [((1,), 0, 1, 0), ((2, 0), 0, 1, 1)]),
    ("a stride wider than the kernel", 2, 3, 0, 1, 4, 11, [((0,), 0, 1, 0), ((1,), 0, 1, 0), ((), 0, 1, 0)]),
    ("cut on both sides", 3, 1, 2, 1, 6, 4, [((2, 1, 0), 0, 1, 0)]),
    ("what is cut is not read", 2, 1, 3, 1, 9, 4, [((1, 0), -2, 1, -2)]),
    ("dilated, with a stride that meets every place", 3, 2, 0, 3, 4, 13, [((2, 0), 3, 3, 3), ((1,), 1, 1, 1)]),
    ("dilated by the stride", 2, 2, 0, 2, 4, 9, [((1, 0), 1, 1, 1), ((), 0, 1, 0)]),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "x", "y", "wanted"),
                         [row[1:] for row in PARTS], ids=[row[0] for row in PARTS])  # fmt: skip
def test_parts_spelled_out(kernel, stride, padding, dilation, x, y, wanted):
    """Of columns; rows are a kernel of one."""
    parts = transposed_parts((1, kernel), (1, stride), (0, padding), (1, dilation), (1, x), (1, y))
    got = [
        (part.columns, part.window.before[1], part.window.dilation[1], part.window.after[1])
        if part.window is not None
        else ((), 0, 1, 0)
        for part in parts
    ]
    assert got == wanted
    assert [part.first for part in parts] == [(0, i) for i in range(len(wanted))]
    assert {part.every for part in parts} == {(1, stride)}
