import math

import numpy as np
import pytest
import torch

from quant2e.errors import AnnotationError
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.quantization_error import expected, filling
from quant2e.ranges.search import METHODS, divergences, magnitudes, mse, mse_ranges, search, searched_together


def grid(bits, symmetric):
    if symmetric:
        half = 2 ** (bits - 1)
        return NumberFormat(dtype=torch.int8, quant_min=-half, quant_max=half - 1, qscheme=torch.per_tensor_symmetric)
    return NumberFormat(dtype=torch.uint8, quant_min=0, quant_max=2**bits - 1, qscheme=torch.per_tensor_affine)


def state_of(x, bins=2048):
    estimator = Histogram(bins)
    return estimator.update(estimator.init(), x)


def data():
    g = np.random.default_rng(0)
    n = 50_000
    normal = g.standard_normal(n)
    table = {
        "normal": normal,
        "laplace": g.laplace(size=n),
        "student t": g.standard_t(3, size=n),
        "cauchy": g.standard_cauchy(n),
        "log-normal": np.exp(2 * g.standard_normal(n)),
        "bimodal": np.concatenate([normal * 0.1 - 3, normal * 0.1 + 8]),
        "relu": np.maximum(normal, 0),
        "negative": -g.random(n) - 5,
        "uniform": g.random(n),
        "softmax": np.exp(3 * normal) / np.exp(3 * normal).sum(),
        "constant": np.full(1000, 3.7),
        "zeros": np.zeros(10),
        "two values": (normal > 0).astype(float),
        "integers": g.integers(0, 256, n),
        "few": normal[:50],
        "one": np.array([-2.0]),
        "tiny": normal * 1e-6,
        "vanishing": normal * 1e-30,
        "huge": normal * 1e25,
        "one outlier": np.append(g.random(n), 1e6),
        "hundred outliers": np.concatenate([normal * 0.01, np.full(100, 50.0)]),
    }
    return {name: torch.tensor(x, dtype=torch.float32) for name, x in table.items()}


DATA = data()


def data_error(x, chosen, low, high):
    scale, zero_point = (v.double() for v in chosen.qparams(low, high))
    q = torch.clamp(torch.round(x.double() / scale) + zero_point, chosen.quant_min, chosen.quant_max)
    return (((q - zero_point) * scale - x.double()) ** 2).mean().item()


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_never_worse_than_min_max(name, bits, symmetric):
    x, chosen = DATA[name], grid(bits, symmetric)
    state = state_of(x)
    best, plain = search(state, chosen, "mse"), search(state, chosen, "minmax")
    assert data_error(x, chosen, *best) <= data_error(x, chosen, *plain)
    on_histogram = [expected(filling(state), chosen, chosen.qparams(*r)).item() for r in (best, plain)]
    assert on_histogram[0] <= on_histogram[1]
    assert plain == (x.min(), x.max())


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bins", [2048, 100])
def test_many_histograms_searched_together_give_the_ranges_of_each_alone(bits, symmetric, bins):
    chosen, states = grid(bits, symmetric), [state_of(x, bins) for x in DATA.values()]
    together = mse_ranges(states, chosen)
    assert [tuple(row) for row in together.tolist()] == [mse(state, chosen) for state in states]
    backwards = mse_ranges(states[::-1], chosen)
    assert torch.equal(backwards.flip(0), together)


def test_inside_searched_together_nothing_is_searched_again(monkeypatch):
    chosen, other = grid(8, symmetric=False), grid(8, symmetric=True)
    states = [state_of(DATA[name]) for name in ("normal", "relu", "negative", "normal")]
    alone = [search(state, chosen) for state in states]
    alike = search(states[0], other)
    with searched_together([(state, chosen) for state in states] + [(states[0], other)]):
        with monkeypatch.context() as patch:
            patch.delattr("quant2e.ranges.search.mse_ranges")
            assert [search(state, chosen) for state in states] == alone
            assert search(states[0], other) == alike
        assert search(states[1], other) == search(state_of(DATA["relu"]), other)  # not asked for beforehand
        assert search(states[0], chosen, "minmax") != alone[0]


def test_mse_finds_the_known_optimum():
    """Optimal uniform quantizers of the normal distribution clip at about 2.6 (4 bits) and 3.9 (8 bits) sigma.

    J. Max, "Quantizing for minimum distortion", 1960, table II gives a step of 0.335 sigma for 16 levels.
    """
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    chosen = grid(4, symmetric=False)
    scale, _ = chosen.qparams(*search(state_of(x), chosen, "mse"))
    assert scale.item() == pytest.approx(0.335, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DATA)
def test_every_method_stays_within_the_data(name, method):
    x = DATA[name]
    low, high = search(state_of(x), grid(8, symmetric=False), method)
    assert min(x.min().item(), 0) <= low <= high <= max(x.max().item(), 0)
    assert low.dtype == high.dtype == torch.float32


def test_magnitudes_by_hand():
    counts, width = magnitudes(state_of(torch.tensor([-3.5, -1.5, -0.5, 0.0, 0.5, 1.0, 4.5, 4.5]), 8))
    assert (counts.tolist(), width) == ([3, 2, 0, 1, 2], 1.0)
    counts, width = magnitudes(state_of(torch.tensor([100.0, 101.0]), 8))
    assert (counts.tolist(), width) == ([0, 0, 0, 0, 0, 0, 2], 16.0)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", ["normal", "relu", "bimodal", "negative", "student t"])
def test_percentile_against_sorted_data(name, percentile):
    x = DATA[name]
    state = state_of(x)
    low, high = search(state, grid(8, symmetric=False), "percentile", percentile)
    magnitude = np.sort(np.abs(x.numpy()))
    exact = magnitude[math.ceil(percentile / 100 * x.numel()) - 1]
    threshold = max(-low.item(), high.item())
    _, width = magnitudes(state)
    assert exact - 1e-6 <= threshold <= exact + width
    assert (low.item() == x.min().item()) or (low.item() == -threshold)


def slow_divergence(counts, cut, levels):
    """KL(P || Q), written out bin by bin after Migacz 2017."""
    p = counts[:cut].astype(float)
    p[-1] += counts[cut:].sum()
    q = np.zeros(cut)
    group = np.arange(cut) * levels // cut
    for level in range(levels):
        members = np.flatnonzero(group == level)
        filled = [j for j in members if counts[j] > 0]
        for j in filled:
            q[j] = counts[members].sum() / len(filled)
    p, q = p / p.sum(), q / q.sum() if q.sum() else q
    if np.any((p > 0) & (q == 0)):
        return math.inf
    return sum(p[j] * math.log(p[j] / q[j]) for j in range(cut) if p[j] > 0)


@pytest.mark.parametrize("levels", [4, 7, 16])
@pytest.mark.parametrize("kind", ["smooth", "gaps", "far outlier"])
def test_entropy_against_a_slow_implementation(levels, kind):
    g = np.random.default_rng(levels)
    counts = g.poisson(200 * np.exp(-np.arange(60) / 12))
    if kind == "gaps":
        counts[g.random(60) < 0.4] = 0
    if kind == "far outlier":
        counts[40:59] = 0
    counts[59] = 1
    fast = divergences(torch.tensor(counts), levels)
    slow = [slow_divergence(counts, cut, levels) for cut in range(levels, 61)]
    np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-9, atol=1e-12)


def test_entropy_clips_a_heavy_tail_and_keeps_a_flat_one():
    chosen = grid(8, symmetric=True)
    low, high = search(state_of(DATA["laplace"]), chosen, "entropy")
    largest = DATA["laplace"].abs().max()
    assert 0.3 * largest < high <= largest
    assert low >= -largest
    uniform = search(state_of(DATA["uniform"]), chosen, "entropy")
    assert uniform[1] > 0.99


@pytest.mark.parametrize(
    ("method", "percentile", "message"),
    [("best", 50, "choose one of"), ("mse", 0, "percentile=0"), ("mse", 101, "percentile=101")],
)
def test_an_unknown_method_is_refused(method, percentile, message):
    with pytest.raises(AnnotationError, match=message):
        search(state_of(DATA["few"]), grid(8, symmetric=True), method, percentile)
