"""``calibrate(compiled=True)``: the observed graph as one compiled program; what is observed counts as in the plain one."""

import pytest
import torch
from torch import nn
from torch._inductor.graph import GraphLowering

import quant2e
from quant2e import native
from quant2e.observer import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from quant2e.quantizer import Quantizer
from quant2e.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec


class Convs(Quantizer):
    """Input of every conv by its own kind of observer, in turn."""

    def annotate(self, model):
        kinds = iter((MinMaxObserver, HistogramObserver.with_args(bins=128), MovingAverageMinMaxObserver))
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.conv2d.default:
                spec = QuantizationSpec(torch.int8, next(kinds), -128, 127, torch.per_tensor_affine)
                node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map={node.args[0]: spec})
        return model

    def validate(self, model):
        pass


def whole_numbers(net):
    """Weights of -1, 0 and 1: with whole inputs every sum is exact, in whatever order a kernel adds."""
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randint(-1, 2, value.shape))
    return net.eval()


@pytest.fixture
def captured():
    torch.manual_seed(0)
    layers = [part for _ in range(3) for part in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    return quant2e.capture(whole_numbers(nn.Sequential(*layers)), (torch.zeros(2, 3, 8, 8),))


@pytest.mark.inductor
def test_the_same_statistics_without_leaving_the_compiled_graph(captured, monkeypatch):
    """Bit for bit when the float ops give the same bits, NaN included, in one program that calls the ops that observe."""
    batches = [torch.randint(-9, 10, (2, 3, 8, 8)) * 3.0**i for i in range(3)]
    batches[1][0, 0, 0, 0] = -float("inf")
    plain, compiled = (quant2e.prepare_pt2e(captured, Convs()) for _ in range(2))
    quant2e.calibrate(plain, batches)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    programs = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(programs.append))
    quant2e.calibrate(compiled, batches, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    if native.loaded() is not None:
        (program,) = programs
        for op, times in {"observe_minmax": 1, "observe_histogram": 1, "observe_average": 1}.items():
            assert program.count(f"torch.ops.quant2e.{op}.default(") == times
    for name, value in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_convolutions_decide_the_memory_layout(groups, monkeypatch):
    chosen = []

    def compile_nothing(model, *, dynamic, options):
        chosen.append((dynamic, options))
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=groups)).eval()
    inputs = (torch.randn(1, 3, 8, 8),)
    quant2e.calibrate(quant2e.prepare_pt2e(quant2e.capture(net, inputs), Convs()), [inputs], compiled=True)
    assert chosen == [(False, {"layout_optimization": groups > 1})]
