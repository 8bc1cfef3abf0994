"""Pools, sums, joints and tables as steps of a region, on every instruction set: the integers of the Q/DQ graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering.native.cut
from lowering import to_native
from lowering.native.kernels.op import instruction_sets, load_region_op
from tests.lowering.graphs import Weight, on_grid

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler, so there are no kernels")

X, Y, Z = (0.0213, -7), (0.1137, 11), (0.0519, -20)


class Net(nn.Module):
    """``body`` of two images of bytes with 20 channels, ``y`` as a convolution makes it and ``x``; rounded by ``Z``."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.body = Weight(torch.randn(20, 20, 1, 1)), body

    def forward(self, x: Tensor) -> Tensor:
        x = on_grid(x, X)
        return on_grid(self.body(on_grid(F.conv2d(x, self.weight()), Y), x), Z)


# body, and whether every integer is that of the graph: floats are added up in another order
TABLE: dict[str, tuple[Callable[..., Any], bool]] = {
    "largest": (lambda y, x: on_grid(F.max_pool2d(y, 3, 2, 1), Y), True),
    "largest, dilated": (lambda y, x: on_grid(F.max_pool2d(y, (2, 3), 1, (0, 1), (3, 1)), Y), True),
    "average": (lambda y, x: F.avg_pool2d(y, 3, 2, 1), False),
    "average of what is inside": (lambda y, x: F.avg_pool2d(y, (3, 2), 2, 1, count_include_pad=False), False),
    "average, divided by 5": (lambda y, x: F.avg_pool2d(y, 2, divisor_override=5), False),
    "adaptive": (lambda y, x: F.adaptive_avg_pool2d(y, (3, 2)), False),
    "mean": (lambda y, x: y.mean([2, 3], keepdim=True), False),
    "sum": (lambda y, x: y + x, False),
    "difference, relu": (lambda y, x: F.relu(y - x), False),
    "product by channel": (lambda y, x: y * on_grid(x.mean([2, 3], keepdim=True).sigmoid(), X), False),
    "product, hardswish": (lambda y, x: F.hardswish(y * x), False),
    "joint": (lambda y, x: torch.cat([y, x, y], 1), False),
    "table": (lambda y, x: F.silu(y), False),
    "floats between": (lambda y, x: F.gelu(y + x) + x, False),
}


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize(("body", "exact"), TABLE.values(), ids=TABLE)
def test_a_step_writes_the_integers_of_the_graph(body, exact, name, monkeypatch):
    x = torch.randn(2, 20, 9, 8, generator=torch.Generator().manual_seed(1))
    net = Net(body)
    monkeypatch.setattr(lowering.native.cut, "load_region_op", lambda: load_region_op(name))
    program = to_native(torch.export.export(net, (x,)).module(), (x,), verify=False)
    assert program.report.leftovers == ()
    with torch.no_grad():
        apart = torch.round((program(x) - net(x)) / Z[0]).abs()
    assert float(apart.max()) <= int(not exact)
    assert float((apart > 0).double().mean()) < 0.005
