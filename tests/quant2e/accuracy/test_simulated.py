"""Simulated quantization: with every point on it is the converted graph, with none the float model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import CalibrationError, Quant2eError
from quantizers.embedding import EmbeddingQuantizer
from quantizers.x86 import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


class Block(nn.Module):
    """A token embedding, a product of two activations, a residual, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(32, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        y = torch.relu(self.first(x)) + x
        scores = torch.matmul(y, x.transpose(-1, -2)).softmax(-1)
        return self.second(torch.cat([scores @ y, y], -1))


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (2, 6), generator=generator) for _ in range(4)]


def prepared(quantizer) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    graph = quant2e.prepare_pt2e(quant2e.capture(Block().eval(), (batches()[0],)), quantizer)
    return quant2e.calibrate(graph, batches())


QUANTIZERS = {
    "xnnpack static": lambda: XNNPACKQuantizer().set_global(get_symmetric_quantization_config()),
    "xnnpack dynamic": lambda: XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_dynamic=True, is_per_channel=True)
    ),
    "x86 static": lambda: X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()),
    "embedding": EmbeddingQuantizer,
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_all_points_are_the_converted_graph_and_none_are_float(name):
    graph = prepared(QUANTIZERS[name]())
    simulated, x = SimulatedGraph(graph), batches()[1]
    torch.manual_seed(0)
    assert torch.equal(simulated(x), Block().eval()(x))
    converted = quant2e.convert_pt2e(graph)
    with simulated.rounding(frozenset(simulated.points)):
        assert torch.equal(simulated(x), converted(x))
    assert torch.equal(simulated(x), graph(x))


def test_one_point_alone():
    graph = prepared(QUANTIZERS["x86 static"]())
    simulated, x = SimulatedGraph(graph), batches()[1]
    exact = simulated(x)
    changed = 0
    for point in simulated.points:
        with simulated.rounding({point}):
            changed += not torch.equal(simulated(x), exact)
    assert changed == len(simulated.points)


def test_the_prepared_graph_is_left_as_it_is():
    graph = prepared(QUANTIZERS["xnnpack static"]())
    before, code = {k: v.clone() for k, v in graph.state_dict().items()}, graph.code
    simulated = SimulatedGraph(graph)
    with simulated.rounding(frozenset(simulated.points)):
        simulated(batches()[0])
    assert graph.code == code
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())


def test_what_is_no_calibrated_graph_is_refused():
    captured = quant2e.capture(Block().eval(), (batches()[0],))
    with pytest.raises(Quant2eError, match="no observers"):
        SimulatedGraph(captured)
    with pytest.raises(CalibrationError, match="saw no data"):
        SimulatedGraph(quant2e.prepare_pt2e(captured, QUANTIZERS["x86 static"]()))


def test_what_is_being_trained_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    captured = quant2e.capture(model, (torch.randn(2, 3, 8, 8),))
    config = get_symmetric_quantization_config(is_qat=True)
    with pytest.raises(Quant2eError, match="prepared for training"):
        SimulatedGraph(quant2e.prepare_qat_pt2e(captured, XNNPACKQuantizer().set_global(config)))
