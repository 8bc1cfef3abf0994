"""Sizes to compare at: the ends of what may vary, as far as the reference takes them."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from lowering.bounds import calls_at_bounds
from lowering.signature import Signature
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture


class Pairs(nn.Module):
    """Takes an even number of rows only."""

    def forward(self, x):
        return x.reshape(-1, 2, 4) * 2.0


class Times(nn.Module):
    def forward(self, x, n):
        return x * n


def sizes_compared(model, example, shapes):
    graph = capture(model, example, dynamic_shapes=shapes)
    calls = calls_at_bounds(Signature(graph), Call(example, {}), graph)
    for call in calls:
        graph(*call.args)
    return [call.args[0].shape[0] for call in calls]


@pytest.mark.parametrize(("most", "compared"), [(64, [64]), (9, [])])
def test_a_size_that_the_graph_refuses_is_left_out(most, compared):
    assert sizes_compared(Pairs(), (torch.randn(6, 4),), ({0: Dim.AUTO(max=most)},)) == compared


def test_a_number_that_varies_has_ends_too():
    shapes = ({0: Dim.AUTO(max=8)}, Dim.DYNAMIC)
    assert set(sizes_compared(Times(), (torch.randn(6, 4), 3), shapes)) == {1, 8}
