"""Values that many numbers share are computed once in a compiled program, and the program computes the same."""

import pytest
import torch
from torch import nn
from torch._inductor.graph import GraphLowering

import lowering
import quant2e
from lowering.inductor.rewrites.broadcast import shared_values_first, written_first
from lowering.inductor.rewrites.graph import private_copy
from quantizers import X86InductorQuantizer, get_default_x86_inductor_quantization_config


def written(net, *inputs, **options):
    """Names of the values that are computed before what reads them."""
    gm = private_copy(quant2e.capture(net, inputs, **options))
    before = gm(*inputs)
    shared_values_first(gm)
    gm.graph.lint()
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))
    return [str(node.args[0].target) for node in gm.graph.nodes if node.target is written_first()]


class Masked(nn.Module):
    def forward(self, scores, mask):
        added = torch.where(mask[:, None, None, :] > 0, 0.0, -1e9)
        return (scores + added).softmax(-1), (scores - added.expand(-1, 4, -1, -1)).relu()


def test_a_mask_is_written_where_it_is_broadcast():
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert written(Masked(), torch.randn(1, 4, 5, 5), mask) == ["aten.where.Scalar"]


def test_small_factors_and_equal_sizes_are_left_to_inductor():
    class Net(nn.Module):
        def forward(self, x, y):
            return x + y.abs() + y.neg()

    assert written(Net(), torch.randn(3, 8), torch.randn(1, 8)) == []
    assert written(Net(), torch.randn(4, 8), torch.randn(1, 8)) == ["aten.abs.default", "aten.neg.default"]


def test_inputs_weights_and_what_is_not_pointwise_are_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 8))

        def forward(self, x, y):
            return x + self.bias + y, torch.matmul(y.abs().t(), y.abs())

    assert written(Net().eval(), torch.randn(8, 8), torch.randn(1, 8)) == []


class WrittenLater(nn.Module):
    def forward(self, x, y):
        shared = y.abs()
        seen = shared.view(8)
        first = x + shared
        seen.add_(1)
        return first, x * shared


class WrittenTwice(nn.Module):
    def forward(self, x, y):
        memory = y.clone()
        once = memory.add_(1)
        memory.mul_(2)
        return x + once


@pytest.mark.parametrize("net", [WrittenLater(), WrittenTwice()])
def test_a_value_that_is_written_to_later_is_left(net):
    assert written(net, torch.randn(8, 8), torch.randn(1, 8)) == []


def test_sizes_that_vary_are_left_to_inductor():
    rows = torch.export.Dim("rows", min=2, max=9)
    inputs = (torch.randn(3, 4, 5, 5), torch.ones(3, 5, dtype=torch.long))
    assert written(Masked(), *inputs, dynamic_shapes=({0: rows}, {0: rows})) == []


class Attention(nn.Module):
    """Two layers of attention under one mask, spelled out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(32, 32) for _ in range(4)) for _ in range(2))

    def forward(self, x, mask):
        added = (1 - mask[:, None, None, :].float()) * -12345.0
        for query, key, value, out in self.layers:
            q, k, v = (f(x).unflatten(-1, (8, 4)).transpose(1, 2) for f in (query, key, value))
            weights = (q @ k.transpose(-1, -2) * 0.5 + added).softmax(-1)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.slow
@pytest.mark.inductor
def test_the_program_computes_the_mask_once(monkeypatch):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 16, 32), (torch.arange(16) < torch.tensor([[16], [9]])).long())
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = quant2e.prepare_pt2e(quant2e.capture(Attention().eval(), inputs), quantizer)
    quant2e.calibrate(prepared, [inputs])
    programs = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(programs.append))
    program = lowering.to_inductor(quant2e.convert_pt2e(prepared), inputs)
    assert program.verification.passed
    assert programs[0].count("12345.0") == 1
