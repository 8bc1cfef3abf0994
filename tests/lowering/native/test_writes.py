"""In-place ops, and layouts that others see: a region computes nothing but values, and loses no write and no stride."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lowering import to_inductor, to_native
from lowering.native.kernels.op import load_region_op
from quant2e.graph.effects import is_in_place
from quant2e.graph.qdq_ops import qd
from tests.lowering.graphs import Weight, on_grid

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler, so there are no kernels")

X, Y = (0.02, -5), (0.03, 7)


class Net(nn.Module):
    """``body`` of two int8 convolutions with 4 channels each, and of tensors ``x`` and ``p``."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (Weight(torch.randn(4, 4, 3, 3)) for _ in range(2))
        self.body = body

    def a(self, x: Tensor) -> Tensor:
        return F.conv2d(on_grid(x, X), self.first(), padding=1)

    def b(self, x: Tensor) -> Tensor:
        return F.conv2d(on_grid(x, Y), self.second(), padding=1)

    def forward(self, x: Tensor, p: Tensor) -> Any:
        return self.body(self, x, p)


def residual_of_an_input(net: Net, x: Tensor, p: Tensor) -> Tensor:
    p += net.a(x)
    return net.b(p)


def input_read_before(net: Net, x: Tensor, p: Tensor) -> Any:
    y = net.a(x)
    x.add_(1.0)
    return y, p.sin()


def all_of_a_view(net: Net, x: Tensor, p: Tensor) -> Tensor:
    y = net.a(x) + p
    y.flatten(1).relu_()
    return net.b(y)


def a_part(net: Net, x: Tensor, p: Tensor) -> Tensor:
    y = net.a(x) + p
    y[:, :2].mul_(0.5)
    return net.b(y)


def dequantized(net: Net, x: Tensor, p: Tensor) -> Tensor:
    y = on_grid(net.a(x), Y)
    y[:, 0] = 0
    return F.conv2d(y, net.second(), padding=1) + p


def before_the_view_is_read(net: Net, x: Tensor, p: Tensor) -> Any:
    y, older = net.a(x), p.flatten(1)
    seen = y.sin()
    p.add_(1.0)
    return seen, net.b(F.hardswish(y) + older.unflatten(1, (4, 6, 5)).cos())


def of_what_a_region_made(net: Net, x: Tensor, p: Tensor) -> Tensor:
    y, older = net.a(x), p.flatten(1)
    p.add_(y.sin())
    return net.b(F.hardswish(y) + older.unflatten(1, (4, 6, 5)).cos())


# what others see → the in-place ops that stay, and how many regions there are
SEEN = {
    "a residual added to an input": (residual_of_an_input, ["add_"], 2),
    "an input that a region reads before": (input_read_before, ["add_"], 1),
    "relu of all through a view": (all_of_a_view, ["relu_"], 2),
    "a part": (a_part, ["mul_"], 2),
    "a dequantized tensor": (dequantized, ["fill_"], 1),
    "in front of an older view": (before_the_view_is_read, ["add_"], 1),
    "of what a region made, in front of an older view": (of_what_a_region_made, ["add_"], 2),
}
# and what nobody sees
UNSEEN: dict[str, Callable[..., Any]] = {
    "relu": lambda net, x, p: net.b(net.a(x).relu_() + p),
    "a sum": lambda net, x, p: net.b(net.a(x).add_(p)),
    "a product": lambda net, x, p: net.b(net.a(x).mul_(p)),
    "silu, read twice": lambda net, x, p: (lambda y: net.b(y) + y + p)(F.silu(net.a(x), inplace=True)),
    "hardtanh": lambda net, x, p: net.b(F.hardtanh(net.a(x), -0.5, 0.5, inplace=True) + p),
    "a view of what nobody else reads": lambda net, x, p: net.b(net.a(x).view(2, 4, 5, 6).relu_().view(2, 4, 6, 5) + p),
}


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 6, 5, generator=g), torch.randn(2, 4, 6, 5, generator=g)


def calls(gm: torch.fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == "call_function" and is_in_place(node)]


def same(program: Callable[..., Any], net: nn.Module, given: tuple[Tensor, ...] | None = None) -> None:
    """The outputs of ``program`` and their layout, and what it leaves in its inputs, are those of ``net``."""
    mine, theirs = ([x.clone() for x in given or inputs()] for _ in range(2))
    with torch.no_grad():
        found, wanted = program(*mine), net(*theirs)
    pairs = zip((*pytree.tree_leaves(found), *mine), (*pytree.tree_leaves(wanted), *theirs), strict=True)
    for one, other in pairs:
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("body", "kept", "regions"), SEEN.values(), ids=SEEN)
def test_what_others_see_is_written(body, kept, regions):
    net = Net(body)
    program = to_native(torch.export.export(net, inputs()).module(), inputs(), verify=False)
    same(program, net)
    assert calls(program.graph) == kept
    assert len(program.report.regions) == regions


@pytest.mark.parametrize("body", UNSEEN.values(), ids=UNSEEN)
def test_what_nobody_sees_is_an_op_of_a_region(body):
    net = Net(body)
    program = to_native(torch.export.export(net, inputs()).module(), inputs(), verify=False)
    same(program, net)
    assert calls(program.graph) == []


def test_an_op_that_stays_says_why():
    graph = torch.export.export(Net(dequantized), inputs()).module()
    reasons = {op.name: op.reason for op in to_native(graph, inputs(), verify=False).report.leftovers}
    assert reasons["conv2d_1"] == "'fill_' writes in place to memory that others see as well"


def test_inductor_loses_no_write_either():
    for body, _, _ in (SEEN["a residual added to an input"], SEEN["in front of an older view"]):
        net = Net(body)
        same(to_inductor(torch.export.export(net, inputs()).module(), inputs(), engines="native", verify=False), net)


def viewed(net: Net, x: Tensor, p: Tensor) -> Any:
    y = net.a(x)
    return y.view(2, -1), F.softplus(y + p).view(8, 30), net.b(y)


def strided(net: Net, x: Tensor, p: Tensor) -> Any:
    y = net.a(x)
    return y.as_strided((2, 30), (120, 4)) + p.sum(), net.b(y)


@pytest.mark.parametrize("body", [viewed, strided])
def test_what_leaves_a_region_lies_in_memory_as_the_graph_says(body):
    net = Net(body)
    graph = torch.export.export(net, inputs()).module()
    same(to_native(graph, inputs(), verify=False), net)
    same(to_inductor(graph, inputs(), engines="native", verify=False), net)


class Rows(nn.Module):
    """Rows in front, as recurrent and attention layers have them, and a view that joins them with channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Weight(torch.randn(8, 8)), Weight(torch.randn(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(on_grid(x.transpose(0, 1), X), self.first())
        return y.sin().view(5, 4, 4), F.linear(on_grid(y, Y), self.second())


def test_rows_that_are_viewed_lie_in_memory_as_the_graph_says():
    x = torch.randn(2, 5, 8)
    program = to_native(torch.export.export(Rows(), (x,)).module(), (x,), verify=False)
    assert len(program.report.regions) == 1
    same(program, Rows(), (x,))


class Integers(nn.Module):
    """Integers that leave the model, and that a convolution reads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.dtype = Weight(torch.randn(4, 4, 3, 3)), dtype

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.iinfo(self.dtype).min, torch.iinfo(self.dtype).max
        q = qd.quantize_per_tensor.default(x, 0.05, low + 120, low, high, self.dtype)
        return q, qd.dequantize_per_tensor.default(q, 0.05, low + 120, low, high, self.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, y = self.pair(x)
        inner, z = self.pair(F.conv2d(y, self.weight(), padding=1))
        return q, inner, F.conv2d(z, self.weight(), padding=1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_that_others_read_are_those_of_the_graph(dtype):
    x = inputs()[:1]
    program = to_native(torch.export.export(Integers(dtype), x).module(), x, verify=False)
    assert len(program.report.regions) == 2
    same(program, Integers(dtype), x)
