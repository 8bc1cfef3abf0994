"""Learned biases: the output comes closer where it rests on a bias, and nothing else of the graph changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms.correct_bias import correct_bias
from quant2e.accuracy.algorithms.gptq import gptq
from quant2e.accuracy.algorithms.learn_biases import LearnedBiases, learn_biases
from quant2e.accuracy.output_error import output_sqnr
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.report.algorithm_step import KEPT, ROLLED_BACK
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quant2e.accuracy.algorithms.hard_nets import depthwise, images, post_norm, tokens
from tests.quant2e.accuracy.algorithms.rounded import weights_only
from tests.quant2e.accuracy.algorithms.test_correct_bias import LAYERS, batches, coarse, mean_error, prepared


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_of_one_layer_it_is_the_mean_of_the_error(name, bias):
    make, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    model, data = make(bias).eval(), batches(*shape)
    captured, graph = prepared(model, data, coarse())
    state = {key: value.clone() for key, value in graph.state_dict().items()}
    assert all(p.requires_grad for p in model.parameters())
    learned = learn_biases(graph, data, iterations=200, rate=0.02)
    before, after = (mean_error(captured, quant2e.convert_pt2e(each), data, axis) for each in (graph, learned))
    assert after < max(0.1 * before, 0.01)
    assert all(torch.equal(value, state[key]) for key, value in graph.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in (*model.parameters(), *graph.parameters()))
    assert not torch.equal(learned(data[0]), graph(data[0]))
    assert any("learn_biases" in note and "deviation" in note for note in quant2e.report_of(learned).notes)


class Pooled(nn.Module):
    """A layer over positions, and the mean of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True)


def padded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two positions that count, and six, with other values, that do not."""
    torch.manual_seed(seed)
    x, counts = torch.rand(16, 8, 8) + 0.5, torch.zeros(16, 8)
    counts[:, :2] = 1.0
    return torch.where(counts.bool().unsqueeze(-1), x, -3.0 * x), counts


def test_what_does_not_reach_the_output_does_not_count():
    torch.manual_seed(0)
    model, data, unseen = Pooled().eval(), [padded(i) for i in range(4)], [padded(100 + i) for i in range(4)]
    graph = quant2e.prepare_pt2e(quant2e.capture(model, data[0]), coarse())
    graph = quant2e.calibrate(graph, data)
    by_mean, learned = correct_bias(graph, data), learn_biases(graph, data, iterations=100, rate=0.02)
    plain, mean, ours = (output_sqnr(model, quant2e.convert_pt2e(g), unseen) for g in (graph, by_mean, learned))
    assert ours > plain + 6.0
    assert ours > mean + 6.0


NETS = {
    "post-norm, hard": (post_norm(hard=True), tokens(16), {}, 0.8),
    "depthwise, 4 bits": (depthwise(hard=False), images(16), {"weight_qmin": -7, "weight_qmax": 7}, 2.0),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_gain_on_data_that_they_did_not_see(name):
    model, data, weights, gain = NETS[name]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **weights))
    graph = quant2e.calibrate(quant2e.prepare_pt2e(quant2e.capture(model, data[0]), quantizer), data[:8])
    learned = learn_biases(graph, data[:8])
    before, after = (output_sqnr(model, quant2e.convert_pt2e(each), data[8:]) for each in (graph, learned))
    assert after > before + gain
    again = learn_biases(graph, data[:8])
    assert torch.equal(again(data[0]), learned(data[0]))


def test_in_one_call_it_is_kept_converts_and_is_saved(tmp_path):
    model, data, weights, _ = NETS["depthwise, 4 bits"]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, **weights))
    result = quant2e.quantize(model, data[0], quantizer, data, algorithms=["learn_biases"])
    (step,) = result.report.algorithms
    assert step.outcome == KEPT
    assert step.after_db > step.before_db + 1.0
    assert result.report.int8_mac_share > 0.9
    quant2e.save(result, tmp_path / "model.pt2")
    assert torch.equal(quant2e.load(tmp_path / "model.pt2")(data[0]), result(data[0]))


class Counter(nn.Module):
    """What a layer makes is added to a state."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        self.seen.add_(y.mean(0))
        return self.two(torch.relu(y + self.seen))


class Branch(nn.Module):
    """A layer in the body of a condition, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.inside, self.two = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        return self.two(torch.cond(y.sum() > 0, self.inside, lambda y: y * 1.0, [y]))


@pytest.mark.parametrize("model", [Counter, Branch])
def test_a_state_and_a_body_stay_as_they_are(model):
    torch.manual_seed(0)
    data = [torch.randn(4, 8) for _ in range(3)]
    _, graph = prepared(model().eval(), data, weights_only(PerChannelMinMaxObserver))
    before = {name: value.clone() for name, value in graph.named_buffers()}
    for changed in (learn_biases(graph, data), gptq(graph, data, guided=True)):
        assert all(torch.equal(value, before[name]) for name, value in graph.named_buffers())
        assert all(torch.equal(value, before[name]) for name, value in changed.named_buffers() if name == "seen")
        assert bool(torch.isfinite(quant2e.convert_pt2e(changed)(data[0])).all())


class Index(nn.Module):
    """No float comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).argmax(-1)


def test_what_cannot_be_is_refused():
    data = [torch.randn(4, 8) for _ in range(3)]
    _, graph = prepared(Index().eval(), data, coarse())
    with pytest.raises(Quant2eError, match="rests on a bias"):
        learn_biases(graph, data)
    with pytest.raises(CalibrationError, match="at least one batch"):
        learn_biases(graph, [])
    with pytest.raises(Quant2eError, match="prepare_pt2e"):
        learn_biases(quant2e.convert_pt2e(graph), data)
    with pytest.raises(Quant2eError, match="iterations"):
        LearnedBiases(iterations=0)
    with pytest.raises(Quant2eError, match="rate"):
        LearnedBiases(rate=0.0)
    (step,) = quant2e.quantize(
        Index().eval(), data[0], coarse(), data, algorithms=["learn_biases"], min_sqnr_db=None
    ).report.algorithms
    assert step.outcome == ROLLED_BACK
    assert "rests on a bias" in step.reason
