"""``calibrate(compiled=True)``: the observed graph as one compiled program, with the scales of the plain one."""

import pytest
import torch
from torch import nn

import quant2e
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


@pytest.mark.inductor
def test_the_same_statistics_without_leaving_the_compiled_graph():
    layers = [part for _ in range(3) for part in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    captured = quant2e.capture(nn.Sequential(*layers).eval(), (torch.randn(2, 3, 8, 8),))
    batches = [torch.randn(2, 3, 8, 8) * 3**i for i in range(3)]
    batches[1][0, 0, 0, 0] = -float("inf")
    plain, compiled = (quant2e.prepare_pt2e(captured, Convs()) for _ in range(2))
    quant2e.calibrate(plain, batches)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quant2e.calibrate(compiled, batches, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    for name, value in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name
