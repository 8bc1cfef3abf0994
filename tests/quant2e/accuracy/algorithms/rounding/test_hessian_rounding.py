"""Rounding by the Hessian: never worse than nearest on its own objective, whatever the inputs were."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.accuracy.algorithms.rounding.hessian_rounding import ColumnGrid, round_by_hessian, squared_error


def problem(seed: int, groups: int = 1, rows: int = 4, columns: int = 12, rank: int = 40):
    """A weight, a grid with zero points, and the Hessian of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator)
    x = torch.randn(groups, rank, columns, generator=generator) @ mix
    w = torch.randn(groups, rows, columns, generator=generator)
    scale = w.abs().amax(-1, keepdim=True).expand_as(w) / 7
    zero = torch.randint(-3, 4, (groups, rows, 1), generator=generator).float().expand_as(w)
    return w, ColumnGrid(scale=scale, zero_point=zero, low=-8, high=7), (x.transpose(1, 2) @ x).double()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 60), st.booleans(), st.sampled_from([1, 5, 128]))
def test_no_row_is_worse_than_nearest(seed, groups, rank, order, block):
    w, grid, hessian = problem(seed, groups, rank=rank)
    found = round_by_hessian(w, grid, hessian, order=order, block=block)
    assert found.damping is not None
    assert (found.after <= found.before).all()
    assert torch.equal(found.integers, found.integers.round())
    assert grid.low <= found.integers.min() <= found.integers.max() <= grid.high
    torch.testing.assert_close(squared_error(grid.real(found.integers) - w, hessian), found.after)


@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest(order):
    w, grid, _ = problem(0)
    found = round_by_hessian(w, grid, torch.diag(torch.arange(1.0, 13.0)).unsqueeze(0), order=order)
    assert torch.equal(found.integers, grid.nearest(w))


def test_blocks_change_nothing():
    w, grid, hessian = problem(1, columns=40, rank=80)
    one, other = (round_by_hessian(w, grid, hessian, block=block).integers for block in (1, 128))
    assert (one == other).float().mean() > 0.98


def test_groups_are_problems_of_their_own():
    w, grid, hessian = problem(2, groups=3)
    found = round_by_hessian(w, grid, hessian)
    for i in range(3):
        own = round_by_hessian(w[i : i + 1], grid.apply(lambda t, i=i: t[i : i + 1]), hessian[i : i + 1])
        assert torch.equal(own.integers, found.integers[i : i + 1])


def test_it_halves_the_error():
    found = [round_by_hessian(*problem(seed, rows=6)) for seed in range(8)]
    assert sum(float(one.after.sum()) for one in found) < 0.5 * sum(float(one.before.sum()) for one in found)


def test_it_comes_near_the_best():
    errors = []
    for seed in range(8):
        w, grid, hessian = problem(seed, rows=6, columns=5, rank=30)
        found = round_by_hessian(w, grid, hessian)
        floor = torch.floor(w / grid.scale) + grid.zero_point
        tried = [
            squared_error(grid.real((floor + torch.tensor(up)).clamp(-8, 7)) - w, hessian)
            for up in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=5)
        ]
        errors.append([float(e.sum()) for e in (found.before, found.after, torch.stack(tried).amin(0))])
    nearest, ours, best = torch.tensor(errors).mean(0)
    assert ours - best < 0.4 * (nearest - best)


def test_a_hessian_that_is_nearly_singular_needs_float64_or_damping():
    w, grid, _ = problem(3)
    x = torch.randn(1, 12, dtype=torch.float64)
    hessian = (x.t() @ x).unsqueeze(0) * 1e12
    found = round_by_hessian(w, grid, hessian, damping=1e-13)
    assert found.damping is not None
    assert found.damping >= 1e-13
    assert (found.after <= found.before).all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_without_a_factor_the_nearest_stay(value):
    w, grid, _ = problem(4)
    found = round_by_hessian(w, grid, torch.full((1, 12, 12), value))
    assert found.damping is None
    assert torch.equal(found.integers, grid.nearest(w))


def test_columns_without_input_are_rounded_to_nearest():
    w, grid, hessian = problem(5)
    hessian[:, 3], hessian[:, :, 3] = 0, 0
    found = round_by_hessian(w, grid, hessian)
    assert torch.equal(found.integers[..., 3], grid.nearest(w)[..., 3])
