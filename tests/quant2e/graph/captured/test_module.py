"""The module around a captured graph, and its copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from quant2e.errors import CaptureError
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.module import CapturedModule, allow_train_eval, copy_graph


class Meter(nn.Module):
    """Stands for an observer: a module with a statistic, called by the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("peak", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.peak = torch.maximum(self.peak, x.detach().abs().max().reshape(1))
        return x


def metered() -> CapturedModule:
    """Linear, with one meter under two names on its input and its output."""
    gm = capture(nn.Linear(3, 3), torch.ones(1, 3))
    gm.first = gm.second = Meter()
    *_, linear, output = gm.graph.nodes
    with gm.graph.inserting_before(linear):
        before = gm.graph.call_module("first", (linear.args[0],))
    linear.update_arg(0, before)
    with gm.graph.inserting_after(linear):
        after = gm.graph.call_module("second", (linear,))
    output.args = ((after,),)
    gm.recompile()
    return gm


@pytest.mark.parametrize("duplicate", [copy_graph, copy.copy, copy.deepcopy])
def test_submodules_are_new_objects_and_shared_ones_stay_shared(duplicate):
    gm = metered()
    gm(torch.ones(1, 3))
    twin = duplicate(gm)
    assert twin.first is twin.second
    assert twin.first is not gm.first
    assert torch.equal(twin.first.peak, gm.first.peak)
    twin.eval()
    assert gm.first.training
    assert not twin.first.training
    twin(torch.full((1, 3), 100.0))
    assert twin.first.peak >= 100
    assert gm.first.peak < 100


def test_a_deep_copy_shares_no_tensor_and_keeps_ties():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.table = torch.ones(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.table

    gm = capture(Tied(), torch.ones(1, 3))
    twin = copy.deepcopy(gm)
    assert twin.a.weight is not gm.a.weight
    assert len(list(twin.parameters())) == len(list(gm.parameters())) == 3
    assert twin.table is not gm.table
    assert "table" not in twin.state_dict()
    assert copy_graph(gm).table is gm.table
    with torch.no_grad():
        twin.a.weight.zero_()
    assert gm.a.weight.abs().sum() > 0
    both = copy.deepcopy([gm, gm])
    assert both[0] is both[1]


@pytest.mark.parametrize("duplicate", [copy_graph, copy.copy, copy.deepcopy])
def test_attributes_of_the_user_and_metadata_come_along(duplicate):
    gm = capture(nn.Linear(3, 3), torch.ones(1, 3))
    gm.note = {"a": [1]}
    gm.meta["plan"] = ["x"]
    twin = duplicate(gm)
    assert twin.note == {"a": [1]}
    assert twin.meta["plan"] == ["x"]
    assert twin.inputs == gm.inputs
    twin.meta["own"] = 1
    assert "own" not in gm.meta
    with pytest.raises(CaptureError):
        twin(torch.ones(2, 3))


def test_edits_of_a_copy_do_not_reach_the_original():
    gm = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.ones(1, 3))
    twin = copy_graph(gm)
    text = str(gm.graph)
    *_, relu, _ = twin.graph.nodes
    relu.target = torch.ops.aten.neg.default
    twin.recompile()
    twin.register_parameter("extra", nn.Parameter(torch.ones(1)))
    del twin.get_submodule("0")._parameters["weight"]
    assert str(gm.graph) == text
    assert list(gm.state_dict()) == ["0.weight", "0.bias"]


def test_any_graph_of_aten_ops_can_be_given_train_and_eval():
    exported = torch.export.export(nn.Dropout(0.5), (torch.ones(100),)).module()
    gm = torch.fx.GraphModule(exported, exported.graph)
    assert allow_train_eval(gm) is gm
    assert torch.equal(gm.eval()(torch.ones(100)), torch.ones(100))
    assert gm.train()(torch.ones(100)).max() == 2
    assert copy.deepcopy(gm).eval()(torch.ones(100)).max() == 1
    assert allow_train_eval(gm) is gm


def test_strict_export_takes_a_captured_module():
    gm = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), torch.ones(1, 3))
    program = torch.export.export(gm, (torch.ones(1, 3),), strict=True)
    assert torch.equal(program.module()(torch.ones(1, 3)), gm(torch.ones(1, 3)))
