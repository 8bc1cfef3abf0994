"""Ops that move values as slices and views: the same integers, and one delegate with the convolutions around them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering import to_executorch
from lowering.executorch.xnnpack.legalize import EXACT, legalize
from lowering.executorch.xnnpack.legalize.slicing import few_slices, plain_spellings
from quant2e import quantize
from quant2e.graph.printer import graph_text
from quant2e.graph.qdq_ops import qd
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.graphs import on_grid
from tests.quantizers.xnnpack.test_moves import IMAGE, INSIDE, Between, quantizer

aten = torch.ops.aten
GRID = (0.05, 3)
INTEGER_OPS = {
    aten.slice.Tensor, aten.cat.default, aten.view.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.clone.default, aten.constant_pad_nd.default, aten.pad.default,
    qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default,
}  # fmt: skip
"""What XNNPACK, or ExecuTorch on the way there, has for images of integers."""
TWO_MOVES = {"expand", "expand_as", "nearest of a sequence"}
"""Quantizers quantize between the two as well."""
SHUFFLES = {aten.pixel_shuffle.default, aten.channel_shuffle.default}


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("order", torch.tensor([3, 0, 1]))

    def forward(self, x):
        return self.function(self, x)


def exported(function, x=IMAGE):
    return torch.export.export(Fn(function), (x,), strict=False).module(check_guards=False)


def on_both_sides(move):
    def function(m, x):
        moved = move(m, on_grid(x, GRID))
        moved = moved if isinstance(moved, list | tuple) else [moved]
        return [on_grid(part, GRID) for part in moved]

    return function


@pytest.mark.parametrize("name", INSIDE)
def test_integers_stay_integers_and_the_same(name):
    module = exported(on_both_sides(INSIDE[name]))
    expected = module(IMAGE)
    legalize(module, EXACT)
    for got, wanted in zip(module(IMAGE), expected, strict=True):
        assert torch.equal(got, wanted)
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    assert {node.target for node in calls} <= INTEGER_OPS | SHUFFLES
    for node in calls if name not in TWO_MOVES else ():
        if node.target in (aten.slice.Tensor, aten.cat.default):
            parts = node.args[0] if node.target is aten.cat.default else [node.args[0]]
            assert {part.target for part in parts} == {qd.dequantize_per_tensor.default}
            assert {user.target for user in node.users} == {qd.quantize_per_tensor.default}


@pytest.mark.slow
def test_every_move_stays_in_the_delegate():
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.moves = nn.ModuleList(Between(move) for move in INSIDE.values())

        def forward(self, x):
            return [move(x) for move in self.moves]

    data = [(torch.randn(IMAGE.shape),) for _ in range(2)]
    program = to_executorch(quantize(All().eval(), (IMAGE,), quantizer(), data, min_sqnr_db=None))
    assert program.report.leftovers == ()
    assert len(program.report.partitions) == 1


def test_moves_between_convolutions_are_one_delegate():
    chain = ("index_select", "reflect")

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(len(chain) + 1))
            self.register_buffer("order", torch.tensor([3, 0, 1]))

        def forward(self, x):
            for conv, name in zip(self.convs, chain, strict=False):
                x = INSIDE[name](self, conv(x))
            return self.convs[-1](x)

    data = [(torch.randn(IMAGE.shape),) for _ in range(4)]
    quantized = quantize(Chain().eval(), (IMAGE,), quantizer(), data)
    program = to_executorch(quantized)
    assert program.report.leftovers == ()
    assert len(program.report.partitions) == 1
    assert program.report.verification.max_steps <= 1


WINDOWS = {
    "overlapping": lambda m, x: F.unfold(x, 3),
    "side by side": lambda m, x: F.unfold(x, 2, stride=2),
    "padded, apart": lambda m, x: F.unfold(x, (2, 3), dilation=(2, 1), padding=(1, 2), stride=(2, 1)),
    "with a rest": lambda m, x: F.unfold(x, 4, padding=1, stride=4),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_rows_and_columns(name):
    module = exported(lambda m, x: WINDOWS[name](m, on_grid(x, GRID)))
    expected = module(IMAGE)
    legalize(module, EXACT)
    assert torch.equal(module(IMAGE), expected)
    assert aten.im2col.default not in {node.target for node in module.graph.nodes}


@pytest.mark.slow
def test_windows_behind_a_convolution_load():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Unfold(2, padding=1), nn.Conv1d(16, 2, 1))
    program = to_executorch(quantize(model.eval(), (IMAGE,), quantizer(), [(torch.randn(IMAGE.shape),)] * 4))
    assert program.report.leftovers == ()
    assert len(program.report.partitions) == 1


GOLDENS = {
    "places": (few_slices, lambda m, x: on_grid(x, GRID)[:, [3, 0, 1]]),
    "repeated": (few_slices, lambda m, x: F.interpolate(x, scale_factor=(1, 2))),
    "step": (few_slices, lambda m, x: x[..., 1::2] + 1),
    "spellings": (plain_spellings, lambda m, x: aten.select_copy.int(x.detach(), 1, 0) + 1),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_before_and_after(name, golden):
    rewrite, function = GOLDENS[name]
    module = exported(function)
    before = graph_text(module.graph)
    assert rewrite.__name__ in run(module, (rewrite, remove_dead_code))
    golden(f"rewrites/xnnpack/slicing_{name}", f"{before}\n\n=>\n\n{graph_text(module.graph)}")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.roll(5),
        lambda m, x: x.int().flip(2),
        lambda m, x: x[:, :, 1:3],
        lambda m, x: x.tril(),
        lambda m, x: F.pad(x[:, :1, :1], (1, 1), value=2.0),
    ],
    ids=["places depend on each other", "integers", "a slice", "zeros", "a value of its own"],
)
def test_what_slices_do_not_do_is_left_alone(function):
    module = exported(function)
    text = graph_text(module.graph)
    assert run(module, (few_slices,)) == {}
    assert graph_text(module.graph) == text


def test_a_result_of_the_graph_stays_a_tensor_of_its_own():
    module = exported(lambda m, x: aten.alias.default(x))
    assert run(module, (plain_spellings,)) == {}
