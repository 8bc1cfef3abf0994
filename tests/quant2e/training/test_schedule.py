"""Schedules: what is switched at which step, resuming, and everything that would change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e import Schedule
from quant2e.errors import Quant2eError
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared(norm=True, is_qat=True):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4)] if norm else []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat)
    quantizer = XNNPACKQuantizer().set_global(config)
    graph = quant2e.capture(model.train(is_qat), (X,))
    return (quant2e.prepare_qat_pt2e if is_qat else quant2e.prepare_pt2e)(graph, quantizer)


def switches(model):
    made = [module for module in model.modules() if isinstance(module, quant2e.FakeQuantizeBase)]
    return {(int(module.observer_enabled), int(module.fake_quant_enabled)) for module in made}


def test_each_action_happens_at_its_step():
    model = prepared()
    schedule = Schedule(
        model,
        {0: "disable_fake_quant", 2: quant2e.enable_fake_quant, 4: ("disable_observer", quant2e.freeze_batch_norm)},
    )
    found = {}
    for step in range(6):
        done = schedule(step)
        model(X)
        found[step] = done, switches(model)
    assert found == {
        0: (("disable_fake_quant",), {(1, 0)}),
        1: ((), {(1, 0)}),
        2: (("enable_fake_quant",), {(1, 1)}),
        3: ((), {(1, 1)}),
        4: (("disable_observer", "freeze_batch_norm"), {(0, 1)}),
        5: ((), {(0, 1)}),
    }
    assert schedule.pending == {}
    mean = next(value for name, value in model.named_buffers() if name.endswith("running_mean")).clone()
    model(X + 5)
    assert torch.equal(mean, next(value for name, value in model.named_buffers() if name.endswith("running_mean")))


def test_steps_may_be_left_out_and_wrappers_are_seen_through():
    model = prepared()
    schedule = Schedule(nn.DataParallel(model), {3: "disable_fake_quant", 7: "disable_observer"})
    assert schedule(0) == ()
    assert schedule.pending == {3: ("disable_fake_quant",), 7: ("disable_observer",)}
    assert schedule(5) == ("disable_fake_quant",)
    assert schedule(9) == ("disable_observer",)
    assert switches(model) == {(0, 0)}


def test_a_resumed_training_catches_up():
    model, actions = prepared(), {2: "disable_observer", 3: "freeze_batch_norm"}
    model(X)
    model.apply(quant2e.disable_observer)  # from a checkpoint, which holds the switches and no frozen norms
    schedule = Schedule(model, actions)
    assert schedule(10) == ("disable_observer", "freeze_batch_norm")
    assert schedule(11) == ()


CHANGES_NOTHING = [
    (lambda: Schedule(prepared(norm=False), {5: "freeze_batch_norm"}), "no batch norm"),
    (lambda: Schedule(prepared(), {5: "enable_range_learning"}), "no learned range"),
    (lambda: Schedule(prepared(is_qat=False), {5: "disable_observer"}), "no fake-quantizer"),
    (lambda: Schedule(prepared(), {0: "enable_fake_quant"})(0), "in that state already"),
    (lambda: Schedule(prepared(), {0: ("disable_observer", "disable_observer")})(0), "in that state already"),
    (lambda: Schedule(prepared(), {}), "without actions"),
]


@pytest.mark.parametrize(("call", "said"), CHANGES_NOTHING)
def test_what_changes_nothing_raises(call, said):
    with pytest.raises(Quant2eError, match=said):
        call()


def test_what_is_wrong_raises():
    with pytest.raises(Quant2eError, match="did you mean 'freeze_batch_norm'"):
        Schedule(prepared(), {0: "freeze_batchnorm"})
    with pytest.raises(Quant2eError, match="is no action"):
        Schedule(prepared(), {0: lambda module: None})
    with pytest.raises(Quant2eError, match="whole numbers"):
        Schedule(prepared(), {-1: "disable_observer"})
    schedule = Schedule(prepared(), {3: "disable_observer"})
    schedule(2)
    with pytest.raises(Quant2eError, match="goes forward"):
        schedule(1)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1])
def test_a_step_that_is_none_is_refused(step):
    schedule = Schedule(prepared(), {3: "disable_observer"})
    with pytest.raises(Quant2eError, match="whole numbers from 0 on"):
        schedule(step)


def test_a_step_without_actions_is_refused():
    with pytest.raises(Quant2eError, match="without actions changes nothing"):
        Schedule(nn.Linear(2, 2), {0: (), 3: "disable_observer"})
