import pytest
import torch

from quant2e.ranges.clipping import Clipping, products, promising
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.quantization_error import Filling, expected, filling

GRID = NumberFormat(dtype=torch.int8, quant_min=-8, quant_max=7)


def bins_of(x):
    bins = filling(Histogram().update(Histogram().init(), x))
    return Filling(bins.edges[None], bins.count[None], bins.peak[None])


def test_the_estimate_is_close_to_the_error_on_the_bins():
    bins = bins_of(torch.randn(200_000))
    highs = torch.linspace(1.5, 4.0, 12, dtype=torch.float64)[None]
    estimated = Clipping(bins).error(GRID, -highs, highs) / bins.count.sum()
    exact = expected(bins, GRID, GRID.qparams(-highs, highs))
    torch.testing.assert_close(estimated, exact, rtol=0.05, atol=0)


def test_products():
    factors = torch.tensor([1.0, 0.5], dtype=torch.float64)
    low, high = torch.tensor([[-2.0], [-8.0]]), torch.tensor([[4.0], [16.0]])
    each, both = products(low, high, factors, False), products(low, high, factors, True)
    assert [v.tolist() for v in each] == [[[-2, -2, -1, -1], [-8, -8, -4, -4]], [[4, 2, 4, 2], [16, 8, 16, 8]]]
    assert [v.tolist() for v in both] == [[[-2, -1], [-8, -4]], [[4, 2], [16, 8]]]


def test_promising_finds_the_known_optimum():
    """16 levels for the normal distribution: a step of 0.335 sigma (J. Max, 1960, table II)."""
    x = torch.randn(2_000_000)
    low, high = promising(bins_of(x), GRID, *(v.double().reshape(1, 1) for v in x.aminmax()), False)
    assert (high - low).item() / 15 == pytest.approx(0.335, rel=0.04)
