"""Output weights: what does not reach the output counts nothing, and GPTQ is guided to what does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.gptq import gptq
from quant2e.accuracy.algorithms.rounding.output_weights import output_weights
from quant2e.accuracy.algorithms.rounding.weight_layers import quantized_weights
from quant2e.accuracy.output_error import output_sqnr
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import call_of
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.report.algorithm_step import ROLLED_BACK
from tests.quant2e.accuracy.algorithms.rounded import check_conversion, weights_only
from tests.quant2e.accuracy.algorithms.rounding.test_weight_layers import CASES

WIDTH = 16


class Pooled(nn.Module):
    """A layer over positions, and the mean of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 8, bias=False)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True)


def padded(seed: int, batch: int = 4, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of a third of the length, in a few directions, and padding in one other, four times as large."""
    torch.manual_seed(99)
    mix, other = torch.randn(6, WIDTH), torch.randn(1, WIDTH)
    torch.manual_seed(seed)
    counts = torch.zeros(batch, length)
    counts[:, : length // 3] = 1.0
    text, padding = torch.randn(batch, length, 6) @ mix, 4 * torch.randn(batch, length, 1) @ other
    return torch.where(counts.bool().unsqueeze(-1), text, 2 * text + 4 * padding), counts


def calibrated(model: nn.Module, data: list) -> torch.fx.GraphModule:
    captured = quant2e.capture(model.eval(), data[0])
    return quant2e.calibrate(quant2e.prepare_pt2e(captured, weights_only(PerChannelMinMaxObserver)), data)


def found_by(prepared: torch.fx.GraphModule, data: list) -> list:
    simulated = SimulatedGraph(prepared)
    uses = [use for weight in quantized_weights(prepared, simulated) for use in weight.uses]
    found = output_weights(simulated, [call_of(each) for each in data], uses)
    return [found[use.op] for use in uses]


def test_padding_counts_nothing_and_positions_of_one_mean_alike():
    x, counts = padded(0)
    counts[0, :8] = 1.0  # twice as many positions: each is half of the mean
    torch.manual_seed(0)
    ((weights,),) = found_by(calibrated(Pooled(), [(x, counts)]), [(x, counts)])
    assert weights.shape == (4 * 12, 1)
    own = weights.reshape(4, 12)
    assert bool((own[counts == 0] == 0).all())
    assert bool((own[counts == 1] > 0).all())
    torch.testing.assert_close(own[0, :8], own[0, :1].expand(8))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_weights_are_the_size_of_the_gradient():
    """f(x) = a · (w x): the gradient at sample i is a_i v, so weights are as |a_i| where v has one direction."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 2000, bias=False)

        def forward(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * a

    data = [(torch.randn(3, WIDTH), torch.tensor([[1.0], [-2.0], [3.0]])) for _ in range(2)]
    (weights,) = found_by(calibrated(Scaled(), data), data)
    for each in weights:  # 4,000 squares of normal numbers: their root is known to one part in 90
        torch.testing.assert_close(each, torch.tensor([[0.5], [1.0], [1.5]]), rtol=0.08, atol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_there_is_one_for_each_sample_and_group(name):
    model, shape = CASES[name]
    torch.manual_seed(0)
    data = [(torch.randn(shape),) for _ in range(2)]
    prepared = calibrated(model, data)
    simulated = SimulatedGraph(prepared)
    for weight in quantized_weights(prepared, simulated):
        (use,) = weight.uses
        found = output_weights(simulated, [call_of(each) for each in data], [use])[use.op]
        samples = list(use.samples(torch.zeros(use.x.meta["val"].shape)))
        assert [each.shape for each in found] == [(sum(s.shape[0] for s in samples), use.groups)] * 2
    check_conversion(prepared, gptq(prepared, data, guided=True), data[0][0])


def test_guided_gptq_rounds_for_what_arrives_at_the_output():
    torch.manual_seed(0)
    model, data, unseen = Pooled(), [padded(i) for i in range(8)], [padded(100 + i) for i in range(8)]
    prepared = calibrated(model, data)
    plain, guided = (quant2e.convert_pt2e(gptq(prepared, data, guided=asked)) for asked in (False, True))
    before, after = output_sqnr(model, plain, unseen), output_sqnr(model, guided, unseen)
    assert after > before + 3.0
    assert torch.equal(gptq(prepared, data, guided=True)(*data[0]), prepared(*data[0]))


class Unread(nn.Module):
    """A layer from which the output's only float value comes by way of an index."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).argmax(-1)


def test_a_model_without_a_float_output_is_refused_and_rolled_back():
    data = [(torch.randn(4, WIDTH),) for _ in range(3)]
    with pytest.raises(Quant2eError, match="no float output"):
        gptq(calibrated(Unread(), data), data, guided=True)
    quantizer = weights_only(PerChannelMinMaxObserver, -128, 127)
    (step,) = quant2e.quantize(
        Unread().eval(), data[0], quantizer, data, algorithms=[{"gptq": {"guided": True}}]
    ).report.algorithms
    assert step.outcome == ROLLED_BACK
    assert "no float output" in step.reason


class Aside(nn.Module):
    """A layer whose result the output does not rest on, beside one on which it does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + (self.two(x) > 0)


def test_samples_of_a_layer_that_nothing_rests_on_count_alike():
    data = [(torch.randn(5, WIDTH),)]
    one, two = found_by(calibrated(Aside(), data), data)
    assert torch.equal(two[0], torch.ones(5, 1))
    assert not torch.equal(one[0], torch.ones(5, 1))
