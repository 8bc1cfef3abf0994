"""Re-estimation of batch norms: behind quantized ops, means and deviations are those of the norms again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.algorithms import reestimate_batch_norm
from quant2e.accuracy.output_error import output_sqnr
from quant2e.annotation.specs import QuantizationSpec
from quant2e.errors import Quant2eError
from quant2e.graph.captured.module import copy_graph
from quant2e.observers.encodings import PerChannelEncoding, encode
from quant2e.observers.given import give_encoding, give_integers, integers_given
from quant2e.observers.measuring import MinMaxObserver, PerChannelMinMaxObserver
from quant2e.pipeline import quantize
from quantizers import XNNPACKQuantizer, get_symmetric_quantization_config
from tests.quant2e.annotators import WEIGHT_PER_TENSOR, products

INT2 = QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -2, 1, torch.per_channel_symmetric, ch_axis=0)
"""Two bits: what is left of a weight is much smaller, or larger."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 10, 10, generator=generator) for _ in range(count)]


def net():
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.uniform_(-0.5, 1.0)
                module.momentum = None
        for x in batches(8):
            model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def of_channels(graph, data, name):
    """Mean and deviation of each channel of one op's result."""
    cut = copy_graph(graph)
    node = next(node for node in cut.graph.nodes if node.name == name)
    cut.graph.output_node().args = ((node,),)
    cut.recompile()
    values = torch.cat([cut(x).movedim(1, 0).flatten(1) for x in data], 1)
    return values.mean(1), values.std(1)


@pytest.mark.parametrize("kind", ["static", "weight-only"])
def test_means_and_deviations_come_back(kind):
    model, data = net(), batches()
    captured = quant2e.capture(model, data[0])
    quantizer = products(weight=INT2) if kind == "static" else products(None, INT2, None)
    graph = quant2e.calibrate(quant2e.prepare_pt2e(captured, quantizer), data)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    done = reestimate_batch_norm(graph, data)
    for name in ("conv2d", "conv2d_1"):
        mean, deviation = of_channels(graph, data, name)
        plain, fixed = (of_channels(quant2e.convert_pt2e(each), data, name) for each in (graph, done))
        assert (fixed[0] - mean).abs().max() < 1e-3 < (plain[0] - mean).abs().max()
        assert (fixed[1] / deviation - 1).abs().max() < 1e-2 < (plain[1] / deviation - 1).abs().max()
    before, after = (output_sqnr(captured, quant2e.convert_pt2e(each), batches(6)[4:]) for each in (graph, done))
    assert after > before + 2
    assert len(quant2e.report_of(done).algorithms[0].changes) == 2
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_integers_stay_as_they_are():
    model, data = net(), batches()
    graph = quant2e.calibrate(quant2e.prepare_pt2e(quant2e.capture(model, data[0]), products(weight=INT2)), data)
    call = next(
        node for node in graph.graph.nodes
        if node.op == "call_module" and node.all_input_nodes[0].target == "features.0.weight"
    )  # fmt: skip
    encoding = encode(graph.get_submodule(call.target))
    assert isinstance(encoding, PerChannelEncoding)
    give_encoding(graph, call.target, encoding)
    chosen = torch.randint(-2, 2, (8, 3, 3, 3), dtype=torch.int8)
    give_integers(graph, call, chosen)
    done = reestimate_batch_norm(graph, data)
    again = next(node for node in done.graph.nodes if node.name == call.name)
    assert torch.equal(integers_given(done, again), chosen)
    weights = [quant2e.convert_pt2e(each).state_dict() for each in (graph, done)]
    frozen = [[v for v in each.values() if v.dtype == torch.int8] for each in weights]
    assert len(frozen[0]) == 3
    assert all(map(torch.equal, *frozen))


def test_a_weight_with_one_scale_gets_its_means_back():
    model, data = net(), batches()
    coarse = QuantizationSpec(torch.int8, MinMaxObserver, -4, 3, torch.per_tensor_symmetric)
    graph = quant2e.calibrate(quant2e.prepare_pt2e(quant2e.capture(model, data[0]), products(None, coarse, None)), data)
    done = reestimate_batch_norm(graph, data)
    mean, _ = of_channels(graph, data, "conv2d_1")
    assert (of_channels(quant2e.convert_pt2e(done), data, "conv2d_1")[0] - mean).abs().max() < 1e-3
    assert all("deviations stay" in line for line in quant2e.report_of(done).algorithms[0].changes)


def test_after_another_one_in_one_call(tmp_path):
    asked = ["correct_bias", {"reestimate_batch_norm": {"samples": 64}}]
    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-2, weight_qmax=1)
    )
    result = quantize(net(), batches()[0], quantizer, batches(), algorithms=asked, min_sqnr_db=None)
    first, second = result.report.algorithms
    assert first.outcome == "kept"
    assert second.before_db == first.after_db
    result.save(tmp_path / "m.pt2")
    assert torch.equal(quant2e.load(tmp_path / "m.pt2")(batches()[0]), result(batches()[0]))


def test_without_norms_there_is_nothing_to_do():
    data = [torch.randn(8, 6)]
    graph = quant2e.prepare_pt2e(quant2e.capture(nn.Linear(6, 4).eval(), data[0]), products(weight=WEIGHT_PER_TENSOR))
    done = reestimate_batch_norm(quant2e.calibrate(graph, data), data)
    assert quant2e.report_of(done).algorithms[0].outcome == "no effect"


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_in_training_gets_the_statistics_of_its_quantized_ops(training):
    model, data = net(), batches()
    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True, is_qat=True, weight_qmin=-3, weight_qmax=3)
    )
    graph = quant2e.prepare_qat_pt2e(quant2e.capture(model.train(), data[0]), quantizer)
    with torch.no_grad():
        for x in data:
            graph(x)  # ranges
        for name, buffer in graph.named_buffers():
            if name.endswith("running_mean"):
                buffer += 1.0
    graph.train(training)
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    done = reestimate_batch_norm(graph, data)
    assert done.training is training
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())
    (step,) = quant2e.report_of(done).algorithms
    assert len(step.changes) == 2
    mean, deviation = of_channels(quant2e.convert_pt2e(done), data, "conv2d")
    norm = model.features[1]
    assert (mean - norm.bias).abs().max() < 0.05
    assert (deviation / norm.weight - 1).abs().max() < 0.05
    done.train()
    done(data[0]).sum().backward()  # training goes on


def test_refused():
    data = batches(1)
    with pytest.raises(Quant2eError, match="no observers"):
        reestimate_batch_norm(quant2e.capture(net(), data[0]), data)
    graph = quant2e.prepare_pt2e(quant2e.capture(net(), data[0]), products())
    with pytest.raises(Quant2eError, match="whole number above 0"):
        reestimate_batch_norm(graph, data, samples=0)
    with pytest.raises(Quant2eError, match="no batch"):
        reestimate_batch_norm(graph, [])
