"""The kernels of norms and softmax, called by plans of their own, on every instruction set: beside float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lowering.native.kernels.op import instruction_sets, load_region_op
from lowering.native.kernels.plan import NOTHING, RegionConstants, RegionStep, RegionTensor, StepKind, region_plan

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler")
everywhere = pytest.mark.parametrize("name", instruction_sets())

SCALE, ZERO = 0.03, 100
WIDTHS = (1, 2, 15, 16, 37, 64, 100, 384, 768)


def call(name: str, step: RegionStep, x: torch.Tensor, constants: RegionConstants, *, of_bytes: bool) -> torch.Tensor:
    """The step's floats on instruction set ``name``; ``of_bytes``: `x` is rounded to bytes first."""
    _, rows, width = x.shape
    values = [RegionTensor(floats=True, h=1, w=rows, c=width, argument=place) for place in (0, 1)]
    steps = [step]
    step.x, step.z = 0, 1
    if of_bytes:
        values.append(RegionTensor(floats=False, h=1, w=rows, c=width, zero=ZERO))
        steps.insert(0, RegionStep(kind=StepKind.QUANTIZE, x=0, y=2, inverse=1 / SCALE, zero=ZERO))
        step.x, step.x_scale, step.x_zero = 2, SCALE, ZERO
    plan = region_plan(values, steps, constants, 1, [(rows, width)], 0)
    op = load_region_op(name)
    assert op is not None
    return op([x], plan.numbers, plan.constants, list(plan.outputs))[0]


def on_grid(x: torch.Tensor) -> torch.Tensor:
    return (x / SCALE).round().clamp(-ZERO, 255 - ZERO) * SCALE


@everywhere
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width, of_bytes, threads, name, torch_threads):
    torch_threads(threads)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 13, width) * 2 + 1, torch.rand(width) + 0.5, torch.randn(width)
    given = on_grid(x) if of_bytes else x
    for scales, moves in ((True, True), (True, False), (False, False)):
        constants = RegionConstants()
        step = RegionStep(kind=StepKind.LAYER_NORM, extra_number=1e-5)
        step.scale = constants.add(weight) if scales else NOTHING
        step.bias = constants.add(bias) if moves else NOTHING
        y = call(name, step, x, constants, of_bytes=of_bytes)
        used = [tensor.double() if there else None for tensor, there in ((weight, scales), (bias, moves))]
        assert (y - F.layer_norm(given.double(), [width], *used, 1e-5)).abs().max() < 4e-6


@everywhere
@pytest.mark.parametrize("width", WIDTHS)
def test_root_mean_square_norm(width, name):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 13, width) * 2 + 1, torch.rand(width) + 0.5
    constants = RegionConstants()
    step = RegionStep(kind=StepKind.LAYER_NORM, mode=1, extra_number=1e-6, scale=constants.add(weight))
    y = call(name, step, x, constants, of_bytes=False)
    assert (y - F.rms_norm(x.double(), [width], weight.double(), 1e-6)).abs().max() < 4e-6


@everywhere
def test_a_mean_far_from_zero_costs_a_layer_norm_no_more_than_torch(name):
    torch.manual_seed(0)
    x = torch.randn(1, 50, 768) + 1000
    exact = F.layer_norm(x.double(), [768], eps=1e-5)
    ours = call(name, RegionStep(kind=StepKind.LAYER_NORM, extra_number=1e-5), x, RegionConstants(), of_bytes=False)
    assert (ours - exact).abs().max() <= 2 * (F.layer_norm(x, [768], eps=1e-5) - exact).abs().max()


@everywhere
@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_softmax(width, of_bytes, name):
    torch.manual_seed(0)
    x = torch.randn(2, 13, width) * 4
    y = call(name, RegionStep(kind=StepKind.SOFTMAX), x, RegionConstants(), of_bytes=of_bytes)
    assert (y - (on_grid(x) if of_bytes else x).double().softmax(-1)).abs().max() < 3e-7
