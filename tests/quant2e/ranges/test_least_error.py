"""Least squared error: never worse than where it starts, as the grid allows, and near what a long search finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.ranges.least_error import KnownRows, fit
from quant2e.ranges.qparams import NumberFormat

SYMMETRIC = NumberFormat(
    dtype=torch.int8, quant_min=-8, quant_max=7, qscheme=torch.per_channel_symmetric, custom_range=True
)
AFFINE = replace(SYMMETRIC, qscheme=torch.per_channel_affine)
GRIDS = {
    "symmetric": SYMMETRIC,
    "affine": AFFINE,
    "narrow": replace(SYMMETRIC, quant_min=-7),
    "powers of two": replace(SYMMETRIC, power_of_two=True),
    "eight bits": replace(AFFINE, quant_min=-128, quant_max=127),
    "unsigned": replace(AFFINE, dtype=torch.uint8, quant_min=0, quant_max=15),
    "unsigned, symmetric": replace(SYMMETRIC, dtype=torch.uint8, quant_min=0, quant_max=255),
}


def start(values: torch.Tensor, grid: NumberFormat):
    return grid.qparams(values.amin(1), values.amax(1))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(GRIDS)),
    st.integers(0, 10**6),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.booleans(),
)
def test_no_row_gets_worse(name, seed, size, weighted):
    generator, grid = torch.Generator().manual_seed(seed), GRIDS[name]
    values = torch.randn(5, 16, generator=generator) ** 3 * size
    values[1] = 0
    values[2] = values[2].abs()
    rows = KnownRows(values, torch.rand(1, 16, generator=generator) if weighted else None)
    found = fit(rows, grid, start(values, grid))
    assert (found.after <= found.before).all()
    assert torch.equal(rows.errors(grid, (found.scale[:, None], found.zero_point[:, None])).squeeze(1), found.after)
    assert (found.scale >= grid.eps).all()
    assert torch.isfinite(found.scale).all()
    assert ((found.zero_point >= grid.quant_min) & (found.zero_point <= grid.quant_max)).all()
    if grid.symmetric:
        assert torch.equal(found.zero_point, start(values, grid)[1])
    if grid.power_of_two:
        assert torch.equal(torch.frexp(found.scale)[0], torch.full_like(found.scale, 0.5))


def test_it_is_near_the_best_scale_there_is():
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rows, (scale, zero_point) = KnownRows(values), start(values, SYMMETRIC)
    found = fit(rows, SYMMETRIC, (scale, zero_point))
    tried = scale[:, None] * torch.linspace(0.2, 1.5, 2000)
    best = rows.errors(SYMMETRIC, (tried, torch.zeros_like(tried, dtype=torch.int64))).amin(1)
    assert (found.after <= best * 1.03).all()
    assert found.after.mean() < found.before.mean() * 0.96


def test_zero_points_never_hurt():
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(20, 32, generator=generator), torch.rand(20, 32, generator=generator)])
    one, other = (fit(KnownRows(values), grid, start(values, grid)) for grid in (SYMMETRIC, AFFINE))
    assert (other.after <= one.after * 1.02).all()
    assert other.after[20:].mean() < 0.4 * one.after[20:].mean()


def test_values_of_no_importance_are_clipped():
    values = torch.tensor([[0.1, -0.2, 0.3, 5.0]])
    grid, weights = SYMMETRIC, torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    alike, weighted = (fit(KnownRows(values, d), grid, start(values, grid)) for d in (None, weights))
    assert weighted.scale < alike.scale / 4


def test_a_scale_is_what_can_be_stored():
    values = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    rows = KnownRows(values, stored=lambda scale: scale.to(torch.bfloat16).to(scale.dtype))
    scale, zero_point = start(values, SYMMETRIC)
    found = fit(rows, SYMMETRIC, (rows.stored(scale), zero_point))
    assert torch.equal(found.scale, rows.stored(found.scale))


@pytest.mark.parametrize("shape", [(3, 1), (1, 5)])
def test_small_rows(shape):
    values = torch.linspace(-1, 2, shape[0] * shape[1]).reshape(shape)
    found = fit(KnownRows(values), AFFINE, start(values, AFFINE))
    assert (found.after <= found.before).all()
