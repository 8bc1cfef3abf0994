"""Weight layers: rows of the weight times samples of the input are what the op computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import quant2e
from quant2e.accuracy.algorithms.rounding.weight_layers import quantized_weights
from quant2e.accuracy.lock_step import in_lock_step
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.graph.captured.calls import call_of
from quant2e.observers.measuring import PerChannelMinMaxObserver
from tests.quant2e.accuracy.algorithms.rounded import weights_only

CASES = {
    "linear": (nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 8, 7)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 2, 8, 9)),
    "one image": (nn.Conv2d(2, 3, 3), (2, 8, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, stride=2), (2, 2, 4, 6, 4)),
}


class Products(nn.Module):
    """``x @ w`` and ``addmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(s)) for s in ((6, 4), (4, 3), (3,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.b, x @ self.w, self.v)


CASES["matmul and addmm"] = (Products(), (5, 6))


@pytest.mark.parametrize("name", CASES)
def test_rows_times_samples_are_the_result(name):
    model, shape = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    prepared = quant2e.prepare_pt2e(quant2e.capture(model.eval(), (x,)), weights_only(PerChannelMinMaxObserver))
    simulated = SimulatedGraph(prepared)
    weights = quantized_weights(prepared, simulated)
    assert weights
    seen = []

    def check(weight):
        (use,) = weight.uses

        def visit(rounded, exact):
            x, w = exact[0].tensor(use.x), exact[0].tensor(use.point)
            samples = torch.cat(list(use.samples(x)))
            assert len(list(use.samples(x))) == use.images(x)
            found = torch.einsum("ngc,grc->ngr", samples, use.rows(w))
            bias = exact[0].tensor(use.bias())
            found = found if bias is None else found + bias.reshape(found.shape[1:])
            wanted = exact[0].run_node(use.op)
            if w.dim() > 2:  # channels last, as samples have them
                wanted = wanted.reshape(-1, *wanted.shape[1 - w.dim() :]).movedim(1, -1)
            torch.testing.assert_close(found.flatten(), wanted.flatten(), atol=1e-5, rtol=1e-4)
            assert torch.equal(use.weight(use.rows(w), w.shape), w)
            seen.append(weight)

        return visit

    visits = {weight.uses[0].op: check(weight) for weight in weights}
    in_lock_step(simulated, [call_of(x)], visits, also_float=True)
    assert seen == weights


class Others(nn.Module):
    """A table, a transposed convolution, and a product of two constants' kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(8, 4), nn.ConvTranspose1d(4, 4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.up(self.table(ids).transpose(1, 2)))


def test_what_cannot_be_rounded_says_why():
    ids = torch.arange(8).reshape(2, 4)
    prepared = quant2e.prepare_pt2e(quant2e.capture(Others().eval(), (ids,)), weights_only(PerChannelMinMaxObserver))
    reasons = [weight.reason for weight in quantized_weights(prepared, SimulatedGraph(prepared))]
    assert any("looked up alone" in reason for reason in reasons)
    assert any("transposed convolution" in reason for reason in reasons)


class Tied(nn.Module):
    """One weight, read twice, and a state that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.mean(0))
        return self.two(torch.relu(self.one(x + self.seen)))


def test_tied_weights_are_one_and_a_state_begins_anew():
    batches = [torch.randn(4, 8) for _ in range(3)]
    prepared = quant2e.prepare_pt2e(
        quant2e.capture(Tied().eval(), (batches[0],)), weights_only(PerChannelMinMaxObserver)
    )
    simulated = SimulatedGraph(prepared)
    (weight,) = quantized_weights(prepared, simulated)
    assert len(weight.uses) == 2
    found = []

    def visit(rounded, exact):
        assert not exact
        found.extend(run.tensor(weight.uses[1].x).clone() for run in rounded)

    in_lock_step(simulated, [call_of(x) for x in batches], {weight.uses[1].op: visit})
    value = simulated.constant(weight.uses[0].point)
    model = Tied().eval()
    for x, y in zip(batches, found, strict=True):
        first = prepared.get_parameter("one.bias")
        assert torch.allclose(y, torch.relu(functional.linear(x + x.mean(0), value, first)), atol=1e-5)
    assert not model.seen.any()
    assert not prepared.get_buffer("seen").any()
