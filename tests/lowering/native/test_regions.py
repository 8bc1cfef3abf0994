"""Regions: which ops run together, what crosses between two regions, and why an op is in none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quant2e
from lowering.inductor.rewrites.graph import private_copy
from lowering.native.cut import WRITES, cut_regions
from lowering.native.kernels.op import load_region_op
from lowering.native.regions import find_units, grouped
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler")


class Halves(nn.Module):
    """Two convolutions that meet behind an op that no step computes: ``between``."""

    def __init__(self, between) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).relu() + self.between(self.second(x)))
        return y


class Inside(nn.Module):
    """What leaves a region and comes back must not be in its own past: two paths, one of them through ``sin``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z: Tensor = self.third(self.second(y).relu() + y.sin())
        return z


def x86():
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def xnnpack():
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config())


def cut(model: nn.Module, x: Tensor, quantizer=None):
    """The graph before and after its regions are cut out, and what the cut says."""
    model = model.eval()
    quantized = quant2e.quantize(model, (x,), quantizer or x86(), [(x,)], progress=False)
    gm = private_copy(quantized.module)
    found = cut_regions(gm)
    gm.recompile()
    return quantized.module, gm, found


def steps_apart(graph, gm, x: Tensor) -> float:
    """The largest difference of the first output, in 255ths of its range."""
    with torch.no_grad():
        wanted, (got, *_) = graph(x), gm(x)
    return float((wanted - got).abs().max() / ((wanted.max() - wanted.min()) / 255))


@pytest.mark.parametrize("quantizer", [x86, xnnpack])
@pytest.mark.parametrize(
    ("between", "regions"),
    [(torch.relu, 1), (F.hardswish, 1), (torch.sin, 2), (lambda x: x.flip(-1), 2)],
    ids=["relu", "hardswish", "sin", "flip"],
)
def test_an_op_without_a_step_ends_a_region(quantizer, between, regions):
    x = torch.randn(2, 3, 9, 7)
    graph, gm, found = cut(Halves(between), x, quantizer())
    assert len(found.regions) == regions
    assert steps_apart(graph, gm, x) < 1e-3


def test_no_region_waits_for_what_is_computed_from_it():
    x = torch.randn(1, 4, 5, 5)
    graph, gm, found = cut(Inside(), x)
    assert len(found.regions) == 2
    assert steps_apart(graph, gm, x) < 1e-3


def test_integers_cross_between_regions_and_nothing_else_reads_them():
    x = torch.randn(2, 3, 8, 8)
    _, gm, found = cut(Halves(torch.sin), x, xnnpack())
    types = {size for region in found.regions for size in region.plan.outputs[1:2]}
    assert types <= {0, 1}
    outside = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert "aten.sin.default" in outside
    assert not [name for name in outside if name.startswith("aten.conv")]


def test_ops_in_no_region_have_a_reason():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.wide = nn.ConvTranspose2d(3, 4, 33, stride=33), nn.Conv3d(1, 2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.up(x), self.wide(x[:, None])

    *_, found = cut(Odd(), torch.randn(1, 3, 6, 6))
    assert found.regions == ()
    assert found.refused["conv_transpose2d"] == "a kernel of 33 x 33"
    assert all(found.refused[name] for name in ("conv_transpose2d", "conv3d") if name in found.refused)


@pytest.mark.parametrize("convolution", [nn.Conv1d(8, 4, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)])
def test_a_convolution_reads_the_moved_rows_of_a_linear_layer_as_integers(convolution):
    """Quantization comes ahead of moves for products of two activations, not for those with a weight."""

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.convolution = nn.Linear(8, 8), convolution

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).transpose(1, 2)
            made: Tensor = self.convolution(y if convolution.weight.dim() == 3 else y.unflatten(2, (4, 3)))
            return made

    x = torch.randn(2, 12, 8)
    graph, gm, found = cut(Moved(), x)
    ops = {node.name for region in found.regions for unit in region.units for node in unit.nodes}
    assert ops & {"conv1d", "conv2d"}
    assert "linear" in ops
    assert steps_apart(graph, gm, x) < 1e-3


def test_a_graph_that_writes_to_its_buffers_keeps_its_ops():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            y: Tensor = self.linear(x)
            return y

    *_, found = cut(Counts(), torch.randn(2, 8))
    assert found.regions == ()
    assert found.refused["linear"] == WRITES


def test_ops_given_to_another_engine_stay_out():
    x = torch.randn(1, 3, 8, 8)
    quantized = quant2e.quantize(Halves(torch.relu).eval(), (x,), x86(), [(x,)], progress=False)
    gm = private_copy(quantized.module)
    found = cut_regions(gm, besides=["conv2d"])
    assert "another engine" in found.refused["conv2d"]
    names = {node.name for region in found.regions for unit in region.units for node in unit.nodes}
    assert "conv2d" not in names
    assert "conv2d_1" in names


def test_hundreds_of_layers_are_one_region():
    net = nn.Sequential(*[part for _ in range(150) for part in (nn.Linear(16, 16), nn.ReLU())]).eval()
    x = torch.randn(3, 16)
    quantized = quant2e.quantize(net, (x,), x86(), [(x,)], progress=False)
    gm = private_copy(quantized.module)
    found = find_units(gm)
    assert [len(units) for units in grouped(gm, found)] == [151]
