"""Budgets and frontiers: what the integer program finds is the best of all mixes, and predictions come true."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import quant2e
from quant2e.accuracy.tuning.budgets import Budget, BudgetedFrontier, read_budget
from quant2e.accuracy.tuning.space.costs import Costs, Option
from quant2e.accuracy.tuning.space.frontier import Frontier
from quant2e.accuracy.tuning.space.space import Family, Mix, Space, TunedGroup
from quant2e.errors import Quant2eError
from quantizers import XNNPACKQuantizer

pytest.importorskip("scipy")


def table(numbers: list[tuple[float, float, int]]) -> tuple[Space, Costs]:
    """Groups of (loss, work, MACs): int8, 4 bits (half the work, four times the loss) or float."""
    names = "abcdefgh"[: len(numbers)]
    groups = tuple(TunedGroup((name,), (), frozenset({name}), ("int8", "int4")) for name in names)
    rows = tuple(
        {
            "int8": Option(loss, work / 4, macs, macs, 8.0 * macs),
            "int4": Option(4.0 * loss, work / 8, macs, macs / 2, 4.0 * macs),
            "float": Option(0.0, work, 0, 4.0 * macs, 32.0 * macs),
        }
        for loss, work, macs in numbers
    )
    total = sum(macs for _, _, macs in numbers)
    return Space((Family((), groups),)), Costs((rows,), total, total, 7.0)


def everything(space: Space) -> list[Mix]:
    return [Mix(0, picks) for picks in itertools.product(*(group.choices for group in space.families[0].groups))]


NUMBERS = st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(0.01, 1.0), st.integers(1, 100)), min_size=2, max_size=5)


@settings(max_examples=25, deadline=None)
@given(NUMBERS, st.floats(0.05, 0.95), st.floats(0.05, 1.0))
def test_the_integer_program_finds_the_best_mix(numbers, share, part):
    space, costs = table(numbers)
    budget = Budget(int8_share=share, size=7.0 + 4.0 * costs.macs * part + costs.macs)
    frontier = BudgetedFrontier(space, costs, budget)
    kept = [mix for mix in everything(space) if frontier.allowed(mix)]
    assert frontier.allowed(frontier.cheapest)
    assert costs.work(frontier.cheapest) == pytest.approx(min(map(costs.work, kept)), rel=1e-4)
    least = frontier.within(0.0)
    assert costs.loss(least) <= min(map(costs.loss, kept)) * 1.001 + 1e-4 * max(map(costs.loss, kept))
    bound = 1.5 * costs.loss(least)
    cheapest = min(costs.work(mix) for mix in kept if costs.loss(mix) <= bound)
    assert costs.work(frontier.within(bound)) <= cheapest * (1.0 + 1e-3) + 1e-9


@settings(max_examples=50, deadline=None)
@given(NUMBERS, st.floats(0.01, 1.0))
def test_without_a_budget_the_frontier_is_within_one_group_of_the_best(numbers, part):
    space, costs = table(numbers)
    frontier = Frontier(space, costs)
    bound = part * max(map(costs.loss, everything(space)))
    found = frontier.within(bound)
    assert costs.loss(found) <= bound * (1.0 + 1e-6)
    best = min(costs.work(mix) for mix in everything(space) if costs.loss(mix) <= bound)
    assert costs.work(found) <= best + max(work for _, work, _ in numbers)


def test_rungs_lose_less_and_less():
    space, costs = table([(0.1, 0.3, 30), (0.9, 0.5, 50), (0.2, 0.2, 20)])
    for frontier in (Frontier(space, costs), BudgetedFrontier(space, costs, Budget(int8_share=0.4))):
        losses = [costs.loss(frontier.within(bound)) for bound in frontier.bounds()]
        assert losses == sorted(losses, reverse=True)
    assert Frontier(space, costs).prefix(1).picks == ("int4", "float", "int4")


def test_nothing_within_the_budget_says_how_far_one_could_go():
    space, costs = table([(0.1, 0.3, 30), (0.9, 0.5, 50)])
    with pytest.raises(
        Quant2eError, match=r"at most 10 bytes.*at best 100.0% of MACs.*least is 47 bytes and 4.00 bits"
    ):
        BudgetedFrontier(space, costs, Budget(size=10))


@pytest.mark.parametrize(
    ("budget", "latency", "said"),
    [
        ({"size": -1}, None, "size=-1 is no number above 0"),
        ({"size": math.nan}, None, "size=nan"),
        ({"int8_share": 1.5}, None, "more than all"),
        ({"bytes": 3}, None, "'bytes' is none of int8_share, size"),
        (0.5, None, "budget is a float"),
        ({"latency": 0.1}, None, "needs latency="),
        (None, 3, "latency is a int"),
    ],
)
def test_budgets_that_cannot_be(budget, latency, said):
    with pytest.raises(Quant2eError, match=said):
        read_budget(budget, latency)


class Net(nn.Module):
    """Convolutions with norms, a residual, a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x)) + x
        return self.head(self.third(x).mean((2, 3)))


@pytest.fixture(scope="module")
def tuned():
    """Tunes a small convolutional net, whose latency is a function of its share on int8."""
    model = Net().eval()
    data = [torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    wanted = model(data[0]).detach()

    def evaluate(module) -> float:
        return 1.0 - float((module(data[0]) - wanted).norm() / wanted.norm())

    def latency(quantized: quant2e.QuantizedModel) -> float:
        return 1.0 - 0.5 * quantized.report.int8_mac_share

    def run(**arguments):
        quantizer = {"per channel": XNNPACKQuantizer().set_global("w8a8")}
        return quant2e.tune(model, data[:1], quantizer, data, evaluate, progress=False, **arguments)

    return run, latency


@pytest.mark.slow
def test_what_is_predicted_comes_out(tuned):
    run, _ = tuned
    result = run(strategy="random", max_trials=8, max_drop=0.0)
    for trial in result.trials:
        assert trial.size_bytes == pytest.approx(_predicted_size(result, trial), rel=0.02)
    everything_float = max(trial.size_bytes for trial in result.trials)
    assert min(trial.size_bytes for trial in result.trials) < 0.6 * everything_float


def _predicted_size(result, trial):
    """Bits of the weights as the table has them, and the float model's bytes for the rest."""
    weights = sum(p.numel() for n, p in Net().named_parameters() if n.endswith("weight") and "norm" not in n)
    floats = result.model.report.float_bytes - 4 * (8 + 8 + 8 + 8) - 8  # the norm is folded
    channels = {8.0: 12 * (8 + 8 + 8 + 4)}.get(trial.bits_per_weight)
    if channels is None:  # a mixture: how many channels is not known here
        return trial.size_bytes
    return floats - weights * (4 - trial.bits_per_weight / 8) + channels


def test_a_size_is_kept(tuned):
    run, _ = tuned
    free = run(max_drop=1.0)
    assert free.met
    size = free.best.size_bytes + 400
    result = run(max_drop=0.0, budget={"size": size}, max_trials=4)
    assert not result.met
    assert all(trial.size_bytes <= size for trial in result.trials)
    assert result.metric == max(trial.metric for trial in result.trials)
    assert "not met" in repr(result)


def test_a_latency_is_measured_and_kept(tuned):
    run, latency = tuned
    result = run(max_drop=1.0, budget=Budget(latency=0.6), latency=latency, max_trials=3)
    assert result.met
    assert result.best.latency == pytest.approx(1.0 - 0.5 * result.best.int8_share)
    assert "latency, ms" in str(result)
    slow = run(max_drop=1.0, budget={"latency": 0.4}, latency=latency, max_trials=3)
    assert not slow.met
    assert "not met within the budget (at most 400 ms)" in str(slow)
