"""Factors of channels: whatever they are, the float result stays, on nets drawn at random, for every batch size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.channels.moves import move
from quant2e.accuracy.algorithms.channels.scaling import channel_scaling
from quant2e.accuracy.output_error import output_sqnr
from quant2e.graph.captured.capture import as_graph_module
from tests.quant2e.accuracy.algorithms.generated_nets import nets

KEPT_DB = 90.0
"""Float rounding of factors up to 30, through up to a dozen layers."""


def moved(captured: torch.fx.GraphModule, seed: int = 0) -> tuple[torch.fx.GraphModule, int]:
    """The graph with random factors wherever it takes one, and how many those are."""
    graph = as_graph_module(captured)
    scaling = channel_scaling(graph)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.exp(torch.randn(scaling.count, dtype=torch.float64, generator=generator))
    factors[0] = 1.0
    move(graph, scaling, factors)
    return graph, scaling.count - 1


def check(net: nn.Module, seed: int = 0) -> int:
    example = torch.randn(2, 3, 8, 8)
    captured = quant2e.capture(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    graph, count = moved(captured, seed)
    batches = [example, torch.randn(5, 3, 8, 8)]
    assert output_sqnr(captured, graph, batches) > KEPT_DB
    assert all(torch.equal(value, before[name]) for name, value in captured.state_dict().items())
    return count


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(net=nets(), seed=st.integers(0, 100))
def test_the_float_result_is_kept(net, seed):
    check(net, seed)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(net=nets(), seed=st.integers(0, 100))
def test_the_float_result_is_kept_on_many(net, seed):
    check(net, seed)


class Divided(nn.Module):
    """Linears around a division by a tensor, which another op may read as well."""

    def __init__(self, by: torch.Tensor, *, again: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.again = nn.Linear(6, 6), nn.Linear(6, 6), again
        self.register_buffer("by", by)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.first(x) / self.by)
        return y + self.by if self.again else y


CHANNELS = torch.tensor([0.5, -2.0, 30.0, 1.0, 0.1, 7.0])


@pytest.mark.parametrize(
    ("by", "again", "count"),
    [
        pytest.param(CHANNELS, False, 12, id="its own factors, before and behind"),
        pytest.param(CHANNELS, True, 6, id="read elsewhere: the factors pass"),
        pytest.param(torch.tensor(3.0), False, 6, id="one number"),
        pytest.param(torch.tensor([1, 2, 3, 4, 5, 6]), False, 6, id="whole numbers"),
    ],
)
def test_a_division_by_a_constant(by, again, count):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    captured = quant2e.capture(Divided(by, again=again), (x,))
    graph, found = moved(captured)
    assert found == count
    assert output_sqnr(captured, graph, [x]) > KEPT_DB
