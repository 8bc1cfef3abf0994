"""What graphs spell out: the tanh form of gelu, and ops that do nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowering.native.units.spelled_out import read_spelled_out
from quant2e import capture

aten = torch.ops.aten
ROOT = math.sqrt(2 / math.pi)

GELUS = {
    "GPT-2": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    "rounded": lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * (0.044715 * torch.pow(x, 3.0) + x))),
}
OTHERS = {
    "another constant": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.0447 * torch.pow(x, 3.0)))),
    "another power": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 2.0)))),
    "of two tensors": lambda x: 0.5 * x.flip(0) * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
}


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        return y


@pytest.mark.parametrize("name", [*GELUS, *OTHERS])
def test_gelu_is_one_op_where_it_is_gelu(name):
    x = torch.linspace(-6, 6, 400).view(20, 20)
    gm = capture(Model({**GELUS, **OTHERS}[name]), (x,))
    before = gm(x)
    read_spelled_out(gm)
    gm.recompile()
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert (targets == [aten.gelu.default]) == (name in GELUS)
    torch.testing.assert_close(gm(x), before)


def test_conversions_to_the_dtype_that_is_there_are_left_out():
    gm = capture(Model(lambda x: x.to(torch.float32).sin().to(torch.float64).to(x.device)), (torch.randn(3, 4),))
    read_spelled_out(gm)
    gm.recompile()
    converted = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is not aten.sin.default]
    assert len(converted) == 1
    y = gm(torch.ones(3, 4))
    assert (y[0] if isinstance(y, list | tuple) else y).dtype is torch.float64
