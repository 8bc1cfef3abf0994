"""Groups of ops: what is fused, shares a scale or a weight moves together, as golden text."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import quant2e
from quant2e.accuracy.op_groups import op_groups, rounded_without
from quant2e.accuracy.simulated import SimulatedGraph
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


def groups(model: nn.Module, x: torch.Tensor, **settings: bool):
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(**settings))
    prepared = quant2e.prepare_pt2e(quant2e.capture(model.eval(), (x,)), quantizer)
    simulated = SimulatedGraph(quant2e.calibrate(prepared, [x]))
    return op_groups(simulated, quant2e.report_of(prepared))


def names(model: nn.Module, x: torch.Tensor, **settings: bool) -> list[str]:
    return [" ".join(group.ops) for group in groups(model, x, **settings)]


def test_an_activation_with_its_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert names(model, torch.randn(1, 3, 8, 8)) == ["conv2d relu", "conv2d_1"]


def test_a_concatenation_with_what_it_joins():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    assert names(Joined(), torch.randn(1, 3, 4, 4)) == ["conv2d conv2d_1 cat", "conv2d_2"]


def test_pooling_shares_the_scale_of_what_it_reads():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    assert names(model, torch.randn(1, 3, 8, 8)) == ["conv2d max_pool2d flatten", "linear"]


def test_layers_that_share_a_weight():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight)

    assert names(Tied(), torch.randn(2, 8), is_dynamic=True, is_per_channel=True) == ["linear linear_1"]


def test_a_point_is_rounded_while_any_group_wants_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    first, middle, last = found = groups(model, torch.randn(2, 8))
    whole = rounded_without(found, ())
    assert whole == first.points | middle.points | last.points
    left = rounded_without(found, (middle,))
    assert {str(point.all_input_nodes[0].target) for point in whole - left} == {"1.weight", "1.bias"}
    assert rounded_without(found, found) == frozenset()
