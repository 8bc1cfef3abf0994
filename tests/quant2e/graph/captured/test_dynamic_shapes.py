"""Dynamic shapes: of models with ``*args``, as their graphs take them; and read from a graph."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.export import Dim

from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.dynamic_shapes import of_graph, read_dynamic_shapes

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


class Nested(nn.Module):
    def forward(self, x, options, *, scale, count=2):
        return x * options["gain"] + scale * count


N, M = Dim("n", min=3, max=16), Dim("m")
SHAPES = {"x": {0: N, 1: M}, "options": {"gain": {1: M}}, "scale": None, "count": None}
EXAMPLE = ((torch.ones(4, 5), {"gain": torch.ones(1, 5)}), {"scale": torch.ones(1), "count": 2})


def test_read_from_a_graph_however_it_came_to_be():
    """Bounds as they were given, whatever tracing found; a graph without sizes that vary has none."""
    expected = {
        "x": {0: Dim.DYNAMIC(min=3, max=16), 1: Dim.DYNAMIC(min=None, max=None)},
        "options": {"gain": {1: Dim.DYNAMIC(min=None, max=None)}},
        "scale": None,
        "count": None,
    }
    program = torch.export.export(Nested(), *EXAMPLE, dynamic_shapes=SHAPES)
    for graph in (capture(Nested(), *EXAMPLE, dynamic_shapes=SHAPES), capture(program), program.module()):
        assert read_dynamic_shapes(graph) == expected
    captured = capture(program)
    assert read_dynamic_shapes(copy.deepcopy(captured)) == expected
    again = torch.export.export(captured, *EXAMPLE, dynamic_shapes=expected)
    assert read_dynamic_shapes(again.module()) == expected
    assert read_dynamic_shapes(capture(Nested(), *EXAMPLE)) is None
    assert read_dynamic_shapes(pickle.loads(pickle.dumps(captured))) is None  # made here
