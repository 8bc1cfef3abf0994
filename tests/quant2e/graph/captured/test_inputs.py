"""What a captured graph may be called with."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from quant2e.errors import CaptureError
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.inputs import flat_inputs, read_inputs


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], scale: int = 2, *, extra: list[Tensor]) -> Tensor:
        return batch["x"] * scale + extra[0] + batch["pair"][1].sum()


def test_the_conditions_of_a_graph_are_text():
    class Static(nn.Module):
        def forward(self, x: Tensor, batch: dict[str, Any], mode: str, flag: bool, limit: float, y: Any) -> Tensor:
            return batch["z"][0] + x.sum()

    args = (torch.ones(4, 3), {"z": [torch.ones(4), None]}, "fast", True, float("inf"), 3)
    shapes = {
        "x": {0: Dim("n", min=3, max=9)},
        "batch": {"z": [None, None]},
        "mode": None,
        "flag": None,
        "limit": None,
        "y": None,
    }
    inputs = capture(Static(), args, dynamic_shapes=shapes).inputs
    assert inputs.names == ("x", "batch", "mode", "flag", "limit", "y")
    assert inputs.conditions == (
        "x.dim() == 2",
        "x.size()[1] == 3",
        "batch['z'][0].dim() == 1",
        "batch['z'][0].size()[0] == 4",
        "batch['z'][1] is None",
        "mode == 'fast'",
        "flag == True",
        "limit == math.inf",
        "y == 3",
        "x.size()[0] >= 3",
        "x.size()[0] <= 9",
    )


def test_a_graph_without_nesting_names_its_placeholders():
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    inputs = read_inputs(torch.fx.GraphModule({}, graph))
    assert (inputs.names, inputs.spec, inputs.conditions) == (("x",), None, ())
    inputs.check((torch.ones(1),), {})
    with pytest.raises(CaptureError, match="missing x"):
        inputs.check((), {})


def test_tracing_is_not_checked():
    captured = capture(nn.Linear(3, 4), torch.ones(2, 3))
    traced = torch.fx.symbolic_trace(captured)
    assert torch.equal(traced(torch.ones(5, 3)), captured(torch.ones(2, 3))[:1].repeat(5, 1))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.randn(2, 3, 9, 8),), {}, r"input.size\(\)\[2\] == 8; got input=tensor\(2, 3, 9, 8\)"),
        ((torch.randn(3, 8, 8),), {}, r"input.dim\(\) == 4"),
        ((torch.randn(1, 3, 8, 8),), {}, r"input.size\(\)\[0\] == 2.*dynamic_shapes="),
        ((1,), {}, r"input.dim\(\) == 4; got input=1"),
        (([torch.randn(2, 3, 8, 8)],), {}, r"input.dim\(\) == 4"),
        ((), {}, r"takes \(input\), missing input"),
        ((torch.randn(2, 3, 8, 8), 1), {}, "got 2 positional inputs"),
        ((torch.randn(2, 3, 8, 8),), {"input": 1}, "'input' twice"),
        ((), {"x": 1}, "'x' is not one of them"),
    ],
)
def test_a_call_that_does_not_fit_says_what_was_expected(args, kwargs, message):
    with pytest.raises(CaptureError, match=message):
        capture(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))(*args, **kwargs)


def test_nested_inputs_are_checked_by_name():
    args = ({"x": torch.randn(2, 3), "pair": [torch.ones(1), torch.zeros(2)]}, 3)
    kwargs = {"extra": [torch.randn(3)]}
    captured = capture(Nested(), args, kwargs)
    swapped = {"pair": args[0]["pair"], "x": args[0]["x"]}
    assert torch.equal(captured(swapped, scale=3, **kwargs), captured(*args, **kwargs))
    with pytest.raises(CaptureError, match="scale == 3"):
        captured(args[0], 4, **kwargs)
    with pytest.raises(CaptureError, match="not nested as at capture"):
        captured({"x": args[0]["x"]}, 3, **kwargs)
    with pytest.raises(CaptureError, match=r"batch\['x'\].size\(\)\[1\] == 3"):
        captured({**args[0], "x": torch.randn(2, 1)}, 3, **kwargs)


def test_what_was_not_given_at_capture_cannot_be_given_later():
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, gain: float = 2.0) -> Tensor:
            return x * gain if mask is None else x * mask * gain

    x = torch.ones(2)
    captured = capture(Masked(), (x, None))
    assert torch.equal(captured(x, None), x * 2)
    with pytest.raises(CaptureError, match=r"mask is None; got x=tensor\(2,\), mask=tensor\(2,\)"):
        captured(x, x)
    with pytest.raises(CaptureError, match="'gain' is not one of them: it was not given at capture"):
        captured(x, None, gain=3.0)


def test_dynamic_sizes_and_the_conditions_on_them():
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 2) if x.shape[0] % 2 == 0 else x

    captured = capture(Even(), torch.randn(4), dynamic_shapes=({0: Dim.AUTO},))
    assert captured(torch.arange(6.0)).shape == (3, 2)
    assert copy.deepcopy(captured)(torch.arange(8.0)).shape == (4, 2)
    for gm in (captured, copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        with pytest.raises(CaptureError, match=r"x.size\(\)\[0\] % 2 == 0; got x=tensor\(5,\)"):
            gm(torch.randn(5))


@pytest.mark.parametrize("batch", [lambda x, y: (x, [y]), lambda x, y: {"y": [y], "x": x}], ids=["positions", "names"])
def test_a_batch_becomes_values_for_the_placeholders_with_tensors_of_their_own(batch):
    class Nested(nn.Module):
        def forward(self, x, y):
            return x - y[0]

    x, y = torch.ones(2), torch.zeros(2)
    captured = capture(Nested(), (x, [y]))
    for graph in (captured, torch.export.export(Nested(), (x, [y])).module()):
        first, second = flat_inputs(graph, batch(x, y))
        first.add_(1)
        assert (first.tolist(), second.tolist(), x.tolist()) == ([2.0, 2.0], [0.0, 0.0], [1.0, 1.0])
