"""What is measured of the native kernels where an instruction set has several ways to sum: that of the layer."""

import pytest
import torch
from torch import nn

from lowering.inductor import kernel_selection
from lowering.inductor.kernel_selection import WITH_NATIVE, choose_native
from lowering.inductor.kernels import engines
from lowering.inductor.kernels.engines import Product
from lowering.inductor.rewrites.graph import private_copy
from lowering.native import engine
from lowering.native.engine import Native, products_together
from lowering.native.kernels.op import load_region_op
from lowering.native.kernels.plan import Arithmetic, StepKind, region_plan
from lowering.native.units import packed
from lowering.native.units.values import Integers
from quant2e import capture, convert_pt2e, prepare_pt2e
from quant2e.cpu import TARGETS
from quantizers import X86InductorQuantizer

WAYS = {4: Arithmetic.SEVEN, 2: Arithmetic.BOUNDED, 1: Arithmetic.SIGNED}


@pytest.fixture
def avx2(monkeypatch):
    """As on a processor without VNNI, whatever this one is."""
    for module in (engine, packed):
        monkeypatch.setattr(module, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(kernel_selection, "detect", lambda: TARGETS["avx2"])
    monkeypatch.setattr(engines, "_KNOWN", {})


@pytest.mark.parametrize(("high", "most", "count"), [(127, 64, 4), (255, 64, 2), (255, 127, 1), (127, 127, 2)])
def test_how_many_products_fit_into_16_bits(avx2, high, most, count):
    weight = torch.full((3, 8), most, dtype=torch.int8)
    assert products_together(weight, Integers(scale=1.0, zero=0, low=0, high=high)) == count


def test_other_instruction_sets_have_one_way(monkeypatch):
    monkeypatch.setattr(engine, "instruction_set", lambda: "avx512_vnni")
    assert (
        products_together(torch.full((3, 8), 127, dtype=torch.int8), Integers(scale=1.0, zero=0, low=0, high=255)) == 4
    )


@pytest.mark.parametrize("count", WAYS)
@pytest.mark.parametrize("shape", [{"x": (5, 16), "weight": (8, 16)}, {"x": (1, 16, 4, 4), "weight": (8, 16, 3, 3)}])
def test_that_way_is_measured(avx2, monkeypatch, count, shape):
    if load_region_op() is None:
        pytest.skip("no C++ compiler")
    seen = []
    monkeypatch.setattr(engine, "packed_steps", lambda *args: seen.extend(made := packed.packed_steps(*args)) or made)
    sizes = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)} if len(shape["x"]) > 2 else {}
    Native().prepare(Product(**shape, **sizes, together=count))()
    assert [one.step.arithmetic for one in seen] == [WAYS[count]]


@pytest.mark.parametrize(
    ("padding", "kinds"), [(0, [StepKind.CONVOLUTION]), (1, [StepKind.CONCAT, StepKind.CONVOLUTION])]
)
def test_nothing_is_copied_that_a_region_would_not_copy(monkeypatch, padding, kinds):
    if load_region_op() is None:
        pytest.skip("no C++ compiler")
    steps = []
    monkeypatch.setattr(engine, "region_plan", lambda *args: steps.extend(args[1]) or region_plan(*args))
    sizes = {"stride": (1, 1), "padding": (padding, padding), "dilation": (1, 1)}
    Native().prepare(Product(x=(3, 7, 5, 5), weight=(8, 7, 3, 3), integers=True, **sizes))()
    assert [step.kind for step in steps] == kinds


class Net(nn.Module):
    """A convolution, a depthwise one, a transposed one and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.each = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.up(self.each(self.conv(x).relu())).mean((2, 3)))


IMAGE = (torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(0)),)


def chosen(monkeypatch, isa):
    """Name → choice, of a net that was quantized for an instruction set, if oneDNN were the fastest everywhere."""
    times = {"onednn": 1e-3, "native": 1e-2, "float": 1.0}
    monkeypatch.setattr(engines, "timed", lambda given, product: {one.name: times[one.name] for one in given})
    prepared = prepare_pt2e(capture(Net().eval(), IMAGE), X86InductorQuantizer(isa=isa).set_global("w8a8"))
    prepared(*IMAGE)
    only = tuple(one for one in WITH_NATIVE if one.name in times)
    return choose_native(private_copy(convert_pt2e(prepared)), "measured", only)[0]


def test_onednn_is_no_choice_where_it_saturates(avx2, monkeypatch):
    found = {name: choice.engine for name, choice in chosen(monkeypatch, "avx512_vnni").items()}
    assert found == {"conv2d": "native", "conv2d_1": "onednn", "conv_transpose2d": "native", "linear": "native"}


def test_onednn_is_a_choice_where_ranges_are_cut(avx2, monkeypatch):
    found = chosen(monkeypatch, "avx2")
    assert {choice.engine for choice in found.values()} == {"onednn"}
    assert found["conv2d"].product.together >= 2
