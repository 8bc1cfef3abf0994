"""AdaRound: what it chooses is converted, the same for the same seed, and much better than nearest at 4 bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.round_adaptively import AdaptiveRounding, round_adaptively
from quant2e.accuracy.algorithms.rounding.hessian_rounding import ColumnGrid
from quant2e.accuracy.algorithms.rounding.soft_rounding import (
    Samples,
    SoftRounding,
    round_softly,
    row_errors,
    rows_times,
)
from quant2e.accuracy.output_error import output_sqnr
from quant2e.errors import Quant2eError
from quant2e.observers.given import integers_given
from tests.quant2e.accuracy.algorithms.rounded import QUANTIZERS, check_conversion, ids, prepared, xnnpack4

SETTINGS = SoftRounding(iterations=60, rate=0.05, batch_size=32, regularizer=30.0, warm_up=0.2, beta=(20.0, 2.0))


def problem(seed: int, groups: int = 1) -> tuple[torch.Tensor, ColumnGrid, list[Samples]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, 10, 10, generator=generator)
    x = torch.randn(groups, 64, 10, generator=generator) @ mix
    w = torch.randn(groups, 5, 10, generator=generator)
    bias = torch.randn(groups, 1, 5, generator=generator)
    rounded = x + 0.05 * torch.randn(groups, 64, 10, generator=generator)
    scale = w.abs().amax(-1, keepdim=True).expand_as(w) / 7
    grid = ColumnGrid(scale=scale, zero_point=torch.zeros_like(w), low=-8, high=7)
    return w, grid, [Samples(rounded, torch.relu(rows_times(x, w, bias)), bias, torch.relu)]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2))
def test_no_row_is_worse_than_nearest_and_values_go_up_or_down(seed, groups):
    w, grid, samples = problem(seed, groups)
    found = round_softly(w, grid, samples, SETTINGS, torch.Generator().manual_seed(0))
    after, before = (row_errors(samples, grid.real(q)) for q in (found, grid.nearest(w)))
    assert (after <= before).all()
    assert grid.low <= found.min() <= found.max() <= grid.high
    steps = w / grid.scale
    assert ((found == steps.floor().clamp(-8, 7)) | (found == steps.ceil().clamp(-8, 7))).all()


def test_it_finds_much_better_ones():
    errors = []
    for seed in range(4):
        w, grid, samples = problem(seed)
        settings_ = replace(SETTINGS, iterations=500, rate=0.02)
        found = round_softly(w, grid, samples, settings_, torch.Generator().manual_seed(0))
        errors.append([float(row_errors(samples, grid.real(q)).sum()) for q in (grid.nearest(w), found)])
    nearest, ours = torch.tensor(errors).mean(0)
    assert ours < 0.75 * nearest


def test_beta_falls():
    found = [SETTINGS.beta_at(step) for step in range(60)]
    assert found[:12] == [None] * 12
    assert found[12] == 20.0
    assert all(a >= b >= 2.0 for a, b in itertools.pairwise(found[12:]))


@pytest.mark.parametrize("name", ["xnnpack", "x86, groups with zero points"])
def test_conversion_writes_what_was_chosen_the_same_each_time(name):
    before = prepared(QUANTIZERS[name]())
    after, again = (round_adaptively(before, ids(3), iterations=20) for _ in range(2))
    check_conversion(before, after, ids(1, 5)[0])
    calls = [node for node in after.graph.nodes if node.op == "call_module"]
    given_ = [(integers_given(after, call), integers_given(again, call)) for call in calls]
    chosen = [pair for pair in given_ if pair[0] is not None]
    assert chosen
    assert all(torch.equal(*pair) for pair in chosen)


def test_bad_settings_are_refused():
    for wrong in ({"iterations": 0}, {"rate": 0.0}, {"warm_up": 1.0}, {"beta": (2.0, 20.0)}, {"samples": 0}):
        with pytest.raises(Quant2eError, match="round_adaptively"):
            AdaptiveRounding(**wrong)


def digits(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten wavy patterns in noise."""
    generator = torch.Generator().manual_seed(seed)
    y, along = torch.randint(0, 10, (count,), generator=generator), torch.linspace(0, 6.28, 10)
    waves = [torch.sin((k + 1) * along / 2 + k) * torch.cos((10 - k) * along[:, None] * 0.4) for k in range(10)]
    return (torch.stack(waves)[y] + 1.2 * torch.randn(count, 10, 10, generator=generator))[:, None], y


@pytest.mark.slow
def test_a_small_network_at_4_bits():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(120):
        x, y = digits(64, step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    data, unseen = [digits(32, 1000 + i)[0] for i in range(6)], [digits(32, 5000 + i)[0] for i in range(12)]
    before = prepared(xnnpack4(), model, data)
    after = round_adaptively(before, data, iterations=400)
    nearest, ours = (quant2e.convert_pt2e(graph) for graph in (before, after))
    assert output_sqnr(model, ours, unseen) > output_sqnr(model, nearest, unseen) + 5

    def agrees(converted) -> float:
        with torch.no_grad():
            return float(torch.stack([(converted(x).argmax(1) == model(x).argmax(1)).float() for x in unseen]).mean())

    assert 1 - agrees(ours) < 0.6 * (1 - agrees(nearest))
