"""The attention kernel, called by a plan of its own, on every instruction set: beside what float64 says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowering.native.kernels.op import instruction_sets, load_region_op
from lowering.native.kernels.plan import RegionConstants, RegionPlan, RegionStep, RegionTensor, StepKind, region_plan

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler")
everywhere = pytest.mark.parametrize("name", instruction_sets())

SAMPLES = 2
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes of one attention. ``mask``: its own, without keys. ``shares``: heads of k and v, where there are fewer."""

    rows: int
    keys: int
    size: int
    heads: int = 2
    value_size: int = 0
    shares: int = 0
    mask: tuple[int, int, int] | None = None
    causal: bool = False

    @property
    def groups(self) -> int:
        return self.shares or self.heads

    @property
    def value(self) -> int:
        return self.value_size or self.size

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.size)


CASES = (
    Case(rows=128, keys=128, size=64, mask=(1, 1, 128)),
    Case(rows=1, keys=1, size=1),
    Case(rows=7, keys=7, size=32),
    Case(rows=197, keys=197, size=64),
    Case(rows=5, keys=33, size=24, heads=6, shares=2, mask=(SAMPLES, 6, 5)),
    Case(rows=33, keys=5, size=20, value_size=12, heads=4, shares=2, mask=(SAMPLES, 1, 1)),
    Case(rows=50, keys=50, size=7, value_size=9, causal=True),
    Case(rows=130, keys=130, size=80, heads=1, mask=(1, 1, 130), causal=True),
    Case(rows=300, keys=70, size=64, heads=1, causal=True),
    Case(rows=13, keys=300, size=48, value_size=17, mask=(1, 2, 1), causal=True),
    Case(rows=49, keys=49, size=32, heads=3, mask=(1, 3, 49)),
    Case(rows=1, keys=500, size=128, heads=4, shares=1),
)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v as rows of heads; a mask of the lowest float at some places, and of small numbers elsewhere."""
    torch.manual_seed(0)
    q = torch.randn(SAMPLES, case.rows, case.heads * case.size)
    k = torch.randn(SAMPLES, case.keys, case.groups * case.size)
    v = torch.randn(SAMPLES, case.keys, case.groups * case.value)
    if case.mask is None:
        return q, k, v, None
    mask = torch.randn(*case.mask, case.keys)
    return q, k, v, mask.masked_fill(torch.rand(mask.shape) < 0.2, LOWEST)


def by_head(x: Tensor, heads: int, readers: int) -> Tensor:
    """``[n, rows, heads * size]`` as ``[n, readers, rows, size]``, in float64."""
    n, rows, width = x.shape
    split = x.double().view(n, rows, heads, width // heads).transpose(1, 2)
    return split.repeat_interleave(readers // heads, 1)


def probabilities(case: Case, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = by_head(q, case.heads, case.heads) @ by_head(k, case.groups, case.heads).transpose(-1, -2) * case.scale
    if mask is not None:
        scores = scores + mask
    if case.causal:
        later = torch.ones(case.rows, case.keys, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1)


def expected(case: Case, p: Tensor, v: Tensor) -> Tensor:
    y = p @ by_head(v, case.groups, case.heads)
    return y.transpose(1, 2).reshape(SAMPLES, case.rows, case.heads * case.value)


def step_of(case: Case) -> RegionStep:
    return RegionStep(
        kind=StepKind.ATTENTION,
        x=0,
        other=1,
        third=2,
        groups=case.heads,
        inputs=case.groups,
        outputs=case.size,
        inner=case.value,
        mode=int(case.causal),
        extra_number=case.scale,
    )


def arguments(case: Case) -> list[RegionTensor]:
    """q, k and v, the result, and behind it the mask, if there is one."""
    widths = (case.heads * case.size, case.groups * case.size, case.groups * case.value)
    rows = (case.rows, case.keys, case.keys)
    return [
        RegionTensor(floats=True, h=1, w=w, c=c, argument=i) for i, (w, c) in enumerate(zip(rows, widths, strict=True))
    ]


def planned(case: Case, values: list[RegionTensor], steps: list[RegionStep], inputs: int) -> RegionPlan:
    """The last step's result is that of the op."""
    width = case.heads * case.value
    if case.mask is not None:
        n, heads, rows = case.mask
        values.append(RegionTensor(floats=True, h=rows, w=case.keys, c=heads, argument=3, shared=n == 1))
        steps[-1].fourth = len(values) - 1
    values.append(RegionTensor(floats=True, h=1, w=case.rows, c=width, argument=inputs))
    steps[-1].z = len(values) - 1
    # the op counts inputs from the first value on
    order = sorted(range(len(values)), key=lambda i: (values[i].argument is None, values[i].argument or 0))
    place = {old: new for new, old in enumerate(order)}
    for step in steps:
        for name in ("x", "other", "third", "fourth", "y", "z"):
            setattr(step, name, place.get(getattr(step, name), -1))
    return region_plan([values[i] for i in order], steps, RegionConstants(), inputs, [(case.rows, width)], 0)


def call(name: str, plan: RegionPlan, inputs: list[Tensor]) -> Tensor:
    """The result of the kernels for instruction set ``name``."""
    op = load_region_op(name)
    assert op is not None
    return op(inputs, plan.numbers, plan.constants, list(plan.outputs))[0]


@everywhere
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_floats_are_those_of_float64_up_to_rounding(case, threads, name, torch_threads):
    torch_threads(threads)
    q, k, v, mask = tensors(case)
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    y = call(name, planned(case, arguments(case), [step_of(case)], len(inputs)), inputs)
    assert (y - expected(case, probabilities(case, q, k, mask), v)).abs().max() < 3e-6


@everywhere
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_multiplied_exactly(case, zero, name):
    grids = ((0.02, 120), (0.03, 131), (0.025, 125))
    rounded = (1 / 252, zero, 0, 255)
    q, k, v, mask = tensors(case)
    inputs = [q, k, v] if mask is None else [q, k, v, mask]
    values, steps = arguments(case), []
    step = step_of(case)
    for place, (read, (scale, point)) in enumerate(zip(("x", "other", "third"), grids, strict=True)):
        given = values[place]
        values.append(RegionTensor(floats=False, h=1, w=given.w, c=given.c, zero=point))
        steps.append(RegionStep(kind=StepKind.QUANTIZE, x=place, y=len(values) - 1, inverse=1 / scale, zero=point))
        setattr(step, read, len(values) - 1)
        setattr(step, f"{read}_scale", scale)
        setattr(step, f"{read}_zero", point)
    step.softmax_scale, step.softmax_zero, step.softmax_low, step.softmax_high = rounded
    y = call(name, planned(case, values, [*steps, step], len(inputs)), inputs)
    q, k, v = (
        ((x / scale).round().clamp(-point, 255 - point) * scale).double()
        for x, (scale, point) in zip((q, k, v), grids, strict=True)
    )
    p = (probabilities(case, q, k, mask) * 252).round().clamp(-zero, 255 - zero) / 252
    wrong = (y - expected(case, p, v)).abs()
    # a probability in the middle of two integers may become either
    assert wrong.max() < 4.5 / 252
    assert (wrong > 3e-6).double().mean() < 0.02


@everywhere
def test_heads_begin_at_any_channel(name):
    case = Case(rows=20, keys=20, size=16, heads=3)
    torch.manual_seed(0)
    joined = torch.randn(SAMPLES, case.rows, 5 + 3 * 48)
    step = step_of(case)
    step.x, step.other, step.third, step.z = 0, 0, 0, 1
    step.x_first, step.other_first, step.third_first = 5, 53, 101
    values = [
        RegionTensor(floats=True, h=1, w=20, c=149, argument=0),
        RegionTensor(floats=True, h=1, w=20, c=48, argument=1),
    ]
    y = call(name, region_plan(values, [step], RegionConstants(), 1, [(20, 48)], 0), [joined])
    q, k, v = joined[..., 5:].split(48, -1)
    assert (y - expected(case, probabilities(case, q, k, None), v)).abs().max() < 3e-6


@everywhere
def test_a_row_whose_keys_are_all_masked_by_minus_infinity_is_zero(name):
    case = Case(rows=9, keys=21, size=8, mask=(1, 1, 9))
    q, k, v, mask = tensors(case)
    assert mask is not None
    mask[:, :, 4] = -math.inf
    y = call(name, planned(case, arguments(case), [step_of(case)], 4), [q, k, v, mask])
    assert not y[:, 4].any()
    others = [i for i in range(9) if i != 4]
    assert (y - expected(case, probabilities(case, q, k, mask), v))[:, others].abs().max() < 3e-6


@everywhere
def test_masks_have_any_strides(name):
    case = Case(rows=17, keys=40, size=16, mask=(1, 1, 17))
    q, k, v, mask = tensors(case)
    assert mask is not None
    plan = planned(case, arguments(case), [step_of(case)], 4)
    turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(call(name, plan, [q, k, v, mask]), call(name, plan, [q, k, v, turned]))
