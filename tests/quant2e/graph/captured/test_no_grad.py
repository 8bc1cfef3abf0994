"""What ``torch.no_grad()`` covers in a forward: gradients of a captured graph are those of the module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant2e import capture, convert_pt2e, disable_observer, prepare_pt2e, prepare_qat_pt2e
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config

aten = torch.ops.aten


class FrozenBranch(nn.Module):
    """A backbone without gradients, and a head with them; `scale` is read in both."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = torch.relu(self.body(x) * self.scale)
        return self.head(frozen * self.scale + x)


class Spectral(nn.Module):
    """Spectral norm: a power iteration on a buffer, in place and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("u", F.normalize(torch.ones(3), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        with torch.no_grad():
            v = F.normalize(weight.t() @ self.u, dim=0)
            self.u.copy_(F.normalize(weight @ v, dim=0))
        sigma = torch.dot(self.u.clone(), weight @ v)
        return F.linear(x, weight / sigma, self.linear.bias)


class Inner(nn.Module):
    """Gradients inside of a region without, which returns one of its inputs as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            z = torch.sigmoid(y)
            with torch.enable_grad():
                w = self.b(z) * y
            w = w + 0
        return w * 0.5 + y * z


MODELS = [FrozenBranch, Spectral, Inner]


def steps(model: nn.Module, count: int = 3) -> list[dict[str, Tensor | None]]:
    """Gradients of some steps of training."""
    found = []
    for i in range(count):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(i))
        model.zero_grad()
        (model(x) ** 2).mean().backward()
        found.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return found


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("under", [torch.enable_grad, torch.no_grad])
def test_gradients_are_those_of_the_module(make, under):
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(5, 4)
    with under():
        captured = copy.deepcopy(capture(model, (x,)))
    for ours, theirs in zip(steps(captured), steps(model), strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            if gradient is None:
                assert ours[name] is None, name
            else:
                torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize("make", MODELS)
def test_evaluation_detaches_nothing_and_training_comes_back(make):
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    trained, evaluated = capture(make().train(), (x,)), capture(make().eval(), (x,))
    text, plain = str(trained.graph), str(evaluated.graph)
    assert "detached" in text
    assert "detached" not in plain
    assert str(trained.eval().graph) == plain
    assert str(evaluated.train().graph) == text
    assert str(pickle.loads(pickle.dumps(trained)).train().graph) == text
    assert str(copy.deepcopy(evaluated).eval().graph) == plain


def test_calibration_sees_through_the_border():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(capture(FrozenBranch().eval(), (x,)), XNNPACKQuantizer().set_global(config))
    assert "detached" not in str(prepared.graph)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_is_frozen_stays_so_in_training_with_quantization(mode):
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    model = getattr(FrozenBranch(), mode)()
    prepared = prepare_qat_pt2e(capture(model, (x,)), XNNPACKQuantizer().set_global(config)).train()
    gradients = steps(prepared)[-1]
    assert [name for name, gradient in gradients.items() if gradient is None] == ["body.weight", "body.bias"]
    prepared.eval().apply(disable_observer)
    assert "detached" not in str(prepared.graph)
    with torch.no_grad():
        assert torch.equal(convert_pt2e(prepared)(x), prepared(x))
