"""Layers write what the Q/DQ graph says: another integer only where float64 lies within a thousandth of a tie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering.native.cut
from lowering import to_native
from lowering.native.kernels.op import instruction_sets, load_region_op
from quant2e.graph.qdq_ops import qd
from tests.lowering.graphs import on_grid

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler, so there are no kernels")

X, ADDED, Y = (0.021, -7), (0.03, 11), (0.017, -20)
TIE = 1e-3

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda y: F.hardtanh(y, -0.3, 0.9),
    "clamp": lambda y: y.clamp(min=-0.5),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu by tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky relu": lambda y: F.leaky_relu(y, 0.1),
}
PRODUCTS = {
    # weight, groups, padding
    "convolution": ((37, 5, 3, 3), 1, 1),
    "point": ((70, 20, 1, 1), 1, 0),
    "grouped": ((24, 4, 3, 3), 4, 1),
    "depthwise": ((20, 1, 3, 3), 20, 1),
    "depthwise of 5": ((20, 1, 5, 5), 20, 2),
    "linear": ((33, 20), 1, 0),
}


WIDE = {
    # depthwise, as PRODUCTS: one pixel of all channels in 16 or 32 bytes, and more than a strip of 64
    "16 channels": ((16, 1, 3, 3), 16, 1),
    "32 channels": ((32, 1, 3, 3), 32, 1),
    "100 channels": ((100, 1, 3, 3), 100, 1),
    "100 channels of 5": ((100, 1, 5, 5), 100, 2),
}


class Net(nn.Module):
    """on_grid(activation(product(on_grid(x)) [+ added]))"""

    def __init__(self, product: str, activation: str, added: str) -> None:
        super().__init__()
        shape, self.groups, self.padding = (PRODUCTS | WIDE)[product]
        g = torch.Generator().manual_seed(len(product) + len(activation))
        self.register_buffer("weight", torch.randint(-128, 128, shape, dtype=torch.int8, generator=g))
        self.register_buffer("scales", torch.rand(shape[0], generator=g) * 2e-3 + 1e-3)
        self.register_buffer("zeros", torch.zeros(shape[0], dtype=torch.int64))
        self.register_buffer("bias", torch.randn(shape[0], generator=g))
        self.activation, self.added = activation, added

    def product(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w, b) if w.dim() == 2 else F.conv2d(x, w, b, 1, self.padding, 1, self.groups)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        w = qd.dequantize_per_channel.default(self.weight, self.scales, self.zeros, 0, -128, 127, torch.int8)
        y = self.product(on_grid(x, X), w, self.bias)
        if self.added:
            y = y + (on_grid(r, ADDED) if self.added == "bytes" else r)
        return on_grid(ACTIVATIONS[self.activation](y), Y)

    def exact(self, x: Tensor, r: Tensor) -> Tensor:
        """The integers before they are rounded: float64. Scales are those that kernels multiply with, float32."""
        moved = torch.round(on_grid(x, X).double() / X[0])
        y = self.product(moved, self.weight.double(), None) * X[0]
        channel = (1, -1, 1, 1) if y.dim() == 4 else (1, -1)
        y = y * self.scales.double().view(channel) + self.bias.double().view(channel)
        if self.added:
            y = y + (
                torch.round(on_grid(r, ADDED).double() / ADDED[0]) * ADDED[0] if self.added == "bytes" else r.double()
            )
        return (ACTIVATIONS[self.activation](y) / Y[0] + Y[1]).clamp(-128, 127)


def integers(y: Tensor) -> Tensor:
    return torch.round(y / Y[0]) + Y[1]


def inputs(net: Net, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    channels = net.weight.shape[1] * net.groups
    x = torch.randn((n, channels) if net.weight.dim() == 2 else (n, channels, 9, 11), generator=g)
    with torch.no_grad():
        shape = (
            net(x, torch.zeros(()).expand(1)).shape if not net.added else net.product(x, net.weight.float(), None).shape
        )
    return x, torch.randn(shape, generator=g)


def check(name: str, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    x, r = inputs(net, 2)
    monkeypatch.setattr(lowering.native.cut, "load_region_op", lambda: load_region_op(name))
    program = to_native(torch.export.export(net, (x, r)).module(), (x, r), verify=False)
    assert [op.reason for op in program.report.leftovers] == []
    exact, got, graph = net.exact(x, r), integers(program(x, r)).double(), integers(net(x, r)).double()
    assert float((got - exact).abs().max()) <= 0.5 + TIE
    apart = got != graph
    tie = ((exact - exact.floor()) - 0.5).abs() < TIE
    assert bool(tie[apart].all())
    assert float((got - graph).abs().max()) <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in instruction_sets():
        check(name, Net("convolution", activation, ""), monkeypatch)


@pytest.mark.parametrize("added", ["", "bytes", "floats"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_product_and_what_is_added(product: str, added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in instruction_sets():
        for activation in ("none", "relu", "hardswish"):
            check(name, Net(product, activation, added), monkeypatch)


class Both(Net):
    """Its result as integers and as floats, which squeeze-excite reads. ``stride``: of the product."""

    def __init__(self, product: str, activation: str, stride: int) -> None:
        super().__init__(product, activation, "")
        self.stride = stride

    def product(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, self.stride, self.padding, 1, self.groups)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = qd.dequantize_per_channel.default(self.weight, self.scales, self.zeros, 0, -128, 127, torch.int8)
        y = ACTIVATIONS[self.activation](self.product(on_grid(x, X), w, self.bias))
        return on_grid(y, Y), y * 1.0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("product", [*WIDE, "depthwise", "convolution"])
def test_integers_and_floats_of_one_result(product: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in instruction_sets():
        for activation in ("none", "relu", "relu6", "hardswish"):
            net = Both(product, activation, stride)
            channels = net.weight.shape[1] * net.groups
            x = torch.randn(2, channels, 9, 11, generator=torch.Generator().manual_seed(3))
            monkeypatch.setattr(lowering.native.cut, "load_region_op", lambda name=name: load_region_op(name))
            program = to_native(torch.export.export(net, (x,)).module(), (x,), verify=False)
            rounded, floats = program(x)
            exact = net.exact(x, x)
            assert float((integers(rounded).double() - exact).abs().max()) <= 0.5 + TIE
            wanted = net(x)[1].double()
            assert float((floats.double() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
