"""Sums of products are int32's own: thousands of shapes and extremes, on every instruction set of this processor."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowering.native.kernels.op import instruction_sets
from lowering.native.kernels.plan import Arithmetic
from lowering.native.units.arithmetic import arithmetic_of, sums_fit
from quant2e.observers.native.build import compiler
from tests.lowering.native.layers import Layer, found

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there are no kernels")

RANGES = [(0, 255), (0, 127), (1, 254), (64, 191), (0, 63), (128, 255)]
FILLS = ["random", "random", "random", "lowest", "highest", "both ends", "seven bits", "one bit", "zero"]


def filled(how: str, shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    """Integers from ``low`` to ``high``: int64 of ``shape``."""
    g = torch.Generator().manual_seed(seed)
    if how == "both ends":
        return torch.where(torch.rand(shape, generator=g) < 0.5, low, high)
    narrow = {
        "seven bits": (-63, 63),
        "one bit": (-1, 1),
        "zero": (0, 0),
        "lowest": (low, low),
        "highest": (high, high),
    }
    least, most = narrow.get(how, (low, high))
    least, most = max(least, low), min(most, high)
    return torch.randint(least, max(least, most) + 1, shape, generator=g)


def generated(seed: int) -> tuple[Layer, Tensor, int]:
    """A layer, bytes for it, and how many rows of a matrix are read at a time (0 for images)."""
    pick = random.Random(seed)
    kind = pick.choice(["convolution", "convolution", "point", "grouped", "depthwise", "linear"])
    low, high = pick.choice(RANGES)
    zero = pick.choice([low, high, pick.randint(low, high)])
    outputs, inputs, groups, n, rows = pick.randint(1, 130), pick.randint(1, 130), 1, pick.randint(1, 2), 0
    kernel, image = (1, 1), (1, 1)
    stride = dilation = (1, 1)
    padding = (0, 0, 0, 0)
    if kind == "linear":
        n, rows = pick.randint(1, 70), pick.choice([0, 64])
    elif kind != "point":
        kernel = (pick.randint(1, 8 if kind == "depthwise" else 4), pick.randint(1, 5))
        stride, dilation = ((pick.randint(1, 3), pick.randint(1, 3)) for _ in range(2))
        dilation = pick.choice([(1, 1), dilation])
        padding = pick.choice([(0, 0, 0, 0), tuple(pick.randint(0, 3) for _ in range(4))])
    if kind == "grouped":
        groups = pick.randint(2, 5)
        inputs, outputs = pick.randint(1, 20), groups * pick.randint(1, 40)
    if kind == "depthwise":
        groups, inputs = outputs, 1
    if kind != "linear":
        least = [(kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
        image = (least[0] + pick.randint(0, 6), least[1] + pick.randint(0, 20))
    weight = filled(pick.choice(FILLS), (outputs, inputs, *kernel), -128, 127, seed).to(torch.int8)
    layer = Layer(
        weight=weight, image=image, stride=stride, dilation=dilation, padding=padding, groups=groups,
        zero=zero, low=low, high=high,
    )  # fmt: skip
    return layer, filled(pick.choice(FILLS), (n, layer.inputs, *image), low, high, seed + 1), rows


def ways(layer: Layer) -> Iterator[Arithmetic | None]:
    """The way that is chosen for a layer, and those that are right as well, though slower."""
    yield None
    chosen = arithmetic_of(layer.weight, layer.integers)
    slower = {
        Arithmetic.SEVEN: [Arithmetic.BOUNDED, Arithmetic.EXACT],
        Arithmetic.BOUNDED: [Arithmetic.EXACT],
        Arithmetic.SIGNED: [Arithmetic.EXACT],
        Arithmetic.EXACT: [],
    }
    yield from slower[chosen]
    if chosen in (Arithmetic.SEVEN, Arithmetic.BOUNDED) and int(layer.weight.min()) > -128:
        yield Arithmetic.SIGNED


def compare(name: str, seed: int) -> None:
    """Below 2^24 floats are the sums; above, what the sums round to."""
    layer, x, rows = generated(seed)
    exact = layer.sums(x).float()
    for way in ways(layer):
        got = found(name, layer, x, rows=rows, arithmetic=way)
        assert torch.equal(got, exact), f"{name}, seed {seed}, {way or 'as chosen'}: {(got - exact).abs().max()} off"


@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_sums_are_exact(name: str, seed: int) -> None:
    compare(name, seed)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", instruction_sets())
def test_sums_of_thousands_of_layers_are_exact(name: str, part: int) -> None:
    for seed in range(500 * part, 500 * (part + 1)):
        compare(name, seed)


def row_kernel(seed: int) -> tuple[Layer, Tensor]:
    """A depthwise layer whose kernel is one row, of any width and dilation, and bytes for it."""
    pick = random.Random(seed)
    low, high = pick.choice(RANGES)
    channels, kernel = pick.choice([2, 15, 16, 17, 32, 33, 64, 65, 130]), (1, pick.choice([2, 3, 4, 5, 8, 31, 33, 40]))
    stride = (pick.randint(1, 2), pick.randint(1, 3))
    dilation = (1, pick.choice([1, 1, 2, 3, 40]))
    left, right = (pick.randint(0, (kernel[1] - 1) * dilation[1]) for _ in range(2))
    padding = (0, 0, left, right)
    least = max(1, (kernel[1] - 1) * dilation[1] + 1 - left - right)
    image = (pick.choice([1, 1, 3]), least + pick.randint(0, 150))
    weight = filled(pick.choice(FILLS), (channels, 1, *kernel), -128, 127, seed).to(torch.int8)
    layer = Layer(
        weight=weight, image=image, stride=stride, dilation=dilation, padding=padding, groups=channels,
        zero=pick.choice([low, high, pick.randint(low, high)]), low=low, high=high,
    )  # fmt: skip
    return layer, filled(pick.choice(FILLS), (1, channels, *image), low, high, seed + 1)


@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30))
def test_sums_of_depthwise_kernels_of_one_row_are_exact(name: str, seed: int) -> None:
    layer, x = row_kernel(seed)
    assert torch.equal(found(name, layer, x), layer.sums(x).float()), f"{name}, seed {seed}, {layer}"


WORST = [
    # weights, activations: what overflows 16 bits first
    (127, 255),
    (-128, 255),
    (-128, 0),
    (-127, 0),
    (127, 0),
]


@needs_compiler
@pytest.mark.parametrize(("weight", "byte"), WORST)
@pytest.mark.parametrize("zero", [0, 128, 255])
@pytest.mark.parametrize("name", instruction_sets())
def test_the_worst_operands_do_not_saturate(name: str, weight: int, byte: int, zero: int) -> None:
    for shape, image, groups in [((70, 37, 1, 1), (1, 1), 1), ((17, 8, 3, 3), (5, 9), 1), ((70, 1, 5, 3), (9, 9), 70)]:
        layer = Layer(weight=torch.full(shape, weight, dtype=torch.int8), image=image, groups=groups, zero=zero)
        x = torch.full((1, layer.inputs, *image), byte)
        assert torch.equal(found(name, layer, x), layer.sums(x).float())


@needs_compiler
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 63, 64, 65, 70])
def test_every_number_of_rows(name: str, rows: int) -> None:
    for outputs in (1, 16, 17, 33, 64, 65, 130):
        layer = Layer(
            weight=filled("random", (outputs, 29, 1, 1), -128, 127, rows).to(torch.int8), image=(1, 1), zero=3
        )
        x = filled("random", (rows, 29, 1, 1), 0, 255, outputs)
        assert torch.equal(found(name, layer, x, rows=64), layer.sums(x).float())


CHOICES = [
    # largest byte, rows of weights, the way
    (255, [[32, 32, 32, 32, -32]], Arithmetic.SEVEN),
    (255, [[33, 32, 32, 32, -32]], Arithmetic.BOUNDED),
    (255, [[-33, -32, -32, -32]], Arithmetic.BOUNDED),
    (255, [[64, 64, 64, 64]], Arithmetic.BOUNDED),
    (255, [[65, 64, 0, 0]], Arithmetic.SIGNED),
    (255, [[0, 0, 0, 0], [-65, 0, -64, 0]], Arithmetic.SIGNED),
    (255, [[127, 1, 1, -127]], Arithmetic.BOUNDED),
    (255, [[-128, 0, 0, -128]], Arithmetic.EXACT),
    (255, [[-128]], Arithmetic.SEVEN),
    (127, [[64, 64, 64, 64, 64]], Arithmetic.SEVEN),
    (127, [[127, 127, 127, 127]], Arithmetic.BOUNDED),
    (127, [[-128, -128, -128]], Arithmetic.BOUNDED),
    (128, [[-128, -128, -128]], Arithmetic.BOUNDED),
    (129, [[-128, -128, -128]], Arithmetic.EXACT),
    (255, [[0, 0, 0]], Arithmetic.SEVEN),
]


@pytest.mark.parametrize(("high", "rows", "way"), CHOICES)
def test_the_way_is_chosen_by_proof(high: int, rows: list[list[int]], way: Arithmetic) -> None:
    weight = torch.tensor(rows, dtype=torch.int8)
    integers = Layer(weight=weight, image=(1, 1), high=high).integers
    assert arithmetic_of(weight, integers) is way


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**30), high=st.sampled_from([63, 127, 200, 255]))
def test_no_lane_overflows_by_the_way_that_is_chosen(seed: int, high: int) -> None:
    pick = random.Random(seed)
    bound = pick.choice([16, 32, 64, 65, 127, 128])
    weight = filled(pick.choice(FILLS), (3, 12), -bound, min(bound, 127), seed).to(torch.int8)
    way = arithmetic_of(weight, Layer(weight=weight, image=(1, 1), high=high).integers)
    x = filled(pick.choice(["both ends", "highest", "random"]), (50, 1, 12), 0, high, seed)
    if way is Arithmetic.SIGNED:
        x = x - 128
    if way is Arithmetic.EXACT:
        return
    at_once = 4 if way is Arithmetic.SEVEN else 2
    lanes = (x * weight.long()).unflatten(2, (-1, at_once)).sum(3)
    assert int(lanes.min()) >= -(2**15)
    assert int(lanes.max()) < 2**15


FITTING = [
    # inputs, largest byte, zero point, every weight
    (66_311, 255, 0, 127, True),
    (66_312, 255, 0, 127, False),
    (66_312, 255, 128, 127, True),
    (66_312, 255, 255, -127, False),
    (132_104, 127, 0, -128, True),
    (132_105, 127, 0, -128, False),
]


@pytest.mark.parametrize(("inputs", "high", "zero", "weight", "fits"), FITTING)
def test_sums_that_may_leave_32_bits_are_known(inputs: int, high: int, zero: int, weight: int, fits: bool) -> None:
    layer = Layer(weight=torch.full((1, inputs, 1, 1), weight, dtype=torch.int8), image=(1, 1), high=high, zero=zero)
    assert sums_fit(layer.weight, layer.integers) is fits
