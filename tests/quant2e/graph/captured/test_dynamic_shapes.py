"""Dynamic shapes of models with ``*args``, as their graphs take them."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.dynamic_shapes import of_graph

ROWS = {0: Dim.DYNAMIC}
A, B, C = (torch.randn(3, 4) for _ in range(3))


class Plain(nn.Module):
    def forward(self, x, y):
        return x + y


class Some(nn.Module):
    def forward(self, x, *rest):
        return x + sum(rest)


CASES = [
    (Plain(), (A, B), {}, (ROWS, ROWS), (ROWS, ROWS)),
    (Plain(), (A,), {"y": B}, {"x": ROWS, "y": ROWS}, {"x": ROWS, "y": ROWS}),
    (Some(), (A, B, C), {}, (ROWS, (ROWS, ROWS)), {"x": ROWS, "rest_0": ROWS, "rest_1": ROWS}),
    (Some(), (A, B), {}, {"x": ROWS, "rest": (ROWS,)}, {"x": ROWS, "rest_0": ROWS}),
    (Some(), (A, B), {}, None, None),
]


@pytest.mark.parametrize(("model", "args", "kwargs", "shapes", "expected"), CASES)
def test_what_the_graph_takes(model, args, kwargs, shapes, expected):
    assert of_graph(shapes, model, args, kwargs) == expected
    graph = capture(model, args, kwargs, dynamic_shapes=shapes)
    assert of_graph(expected, graph, args, kwargs) is expected
    again = torch.export.export(graph, args, kwargs, dynamic_shapes=expected)
    if shapes is not None:
        wider = (torch.randn(5, 4) for _ in args), {key: torch.randn(5, 4) for key in kwargs}
        assert again.module()(*wider[0], **wider[1]).shape == (5, 4)
