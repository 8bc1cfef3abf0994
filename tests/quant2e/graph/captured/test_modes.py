"""Switching a captured graph between training and evaluation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant2e.errors import CaptureError
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.modes import check_eval, is_training_graph, training_nodes
from quant2e.graph.captured.module import (
    allow_exported_model_train_eval,
    copy_graph,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)


class Modes(nn.Module):
    """Every kind of literal that depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.07)
        self.again = nn.BatchNorm2d(4, affine=False)
        self.batch_only = nn.BatchNorm2d(4, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = self.batch_only(self.again(self.norm(x)))
        x = F.dropout(F.relu(x), 0.31, self.training)
        x = F.dropout2d(self.instance(x), 0.2, self.training)
        x = F.rrelu(F.alpha_dropout(x, 0.1, self.training), training=self.training)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.15 if self.training else 0.0)


X = torch.randn(2, 3, 8, 8)


def captured(*, training: bool) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return capture(Modes().train(training), X)


@pytest.mark.parametrize("training", [True, False])
def test_a_round_trip_leaves_the_text_as_it_was(training):
    gm = captured(training=training)
    text, code = str(gm.graph), gm.code
    assert gm.training is training
    gm.train(not training)
    assert str(gm.graph) != text
    assert gm.training is not training
    assert gm.train(training) is gm
    assert (str(gm.graph), gm.code) == (text, code)


def test_eval_of_a_training_graph_is_the_eval_graph_in_every_literal():
    switched, direct = captured(training=True).eval(), captured(training=False)
    assert switched.code == direct.code
    assert torch.equal(switched(X), direct(X))


def test_train_of_an_eval_graph_counts_batches_and_updates_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.07)).eval()
    gm = copy.deepcopy(capture(model, X)).train()
    twin = copy.deepcopy(model).train()
    for _ in range(3):
        assert torch.equal(gm(X), twin(X))
    assert all(torch.equal(gm.state_dict()[n], t) for n, t in twin.state_dict().items())
    assert gm.state_dict()["1.num_batches_tracked"] == 3


def test_a_norm_called_twice_counts_twice():
    gm = captured(training=False).train()
    gm(X)
    assert gm.get_buffer("norm.num_batches_tracked") == 2
    assert gm.get_buffer("again.num_batches_tracked") == 1
    assert gm.get_buffer("instance.num_batches_tracked") == 0  # as in eager: instance norms do not count
    gm.eval()(X)
    assert gm.get_buffer("norm.num_batches_tracked") == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy_graph, lambda gm: pickle.loads(pickle.dumps(gm))])
def test_a_copy_switches_its_own_graph(duplicate):
    gm = captured(training=True)
    text = str(gm.graph)
    twin = duplicate(gm)
    twin.eval()
    assert str(gm.graph) == text
    assert gm.training
    assert not is_training_graph(twin)
    assert duplicate(twin).training is False
    assert str(duplicate(twin).train().graph) == text


def test_bodies_of_control_flow_switch_too():
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: F.dropout(x, 0.5, self.training), lambda x: x - 1, (x,))

    gm = capture(Branch().train(), torch.ones(100))
    assert [str(n.target) for n in training_nodes(gm)] == ["aten.dropout.default"]
    assert torch.equal(gm.eval()(torch.ones(100)), torch.ones(100))
    assert gm.train()(torch.ones(100)).max() == 2


def test_a_training_graph_is_refused_by_name():
    with pytest.raises(CaptureError) as error:
        check_eval(captured(training=True))
    text = str(error.value)
    assert "call model.eval() before capture, or captured.eval() now" in text
    assert "'batch_norm' (aten.batch_norm.default) in module 'norm'" in text
    assert "and 4 more" in text
    check_eval(captured(training=True).eval())
    check_eval(capture(nn.Linear(3, 3).train(), torch.ones(1, 3)))  # nothing in it depends on the mode


class Recurrent(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, num_layers=2, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.gru(x)[0], 0.0, self.training)


def test_dropping_out_nothing_is_no_training():
    x = torch.ones(3, 2, 4)
    check_eval(capture(Recurrent(0.0).train(), x))
    with pytest.raises(CaptureError, match="'gru'"):
        check_eval(capture(Recurrent(0.1).train(), x))


def test_batch_statistics_in_both_modes_are_not_training():
    gm = capture(nn.BatchNorm2d(3, track_running_stats=False).eval(), X)
    text = str(gm.graph)
    check_eval(gm)
    assert str(gm.train().graph) == text


def test_modules_from_elsewhere_learn_to_switch():
    gm = torch.export.export(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), (X,)).module()
    with pytest.raises(NotImplementedError):
        gm.eval()
    assert allow_exported_model_train_eval(gm) is gm
    assert move_exported_model_to_eval(gm) is gm
    assert not is_training_graph(gm)
    assert torch.equal(gm(X), gm(X))
    assert is_training_graph(move_exported_model_to_train(copy.deepcopy(gm)))
    assert not is_training_graph(gm)
