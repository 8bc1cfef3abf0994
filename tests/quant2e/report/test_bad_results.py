"""A bad result says so first, with the places and the tensors that it comes from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quant2e
from quantizers.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config


class Depthwise(nn.Module):
    """Three depthwise-separable blocks; in the last two the channels between pointwise and depthwise span 2.5 decades.

    The depthwise weights undo it, so the float function is that of a net without the spread.
    """

    def __init__(self, spread: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.point = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(3))
        self.depth = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(3))
        for conv in (self.stem, *self.point, *self.depth):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        if spread:
            factors = torch.logspace(-1.25, 1.25, 16)
            with torch.no_grad():
                for point, depth in zip(self.point[1:], self.depth[1:], strict=True):
                    point.weight *= factors[:, None, None, None]
                    depth.weight /= factors[:, None, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for point, depth in zip(self.point, self.depth, strict=True):
            x = torch.relu(depth(torch.relu(point(x))))
        return x.mean((2, 3))


def quantized(spread: bool) -> quant2e.QuantizedModel:
    torch.manual_seed(0)
    model, data = Depthwise(spread).eval(), [torch.randn(4, 3, 8, 8) for _ in range(10)]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    return quant2e.quantize(model, (data[0],), quantizer, data, min_sqnr_db=None)


@pytest.fixture(scope="module")
def bad() -> quant2e.Report:
    return quantized(spread=True).report


@pytest.fixture(scope="module")
def good() -> quant2e.Report:
    return quantized(spread=False).report


def test_the_ranges_name_exactly_the_two_tensors(bad):
    """They are the results of the relu between pointwise and depthwise, of the second and the third block."""
    worst = [row for row in bad.ranges if row.sqnr_db < 20.0]
    assert [row.tensor.split("'")[1] for row in sorted(worst, key=lambda row: row.tensor)] == ["relu_3", "relu_5"]
    assert all(row.sqnr_db > 30.0 for row in bad.ranges if row not in worst)
    assert str(bad).count("range: the output of 'relu_") == 2


def test_a_good_report_does_not_say_so(good):
    assert good.sqnr_db > 25.0
    assert good.worst_places == ()
    assert "bad" not in str(good)
    assert all(row.sqnr_db > 20.0 for row in good.ranges)


def test_it_comes_first_with_three_places(bad):
    assert bad.sqnr_db < 20.0
    first, *places = str(bad).splitlines()[:4]
    assert first.startswith("the output is bad: ")
    assert first.endswith("and most of it appears at")
    assert len(places) == len(bad.worst_places) == 3
    assert any("'relu_3'" in place or "'relu_5'" in place for place in places)
    assert repr(bad).splitlines()[0].startswith("Report: the output is bad: ")


def test_it_stays_in_the_file(tmp_path):
    result = quantized(spread=True)
    result.save(tmp_path / "model.pt2")
    loaded = quant2e.load(tmp_path / "model.pt2").report
    assert [row.sqnr_db for row in loaded.ranges] == [row.sqnr_db for row in result.report.ranges]
    assert len(loaded.worst_places) == 3
    assert str(tmp_path.parent) not in str(loaded)
