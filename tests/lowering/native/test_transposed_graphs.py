"""Transposed convolutions in regions: what follows them, a network of them from end to end, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering.native.cut
import quant2e
from lowering import to_inductor, to_native
from lowering.inductor.rewrites.graph import private_copy
from lowering.native.cut import cut_regions
from lowering.native.kernels.op import instruction_sets, load_region_op
from quant2e.graph.qdq_ops import qd
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.lowering.graphs import Weight, on_grid
from tests.lowering.native.test_endings import ACTIVATIONS, ADDED, TIE, X, Y, integers

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler, so there are no kernels")

PRODUCTS = {
    # weight, groups, stride, padding, padding of the result, dilation
    "2 by 2": ((20, 37, 2, 2), 1, 2, 0, 0, 1),
    "overlapping": ((20, 70, 4, 4), 1, 2, 1, 0, 1),
    "uneven": ((5, 33, 3, 2), 1, (2, 3), (1, 0), (1, 2), (1, 2)),
    "grouped": ((24, 4, 3, 3), 4, 2, 1, 1, 1),
    "depthwise": ((20, 1, 4, 4), 20, 2, 1, 0, 1),
    "depthwise of 5, 16 channels": ((16, 1, 6, 6), 16, 2, 2, 0, 1),
    "stride 1": ((16, 8, 3, 3), 1, 1, 1, 0, 1),
    "wider than its kernel": ((8, 20, 2, 1), 1, 3, 0, 1, 1),
}


class Net(nn.Module):
    """on_grid(activation(product(on_grid(x)) [+ added]))"""

    def __init__(self, product: str, activation: str, added: str, *, both: bool = False) -> None:
        super().__init__()
        shape, self.groups, self.stride, self.padding, self.more, self.dilation = PRODUCTS[product]
        g = torch.Generator().manual_seed(len(product) + len(activation))
        self.register_buffer("weight", torch.randint(-128, 128, shape, dtype=torch.int8, generator=g))
        self.register_buffer("scales", torch.rand(shape[1], generator=g) * 2e-3 + 1e-3)
        self.register_buffer("zeros", torch.zeros(shape[1], dtype=torch.int64))
        self.register_buffer("bias", torch.randn(shape[1] * self.groups, generator=g))
        self.activation, self.added, self.both = activation, added, both

    def product(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.conv_transpose2d(x, w, b, self.stride, self.padding, self.more, self.groups, self.dilation)

    def forward(self, x: Tensor, r: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        w = qd.dequantize_per_channel.default(self.weight, self.scales, self.zeros, 1, -128, 127, torch.int8)
        y = self.product(on_grid(x, X), w, self.bias)
        if self.added:
            y = y + (on_grid(r, ADDED) if self.added == "bytes" else r)
        y = ACTIVATIONS[self.activation](y)
        return (on_grid(y, Y), y * 1.0) if self.both else on_grid(y, Y)

    def exact(self, x: Tensor, r: Tensor) -> Tensor:
        """The integers before they are rounded: float64."""
        y = self.product(torch.round(on_grid(x, X).double() / X[0]), self.weight.double(), None) * X[0]
        scales = self.scales.double().repeat(self.groups).view(1, -1, 1, 1)
        y = y * scales + self.bias.double().view(1, -1, 1, 1)
        if self.added:
            y = y + (
                torch.round(on_grid(r, ADDED).double() / ADDED[0]) * ADDED[0] if self.added == "bytes" else r.double()
            )
        return (ACTIVATIONS[self.activation](y) / Y[0] + Y[1]).clamp(-128, 127)


def lowered(name: str, net: Net, monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, net.weight.shape[0], 5, 7, generator=g)
    r = torch.randn(net.product(x, net.weight.float(), None).shape, generator=g)
    monkeypatch.setattr(lowering.native.cut, "load_region_op", lambda: load_region_op(name))
    program = to_native(torch.export.export(net, (x, r)).module(), (x, r), verify=False)
    assert [op.reason for op in program.report.leftovers] == []
    assert len(program.report.regions) == 1
    return program, x, r


@pytest.mark.parametrize("added", ["", "bytes", "floats"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", instruction_sets())
def test_what_is_added_and_activated(product: str, added: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for activation in ("none", "relu", "hardswish"):
        net = Net(product, activation, added)
        program, x, r = lowered(name, net, monkeypatch)
        exact, got, graph = net.exact(x, r), integers(program(x, r)).double(), integers(net(x, r)).double()
        assert float((got - exact).abs().max()) <= 0.5 + TIE
        apart = got != graph
        assert bool((((exact - exact.floor()) - 0.5).abs() < TIE)[apart].all())
        assert float((got - graph).abs().max()) <= 1


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", instruction_sets())
def test_integers_and_floats_of_one_result(product: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(product, "relu", "", both=True)
    program, x, r = lowered(name, net, monkeypatch)
    rounded, floats = program(x, r)
    assert float((integers(rounded).double() - net.exact(x, r)).abs().max()) <= 0.5 + TIE
    wanted = net(x, r)[1].double()
    assert float((floats.double() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


class UNet(nn.Module):
    """Two levels down and up again, each joined with what it was."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.one, self.two, self.three = block(3, 8), block(8, 16), block(16, 32)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.four, self.five, self.head = block(32, 16), block(16, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        y = self.four(torch.cat([self.up(three), two], 1))
        made: Tensor = self.head(self.five(torch.cat([self.last(y), one], 1)))
        return made


def x86() -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def xnnpack() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config())


@pytest.mark.parametrize("quantizer", [x86, xnnpack])
def test_a_unet_is_one_region(quantizer) -> None:
    x = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(1))
    model = quant2e.quantize(UNet().eval(), (x,), quantizer(), [(x,)], dynamic_batch=True, progress=False)
    program = to_native(model)
    assert program.report.leftovers == ()
    assert len(program.report.regions) == 1
    assert program.verification is not None
    assert program.verification.max_steps <= 1
    assert torch.equal(program(x), torch.cat([program(part) for part in x.split(1)]))


@pytest.mark.parametrize("quantizer", [x86, xnnpack])
def test_inductor_calls_the_same_region_and_measures(quantizer) -> None:
    """Weights have a scale per channel, or one."""
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = quant2e.quantize(UNet().eval(), (x,), quantizer(), [(x,)], progress=False)
    program = to_inductor(model, engines="native")
    assert {op.kernel for op in program.report.int8} == {"quant2e.int8_region"}
    assert torch.equal(program(x), to_native(model)(x))
    measured = to_inductor(model).report.engines
    assert all(
        {"native", "float"} <= set(measured[name].seconds) for name in ("conv_transpose2d", "conv_transpose2d_1")
    )


REFUSED = {
    "a scale for each input": (lambda x, w: F.conv_transpose2d(x, w(), None, 2), (8, 6, 2, 2), 0, "symmetric int8"),
    "a large kernel": (lambda x, w: F.conv_transpose2d(x, w(), None, 2), (8, 6, 33, 33), 1, "a kernel of 33 x 33"),
    "many parts": (lambda x, w: F.conv_transpose2d(x, w(), None, 33), (8, 6, 2, 2), 1, "of stride 33 x 33"),
    "three dimensions": (lambda x, w: F.conv_transpose3d(x[:, :, None], w()), (8, 6, 1, 2, 2), 1, "no step"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "shape", "axis", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_has_a_reason(body, shape, axis, reason) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = Weight(torch.randn(*shape), axis)

        def forward(self, x: Tensor) -> Tensor:
            return on_grid(body(on_grid(x, X), self.weight), Y)

    x = torch.randn(1, 8, 4, 4)
    gm = torch.export.export(Own(), (x,)).module()
    report = to_native(gm, (x,), verify=False).report
    name = next(op.name for op in report.ops if "conv_transpose" in op.name) if report.ops else ""
    assert reason in next(op.reason for op in report.leftovers if op.name == name)
    assert cut_regions(private_copy(gm)).regions == ()
