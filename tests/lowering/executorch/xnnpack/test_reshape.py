"""Operands with fewer dimensions than their reader's result, in the real runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowering import to_executorch
from quant2e import quantize
from tests.quant2e.integer.test_graph import xnnpack

IMAGE, ROWS = torch.randn(2, 3, 8, 8), torch.randn(2, 3)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function, image):
        super().__init__()
        self.function = function
        make = (lambda i: nn.Conv2d(i, 4, 1)) if image else (lambda i: nn.Linear(i, 4))
        self.a, self.b = make(3), make(4)
        self.row, self.channels = nn.Parameter(torch.randn(8)), nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x, n):
        return self.b(self.function(self, self.a(x), n))


NUMBER, PAIR = torch.tensor(1.5), torch.tensor([1.5, 1.25])
CASES = {
    "a number, added": (lambda m, x, n: x + n, IMAGE, NUMBER),
    "a number, multiplied": (lambda m, x, n: x * n, IMAGE, NUMBER),
    "a number, to rows": (lambda m, x, n: x + n, ROWS, NUMBER),
    "a number, reshaped": (lambda m, x, n: x + n.reshape(1), IMAGE, NUMBER),
    "one of several": (lambda m, x, n: x + n[-1], IMAGE, PAIR),
    "a row": (lambda m, x, n: x + n, IMAGE, torch.randn(8)),
    "a literal": (lambda m, x, n: (x + 2.0) * n, IMAGE, NUMBER),
    "a row of parameters": (lambda m, x, n: x + m.row * n, IMAGE, NUMBER),
    "channels": (lambda m, x, n: x * m.channels + n, IMAGE, NUMBER),
}


STATIC = ("a number, added", "a number, to rows", "a number, reshaped", "one of several")
DYNAMIC = ("a number, multiplied", "a row", "a literal", "a row of parameters", "channels")


SPELLED = [*((name, False) for name in STATIC), *((name, True) for name in DYNAMIC)]
IN_SHORT = (("a number, added", False), ("a row", True))
"""What runs on every change; the other spellings go the same way."""


@pytest.mark.parametrize(
    ("name", "dynamic"), [pytest.param(*one, marks=() if one in IN_SHORT else pytest.mark.slow) for one in SPELLED]
)
def test_operands_of_fewer_dimensions(name, dynamic):
    function, x, n = CASES[name]
    torch.manual_seed(0)
    model = Between(function, x.dim() == 4).eval()
    quantized = quantize(model, (x, n), xnnpack(is_dynamic=dynamic), [(x, n), (x + 0.1, n + 0.1)])
    program = to_executorch(quantized)
    assert program.report.verification.passed
    assert program.report.verification.sqnr_db > 30
    assert len(program.report.partitions) == 1
