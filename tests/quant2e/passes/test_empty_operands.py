"""Concatenations with empty operands, before and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant2e import capture, quantize
from quant2e.passes import run
from quant2e.passes.empty_operands import drop_empty_operands
from quantizers import XNNPACKQuantizer

aten = torch.ops.aten


class Joined(nn.Module):
    def __init__(self, join) -> None:
        super().__init__()
        self.linear, self.join = nn.Linear(4, 4), join
        self.register_buffer("past", torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, self.linear(x))


JOINS = {
    "a cache": (lambda m, y: torch.cat([m.past, y]), 1, aten.clone.default),
    "an old-style empty tensor": (lambda m, y: torch.cat([torch.empty(0), y, y.relu()], 1), 1, aten.cat.default),
    "slices": (lambda m, y: torch.cat([y[:0], y, y[1:], y[:0]]), 1, aten.cat.default),
    "written afterwards": (lambda m, y: torch.cat([y, m.past]).mul_(2) + y, 1, aten.clone.default),
    "all empty": (lambda m, y: torch.cat([m.past, m.past]).sum() + y, 0, aten.cat.default),
    "another dtype": (lambda m, y: torch.cat([m.past.double(), y]), 0, aten.cat.default),
}


@pytest.mark.parametrize("name", JOINS)
def test_what_is_empty_is_left_out(name):
    join, count, target = JOINS[name]
    torch.manual_seed(0)
    model, x = Joined(join).eval(), torch.randn(3, 4)
    gm = capture(model, (x,))
    assert run(gm, (drop_empty_operands,)).get("drop_empty_operands", 0) == count
    assert next(n for n in gm.graph.nodes if n.name == "cat").target is target
    assert torch.equal(gm(x), model(x))
    assert gm(x).dtype == model(x).dtype


@pytest.mark.parametrize("name", ["a cache", "an old-style empty tensor", "slices"])
def test_the_rest_is_quantized(name):
    torch.manual_seed(0)
    model, x = Joined(JOINS[name][0]).eval(), torch.randn(40, 4)
    quantized = quantize(model, (x,), XNNPACKQuantizer().set_global("w8a8"), calibration_data=[(x,)] * 2)
    assert quantized.report.of("cat").kind == "static"
    assert quantized.report.sqnr_db > 35
