"""Own noise of a graph: what it allows, and what it does not excuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowering import Bound, to_executorch, to_inductor, to_onnx
from lowering.own_noise import LEEWAY_DB, compare_within_noise, own_noise_db
from quant2e import quantize
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call
from tests.control_flow_models import SHAPES, captured, data
from tests.lowering.graphs import on_grid
from tests.lowering.test_verify import graph
from tests.quant2e.integer.test_graph import xnnpack

SLOW = pytest.mark.slow


def test_a_graph_that_rounds_chaotically_is_judged_by_its_own_noise():
    # each layer decides at exact ties, so the last bit of its weight turns into a whole step
    class Chaos(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return on_grid(x * self.scale, (1.0, 0)) + 0.25 * x

    x = torch.arange(64) % 4 + 0.5
    reference, batches = graph(Chaos(), x), [Call((x,), {})]
    noise = own_noise_db(reference, batches)
    found = compare_within_noise(lambda x: reference(x * (1 - 2.0**-23)), reference, batches)
    assert 0 < noise < 40
    assert found.own_noise_db == noise
    assert found.bound == Bound(sqnr_db=noise - LEEWAY_DB)
    assert "moving the last bits of its floats moves the graph itself" in str(found)
    assert compare_within_noise(reference, reference, batches).own_noise_db is None
    assert not compare_within_noise(lambda x: -reference(x), reference, batches).passed


class Mixed(nn.Module):
    """Layers between a float32 beginning and end, in ``dtype`` by autocast."""

    def __init__(self, dtype, gain=None):
        super().__init__()
        self.dtype, self.gain = dtype, gain
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(6)])

    def forward(self, x):
        x = F.relu(self.first(x))
        if self.gain is not None:
            x = on_grid(x, (0.05, 0)) * self.gain
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            for layer in self.layers:
                x = x + F.gelu(layer(x))
        return self.last(x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_noise_and_a_wrong_scale_is_not(dtype):
    """The program: the same without rounding behind each op, as compilers fuse it."""
    torch.manual_seed(0)
    x, mixed = torch.randn(64, 16), Mixed(dtype, 1.0).eval()
    reference, batches, asked = graph(mixed, x), [Call((x,), {})], Bound(steps=0.01, sqnr_db=80.0)

    def program(gain):
        exact = Mixed(None, gain).eval()
        exact.load_state_dict(mixed.state_dict())
        return compare_within_noise(exact, reference, batches, asked)

    right, wrong = program(1.0), program(1.05)
    assert right.passed
    assert abs(right.own_noise_db - right.sqnr_db) < 10  # what is expected of rounding is near what it loses
    assert right.sqnr_db < asked.sqnr_db
    assert not wrong.passed
    assert graph(mixed, x)(x).equal(reference(x))


class Chosen(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.a, lambda x: torch.relu(self.b(x)), (x,))


@pytest.mark.parametrize("kind", ["cond", *SHAPES])
def test_what_bodies_compute_moves_too(kind):
    torch.manual_seed(0)
    batches = [Call(each, {}) for each in data(kind, 2)] if kind in SHAPES else [Call((torch.randn(4, 8),), {})]
    gm = captured(kind) if kind in SHAPES else graph(Chosen(), *batches[0].args)
    noise = own_noise_db(gm, batches)
    assert 120 < noise < 140  # the last bits of floats, in the bodies as well
    assert not compare_within_noise(lambda *x: gm(*x) * 1.1, gm, batches).passed
    strict = Bound(steps=1e-9, sqnr_db=200.0)
    assert compare_within_noise(lambda *x: gm(*x) * (1 + 2.0**-23), gm, batches, strict).passed


def test_ties_in_bodies_are_noise():
    """Nothing but the body moves: integers go in, and come out where their averages are ties."""

    class Body(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: on_grid(x * 0.5, (1.0, 0)), lambda x: x.clone(), (x,))

    x = torch.arange(64.0)
    gm, batches = graph(Body(), x), [Call((x,), {})]
    assert 20 < own_noise_db(gm, batches) < 45


def test_other_ops_that_call_functions_are_run():
    class Strict(nn.Module):
        def forward(self, x):
            return torch.ops.higher_order.strict_mode(lambda x: (x * 2, x.argmax()), (x,))

    x = torch.randn(64)
    assert 120 < own_noise_db(Strict(), [Call((x,), {})]) < 160


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lower", [to_executorch, pytest.param(to_inductor, marks=[pytest.mark.inductor, SLOW])])
def test_programs_with_autocast_inside_are_held_to_its_rounding(lower, dtype):
    torch.manual_seed(0)
    x = torch.randn(16, 16)
    quantized = quantize(Mixed(dtype).eval(), (x,), xnnpack(), [x, x + 0.1])
    found = lower(quantized).report.verification
    assert found.passed
    assert found.sqnr_db > 30


def test_onnxruntime_does_not_compute_in_bfloat16(tmp_path):
    x = torch.randn(16, 16)
    for dtype in (torch.float16, torch.bfloat16):
        quantized = quantize(Mixed(dtype).eval(), (x,), xnnpack(), [x, x + 0.1])
        if dtype is torch.float16:
            assert to_onnx(quantized, path=tmp_path / "half.onnx").report.verification.passed
            continue
        with pytest.raises(LoweringError, match=r"do not compute in bfloat16, as 'linear_1' .*without autocast"):
            to_onnx(quantized, path=tmp_path / "brain.onnx")
        assert not (tmp_path / "brain.onnx").exists()


class Averages(nn.Module):
    """Averages of four integers each, on the integers' own scale: every fourth is a tie, and the last bit decides."""

    def __init__(self, up=0.0):
        super().__init__()
        self.factor = 1 + up

    def forward(self, x):
        x = on_grid(x, (0.1, 0))
        for _ in range(3):
            x = on_grid(F.avg_pool2d(x, 2) * self.factor, (0.1, 0))
        return x + 0.01 * x.abs().sqrt()


def test_ties_of_averages_are_noise_and_a_wrong_scale_is_not():
    """The program rounds ties away from zero, as onnxruntime's kernel does."""
    torch.manual_seed(0)
    x = torch.randint(-60, 61, (2, 4, 32, 32)) * 0.1
    reference, batches = graph(Averages(), x), [Call((x,), {})]
    found = compare_within_noise(Averages(up=1e-6), reference, batches)
    assert found.passed
    assert found.max_steps > 1 or found.sqnr_db < Bound().sqnr_db
    assert abs(found.own_noise_db - found.sqnr_db) < 10
    assert not compare_within_noise(lambda x: 1.5 * reference(x), reference, batches).passed
