"""Sums behind convolutions: they are added inside of the kernel, and the grid before them clips nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from lowering import to_openvino
from lowering.openvino.session import read_model
from lowering.openvino.sums import LEVELS
from quant2e import quantize
from quantizers import OpenVINOQuantizer

pytestmark = pytest.mark.slow
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

IMAGE = (torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).sin(),)
BATCH = ({0: torch.export.Dim("batch", min=1, max=16)},)


class Residual(nn.Module):
    """Two blocks with additions, the second with a depthwise layer last and an activation behind the sum.

    ``between``: what the first block adds to, of its input. ``short``: it is one layer, which reads that itself.
    """

    def __init__(self, between=lambda x: x, short=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.three, self.four = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.last, self.between, self.short = nn.Conv2d(16, 4, 1), between, short

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.two(x if self.short else self.one(x).relu()) + self.between(x)
        x = (self.four(self.three(x).relu()) + x).relu()
        return self.last(x)


def mean(x):
    """Of another shape, which x86 quantizes no sum for."""
    return x.mean((2, 3), keepdim=True)


def lowered(model, isa=None, **options):
    """``isa``: whose ranges; None for this machine's. Those of AVX2 are cut, and right everywhere."""
    quantizer = OpenVINOQuantizer(isa=isa).set_global("w8a8")
    result = quantize(model.eval(), IMAGE, quantizer, [IMAGE], min_sqnr_db=None, **options)
    return result, to_openvino(result)


def grids(program):
    """The ends of each grid that was put in front of a sum."""
    ops = read_model(program.xml, program.weights, "m").get_ordered_ops()
    fakes = [op for op in ops if op.get_type_name() == "FakeQuantize" and op.get_attributes()["levels"] == LEVELS]
    return [float(np.ravel(op.input_value(2).get_node().get_data())[0]) for op in fakes]


@pytest.mark.parametrize("isa", [None, "avx2"])
@pytest.mark.parametrize("options", [{}, {"dynamic_shapes": BATCH}], ids=["fixed", "dynamic batch"])
def test_sums_are_part_of_their_convolution(options, isa):
    result, program = lowered(Residual(), isa, **options)
    assert program.report.verification.passed
    assert len(grids(program)) == 2
    for count in (1, 2) if options else (2,):
        x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 9
        torch.testing.assert_close(program(x), result(x), atol=0.1, rtol=0)
    assert all(op.on_integers for op in program.report.ops)
    made = [op.get_rt_info() for op in program.compiled.get_runtime_model().get_ordered_ops()]
    written = [about["outputPrecisions"].astype(str) for about in made if "onv" in about["layerType"].astype(str)]
    assert written == ["u8"] * 5 + ["f32"]  # the last layer's output is the program's


@pytest.mark.parametrize("options", [{"between": mean}, {"short": True}], ids=["floats", "its own input"])
def test_a_sum_that_cannot_be_inside_stays_as_it_is(options):
    _, program = lowered(Residual(**options))
    assert program.report.verification.passed
    assert len(grids(program)) == 1


def test_no_result_is_clipped():
    """Images and weights at their ends reach the bound, and never pass it."""
    model = Residual()
    with torch.no_grad():
        for layer in (model.two, model.four):
            layer.weight.copy_(layer.weight.abs())
            layer.bias.fill_(1.5)
    result, program = lowered(model)
    bounds = grids(program)
    x = torch.full((2, 3, 8, 8), 1e4)
    x[1] = -1e4
    values = []

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if "conv2d" in str(n.target):
                values.append(float(value.detach().abs().max()))
            return value

    Keep(result.module).run(x)
    for most, bound in zip((values[2], values[4]), bounds, strict=True):
        assert 0.1 * bound < most <= bound
    torch.testing.assert_close(program(x), result(x), atol=0.1, rtol=0)
