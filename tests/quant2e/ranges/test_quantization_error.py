import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.ranges.histogram import Histogram
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.quantization_error import expected, filling, fillings, mean_over, pointwise, reference

GRID = NumberFormat(dtype=torch.int8, quant_min=-4, quant_max=3, qscheme=torch.per_tensor_affine)


def parameters(*pairs):
    return torch.tensor([s for s, _ in pairs]), torch.tensor([z for _, z in pairs])


def test_pointwise_by_hand():
    x = torch.tensor([0.0, 0.5, 0.75, 1.6, 9.0, -2.0, -7.0], dtype=torch.float64)
    #               exact ties-to-even, up, clamped to 3.0, and to -4.0
    errors = pointwise(x, GRID, parameters((1.0, 0), (0.5, -4)))
    expected_errors = [[0.0, 0.25, 0.0625, 0.16, 36.0, 0.0, 9.0], [0.0, 0.0, 0.0625, 0.01, 30.25, 4.0, 49.0]]
    torch.testing.assert_close(errors, torch.tensor(expected_errors, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(min_value=-20, max_value=20), min_size=2, max_size=8, unique=True),
    st.floats(min_value=0.1, max_value=5),
    st.integers(min_value=-4, max_value=3),
)
def test_the_mean_is_the_mean_of_many_points(edges, scale, zero_point):
    edges = torch.tensor(sorted(edges), dtype=torch.float64)
    qparams = parameters((scale, zero_point))
    means = mean_over(edges, GRID, qparams)[0]
    for i, mean in enumerate(means.tolist()):
        fractions = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        points = torch.lerp(edges[i], edges[i + 1], fractions)
        assert mean == pytest.approx(pointwise(points, GRID, qparams).mean().item(), rel=1e-3, abs=1e-5 * scale**2)


def test_an_interval_without_width_is_a_point():
    edges = torch.tensor([2.3, 2.3], dtype=torch.float64)
    assert mean_over(edges, GRID, parameters((1.0, 0))).item() == pytest.approx(0.09)


def test_peaks_and_edges_of_a_histogram():
    data = torch.cat([torch.full((100,), 3.5), torch.arange(16) / 2, torch.tensor([-0.25])])
    bins = filling(Histogram(8).update(Histogram(8).init(), data))
    assert bins.edges.tolist() == [-0.25, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.5]
    assert bins.count.tolist() == [3, 2, 2, 102, 2, 2, 2, 2]
    assert torch.nonzero(bins.peak).flatten().tolist() == [3]


def test_bins_of_several_histograms():
    states = [Histogram(8).update(Histogram(8).init(), torch.tensor(x)) for x in ([0.5, 2.5, 2.5], [-1.0, -8.0])]
    bins = fillings(states, [0, 0], 8)
    assert bins.edges.tolist() == [[0.5, 1.0, 1.5, 2.0, 2.5, 2.5, 3.5, 4.0, 4.5], [-8, -8, -7, -6, -5, -4, -3, -2, -1]]
    assert bins.count.tolist() == [[1, 0, 0, 0, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]]
    alone = [filling(state) for state in states]
    assert [part.edges.tolist() for part in alone] == [bins.edges[0, :6].tolist(), bins.edges[1].tolist()]
    assert [part.count.tolist() for part in alone] == [[1, 0, 0, 0, 2], bins.count[1].tolist()]


def test_expected_error_is_close_to_the_datas():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    state = Histogram().update(Histogram().init(), x)
    scale, zero_point = 0.4, 0
    dequantized = np.clip(np.round(x.double().numpy() / np.float32(scale)), -4, 3) * np.float32(scale)
    exact = np.mean((dequantized - x.double().numpy()) ** 2)
    assert expected(filling(state), GRID, parameters((scale, zero_point))).item() == pytest.approx(exact, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(min_value=-10, max_value=10, width=32), min_size=1, max_size=40),
    st.floats(min_value=0.1, max_value=1),
)
def test_the_advantage_is_never_overstated(data, factor):
    state = Histogram(32).update(Histogram(32).init(), torch.tensor(data))
    present, candidate = parameters((2.5, 0)), parameters((2.5 * factor, 0))
    bins = fillings([state] * 2, [int(state.histogram.nonzero()[0])] * 2, 32)
    mark = reference(bins, GRID, [v.expand(2, 1) for v in present])
    claimed, same = mark.advantage([v.expand(2, 1) for v in candidate])
    assert claimed == same
    assert claimed <= expected(filling(state), GRID, present) - expected(filling(state), GRID, candidate) + 1e-9
