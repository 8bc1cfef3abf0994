"""``calibrate(compiled=True)``: the observed graph as one compiled program;
what is observed counts as in the plain one.
"""

import pytest
import torch
from torch import nn
from torch._inductor.graph import GraphLowering

import quant2e
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver
from quant2e.observers.native import ops as native


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
    """Bit for bit when the float ops give the same bits, NaN included, in one program that calls the ops that
    observe.
    """
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


def chosen_by(net, inputs, monkeypatch):
    """Options of the compilation, and whether weights become constants of the program."""
    chosen = []

    def compile_nothing(model, *, dynamic, options):
        def run(*args):
            chosen.append((dynamic, options, torch._inductor.config.freezing))
            return model(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    quant2e.calibrate(quant2e.prepare_pt2e(quant2e.capture(net.eval(), inputs), Convs()), [inputs], compiled=True)
    assert torch._inductor.config.freezing is False
    ((dynamic, options, freezing),) = chosen
    assert dynamic is False
    return options, freezing


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_convolutions_decide_the_memory_layout(groups, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=groups))
    assert chosen_by(net, (torch.randn(1, 3, 8, 8),), monkeypatch) == ({"layout_optimization": groups > 1}, False)


@pytest.mark.parametrize(
    ("net", "packed"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), True),
        (nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(2), nn.Linear(4, 8)), True),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 8)), False),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 8)), False),
        (nn.Sequential(nn.Conv2d(3, 6, 3)), False),
    ],
    ids=["linear", "patches", "conv and relu", "two convs", "conv"],
)
def test_weights_are_packed_where_only_linears_change_by_it(net, packed, monkeypatch):
    inputs = (torch.randn(8, 8),) if isinstance(net[0], nn.Linear) else (torch.randn(1, 3, 8, 8),)
    assert chosen_by(net, inputs, monkeypatch)[1] is packed


class Linears(Convs):
    """Input of every linear by a min-max observer, and the last relu by a histogram."""

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                spec = QuantizationSpec(torch.int8, MinMaxObserver, -128, 127, torch.per_tensor_affine)
                node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map={node.args[0]: spec})
            elif node.target is torch.ops.aten.relu.default:
                spec = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, torch.per_tensor_affine)
                node.meta[ANNOTATION] = QuantizationAnnotation(output_qspec=spec)
        return model


@pytest.mark.inductor
@pytest.mark.slow
def test_packed_weights_give_the_same_statistics_and_are_those_of_now(monkeypatch):
    """Infinities that become NaN, other batch sizes and weights that changed since the last calibration included."""
    torch.manual_seed(0)
    net = whole_numbers(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU()))
    captured = quant2e.capture(net, (torch.zeros(4, 16),), dynamic_shapes=({0: torch.export.Dim("rows", max=64)},))
    plain, compiled = (quant2e.prepare_pt2e(captured, Linears()) for _ in range(2))
    batches = [torch.randint(-9, 10, (rows, 16)).float() for rows in (4, 4, 7)]
    batches[1][0, 0] = float("-inf")
    torch._dynamo.reset()
    programs = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(programs.append))
    for run in range(2):
        with torch.no_grad():
            for value in compiled.parameters():  # of both: they are the captured graph's
                value.mul_(run + 1)
        quant2e.calibrate(plain, batches)
        quant2e.calibrate(compiled, batches, compiled=True)
        for name, value in plain.state_dict().items():
            assert torch.equal(compiled.state_dict()[name], value), (run, name)
    if torch._C.has_mkl:
        assert all("mkl_linear" in program for program in programs)
    assert programs
