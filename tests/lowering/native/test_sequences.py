"""Sequences: convolutions in one dimension and what is around them, in regions as images of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from lowering.native.units.sequences import widen_sequences
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.lowering.graphs import Weight, on_grid

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler, so there are no kernels")

X, Y, Z = (0.0213, -7), (0.1137, 11), (0.0519, -20)
CHANNELS, LENGTH = 20, 37


class Net(nn.Module):
    """``body`` of two sequences of bytes, ``y`` as a convolution makes it, and ``x`` or a weight; rounded by ``Z``."""

    def __init__(self, body: Callable[..., Any], *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.body = Weight(torch.randn(CHANNELS, CHANNELS, 3)), body
        self.own = Weight(torch.randn(*sizes)) if sizes else None

    def forward(self, x: Tensor) -> Tensor:
        x = on_grid(x, X)
        y = on_grid(F.conv1d(x, self.weight(), padding=1), Y)
        return on_grid(self.body(y, x) if self.own is None else self.body(y, self.own()), Z)


def x86() -> X86InductorQuantizer:
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())


def xnnpack() -> XNNPACKQuantizer:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


CONVOLUTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "stride": (lambda y, w: F.conv1d(y, w, stride=3), (33, CHANNELS, 5)),
    "dilation": (lambda y, w: F.conv1d(y, w, padding=8, dilation=4), (33, CHANNELS, 5)),
    "padding by name": (lambda y, w: F.conv1d(y, w, padding="same"), (7, CHANNELS, 4)),
    "groups": (lambda y, w: F.conv1d(y, w, padding=1, groups=4), (24, 5, 3)),
    "depthwise": (lambda y, w: F.conv1d(y, w, padding=1, groups=CHANNELS), (CHANNELS, 1, 3)),
    "depthwise, stride": (lambda y, w: F.conv1d(y, w, None, 2, 3, groups=CHANNELS), (CHANNELS, 1, 7)),
    "depthwise, a wide kernel": (lambda y, w: F.conv1d(y, w, padding=15, groups=CHANNELS), (CHANNELS, 1, 31)),
    "depthwise, dilated": (lambda y, w: F.conv1d(y, w, None, 1, 30, 15, CHANNELS), (CHANNELS, 1, 5)),
}  # fmt: skip

BODIES: dict[str, Callable[..., Any]] = {
    "largest": lambda y, x: on_grid(F.max_pool1d(y, 3, 2, 1), Y),
    "largest, dilated": lambda y, x: on_grid(F.max_pool1d(y, 2, dilation=3), Y),
    "average": lambda y, x: F.avg_pool1d(y, 3, 2, 1),
    "average of what is inside": lambda y, x: F.avg_pool1d(y, 4, count_include_pad=False),
    "adaptive": lambda y, x: F.adaptive_avg_pool1d(y, 1),
    "mean": lambda y, x: y.mean(-1),
    "mean, kept": lambda y, x: y.mean(2, keepdim=True),
    "sum, relu": lambda y, x: F.relu(y + x),
    "product by channel": lambda y, x: y * on_grid(x.mean(-1, keepdim=True).sigmoid(), X),
    "joint": lambda y, x: torch.cat([y, x], 1),
    "flat": lambda y, x: y.flatten(1),
    "squeezed": lambda y, x: on_grid(F.adaptive_avg_pool1d(y, 1), Y).squeeze(-1),
    "gelu": lambda y, x: F.gelu(y),
}


def lowered(net: nn.Module, x: Tensor, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowering.native.cut, "load_region_op", lambda: load_region_op(name))
    return to_native(torch.export.export(net, (x,)).module(), (x,), verify=False)


def off(program, net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        wanted, got = net(x), program(x)
    assert got.shape == wanted.shape
    return torch.round((got - wanted) / Z[0]).abs()


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize(("body", "sizes"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_writes_the_integers_of_the_graph(body, sizes, name, monkeypatch):
    x, net = torch.randn(2, CHANNELS, LENGTH, generator=torch.Generator().manual_seed(1)), Net(body, *sizes)
    program = lowered(net, x, name, monkeypatch)
    assert program.report.leftovers == ()
    assert len(program.report.regions) == 1
    assert float(off(program, net, x).max()) <= 1


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_what_is_around_it_is_in_the_same_region(body, name, monkeypatch):
    x, net = torch.randn(2, CHANNELS, LENGTH, generator=torch.Generator().manual_seed(1)), Net(body)
    program = lowered(net, x, name, monkeypatch)
    assert program.report.leftovers == ()
    assert len(program.report.regions) == 1
    apart = off(program, net, x)
    assert float(apart.max()) <= 1
    assert float((apart > 0).double().mean()) < 0.005


class Audio(nn.Module):
    """A classifier of sounds: strided and depthwise convolutions, pools, a residual sum, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv1d(1, 24, 16, stride=4, padding=6), nn.BatchNorm1d(24)
        self.depthwise, self.point = nn.Conv1d(24, 24, 5, padding=2, groups=24), nn.Conv1d(24, 32, 1)
        self.wide = nn.Conv1d(32, 32, 3, padding=4, dilation=4)
        self.up, self.head = nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(self.norm(self.stem(x)).relu(), 2)
        x = self.point(self.depthwise(x).relu()).relu()
        x = self.up(self.wide(x).relu() + x).relu()
        y: Tensor = self.head(F.adaptive_avg_pool1d(x, 1).flatten(1))
        return y


def quantized(quantizer, *, dynamic: bool = False):
    x = torch.randn(2, 1, 256, generator=torch.Generator().manual_seed(1))
    return quant2e.quantize(Audio().eval(), (x,), quantizer, [(x,)], dynamic_batch=dynamic, progress=False), x


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_audio_network_is_one_region(dynamic):
    model, x = quantized(x86(), dynamic=dynamic)
    program = to_native(model)
    assert program.report.leftovers == ()
    assert len(program.report.regions) == 1
    assert program.verification is not None
    assert program.verification.max_steps < 1
    if dynamic:
        assert torch.equal(program(x), torch.cat([program(part) for part in x.split(1)]))


def test_ops_in_no_region_have_a_reason():
    """XNNPACK has no int8 kernel for a transposed convolution in one dimension, so nothing quantizes it."""
    model, _ = quantized(xnnpack())
    report = to_native(model).report
    assert [op.name for op in report.leftovers] == ["conv_transpose1d"]
    assert "constant symmetric int8 weight" in report.leftovers[0].reason


def test_inductor_calls_the_same_region_and_names_the_ops_of_the_model():
    model, x = quantized(x86())
    program = to_inductor(model, engines="native")
    assert {op.kernel for op in program.report.int8} == {"quant2e.int8_region"}
    assert {"conv1d", "conv1d_3", "conv_transpose1d"} <= {op.name for op in program.report.int8}
    assert torch.equal(program(x), to_native(model)(x))


def test_inductor_measures_each_of_them():
    model, _ = quantized(x86())
    program = to_inductor(model)
    timed = {name: choice.seconds for name, choice in program.report.engines.items() if name.startswith("conv")}
    assert len(timed) == 5
    assert all(set(seconds) >= {"native", "float"} for seconds in timed.values())


def test_lengths_that_vary_end_a_region():
    x, net = torch.randn(2, CHANNELS, LENGTH), Net(lambda y, x: y + x)
    shapes = ({2: torch.export.Dim("length", min=8, max=99)},)
    gm = torch.export.export(net, (x,), dynamic_shapes=shapes).module()
    refused = cut_regions(private_copy(gm)).refused
    assert "sizes other than the first vary" in refused["conv1d"]


def test_a_sequence_that_others_read_as_well_is_one_for_them():
    """The quantized input is read by a convolution, and by a linear layer as rows."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = Weight(torch.randn(8, 12, 3)), Weight(torch.randn(16, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = on_grid(x, X)
            return on_grid(F.conv1d(x, self.first()), Y), on_grid(F.linear(x, self.second()), Y)

    x, net = torch.randn(2, 12, 16), Both()
    gm = torch.export.export(net, (x,)).module()
    copy = private_copy(gm)
    widen_sequences(copy)
    copy.recompile()
    assert all(torch.equal(one, two) for one, two in zip(copy(x), net(x), strict=True))
    program = to_native(gm, (x,), verify=False)
    assert program.report.leftovers == ()
    assert all(float((a - b).abs().max()) <= Y[0] * 1.01 for a, b in zip(program(x), net(x), strict=True))


def test_floats_that_come_from_elsewhere_are_added_as_an_image():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = Weight(torch.randn(CHANNELS, 12, 3))

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return on_grid(F.relu(F.conv1d(on_grid(x, X), self.weight(), padding=1) + r.sin()), Z)

    x, r, net = torch.randn(2, 12, LENGTH), torch.randn(2, CHANNELS, LENGTH), Sum()
    program = to_native(torch.export.export(net, (x, r)).module(), (x, r), verify=False)
    assert [op.name for op in program.report.ops if op.region == 0] == ["conv1d"]
    assert "relu" in program.report.regions[0].ops
    assert float(torch.round((program(x, r) - net(x, r)) / Z[0]).abs().max()) <= 1


def test_what_leaves_is_laid_out_as_the_graph_lays_it_out():
    x, net = torch.randn(2, CHANNELS, LENGTH), Net(lambda y, x: y)
    made = to_native(torch.export.export(net, (x,)).module(), (x,), verify=False)(x)
    assert made.shape == (2, CHANNELS, LENGTH)
    assert made.is_contiguous()
    assert made.view(2, -1).shape == (2, CHANNELS * LENGTH)
