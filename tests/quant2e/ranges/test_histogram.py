import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.ranges.histogram import Histogram, count, widen, windows
from quant2e.ranges.minmax import SENTINEL


def seen(estimator, *tensors):
    state = estimator.init()
    for x in tensors:
        state = estimator.update(state, x)
    return state


def same(a, b):
    """Equal bit for bit."""
    parts = ("min_val", "max_val", "counts", "histogram")
    return all(repr(getattr(a, p).tolist()) == repr(getattr(b, p).tolist()) for p in parts)


# min, max, bins -> exponent, first bin
WINDOWS = [
    (0.0, 7.0, 8, 0, 0),
    (0.0, 7.99, 8, 0, 0),
    (0.0, 8.0, 8, 1, 0),
    (-3.5, 4.5, 8, 0, -3),  # -3 .. 4 are eight bins
    (-4.0, 4.0, 8, 1, -2),
    (0.0, 0.0, 8, -120, 0),
    (5.0, 5.0, 8, -21, 5 * 2**21),  # a constant: bins as narrow as exact numbers allow
    (1e-38, 1e-38, 8, -120, 0),
    (-(2.0**99), 2.0**99, 2048, 90, -512),
]


def window(low, high, bins):
    """Exponent and first bin of one range, by the numbers' definition: one width after the other."""

    def number(x):
        return math.trunc(math.ldexp(x, -exponent))

    largest = max(abs(low), abs(high))
    exponent = max(-120, math.frexp(largest)[1] - 24) if largest else -120
    while number(high) - number(low) >= bins:
        exponent += 1
    return exponent, number(low)


def made(low, high, bins):
    win = windows(torch.tensor([low]), torch.tensor([high]), bins)
    return win.exponent.item(), win.first.item()


@pytest.mark.parametrize(("low", "high", "bins", "exponent", "first"), WINDOWS)
def test_window(low, high, bins, exponent, first):
    assert made(low, high, bins) == window(low, high, bins) == (exponent, first)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.floats(0, 2.0**99, width=32),
    st.sampled_from([2, 3, 8, 1000, 2048, 1 << 20]),
)
def test_windows(low, extent, bins):
    high = (torch.tensor(low) + torch.tensor(extent)).item()
    assert made(low, high, bins) == window(low, high, bins)


def test_bins_by_hand():
    state = seen(Histogram(8), torch.tensor([-3.5, -1.5, -0.5, 0.0, 0.5, 1.0, 4.5, 4.5]))
    #                                         -3 -2 -1  0  1  2  3  4: the bin of zero is two wide
    assert state.histogram.tolist() == [1, 0, 1, 3, 1, 0, 0, 2]
    assert state.windows.edges(torch.arange(9)).tolist() == [[-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    assert (state.min_val.item(), state.max_val.item()) == (-3.5, 4.5)


def test_growing_merges_bins_pairwise():
    state = seen(Histogram(8), torch.tensor([-3.5, -1.5, -0.5, 0.0, 0.5, 1.0, 4.5, 4.5]), torch.tensor([8.0]))
    assert (state.windows.exponent.item(), state.windows.first.item()) == (1, -1)
    assert state.histogram.tolist() == [1, 5, 0, 2, 0, 1, 0, 0]


def test_zeros_take_no_precision_from_what_follows():
    tiny = torch.tensor([-1e-30, 2e-30, 3e-30])
    state = seen(Histogram(8), torch.zeros(2), tiny)
    assert same(state, seen(Histogram(8), tiny, torch.zeros(2)))
    assert torch.count_nonzero(state.histogram) == 4


def test_non_finite_and_masked_values_are_counted_apart():
    state = seen(Histogram(8), torch.tensor([1.0, math.nan, math.inf, -math.inf, -3e38, SENTINEL, 2.0]))
    assert state.counts.tolist() == [7, 1, 1, 3]
    assert state.histogram.sum().item() == 2
    assert (state.min_val.item(), state.max_val.item()) == (1.0, 2.0)
    masked = seen(Histogram(8), torch.tensor([-math.inf]), torch.tensor([]))
    assert masked.empty
    assert masked.counts.tolist() == [1, 0, 0, 1]


def test_integers_have_no_histogram():
    with pytest.raises(CalibrationError, match="only floating-point tensors"):
        seen(Histogram(), torch.arange(3))


@pytest.mark.parametrize("bins", [-1, 0, 1, 2**20 + 1])
def test_number_of_bins(bins):
    with pytest.raises(AnnotationError, match=f"bins={bins}"):
        Histogram(bins)


def test_different_bins_do_not_merge():
    with pytest.raises(CalibrationError, match="8 and 16 bins"):
        Histogram(8).merge(Histogram(8).init(), Histogram(16).init())


@pytest.mark.parametrize("layout", ["plain", "channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_against_plain_counting(layout, dtype):
    x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x = {
        "plain": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "strided": x[:, ::2, :, 1:],
        "expanded": x[:, :1].expand(4, 3, 6, 7),
    }[layout]
    state = seen(Histogram(64), x)
    width, first = state.windows.width.item(), state.windows.first.item()
    expected = [0] * 64
    for value in x.to(torch.float32).flatten().tolist():
        expected[math.trunc(value / width) - first] += 1
    assert state.histogram.tolist() == expected


def test_more_values_than_are_counted_at_a_time():
    x = torch.linspace(-1, 1, 200_001)
    state = seen(Histogram(), x)
    assert state.histogram.sum().item() == x.numel()
    parts = seen(Histogram(), *x.split(10_007))
    assert same(parts, state)


values = st.floats(width=32)  # with NaN, infinities, zeros of both signs and denormals
ordinary = st.floats(min_value=-1000, max_value=1000, width=32)
batches_of = st.lists(st.lists(st.one_of(ordinary, values), max_size=8).map(torch.tensor), max_size=6)


@settings(max_examples=300, deadline=None)
@given(batches_of, st.sampled_from([2, 8, 2048]), st.randoms())
def test_order_and_shards_do_not_matter(batches, bins, random):
    estimator = Histogram(bins)
    whole = seen(estimator, *batches)
    shuffled = random.sample(batches, len(batches))
    assert same(seen(estimator, *shuffled), whole)
    if batches:
        assert same(seen(estimator, torch.cat(batches)), whole)
    cuts = sorted(random.randint(0, len(batches)) for _ in range(2))
    a, b, c = (
        seen(estimator, *part) for part in (shuffled[: cuts[0]], shuffled[cuts[0] : cuts[1]], shuffled[cuts[1] :])
    )
    merge = estimator.merge
    assert same(merge(merge(a, b), c), whole)
    assert same(merge(a, merge(b, c)), whole)
    assert same(merge(merge(c, b), a), whole)
    assert whole.histogram.sum() == whole.counts[0] - whole.counts[1:].sum()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(min_value=-(2.0**99), max_value=2.0**99, width=32), min_size=1, max_size=20),
    st.sampled_from([2, 7, 64]),
)
def test_every_value_lies_between_the_edges_of_its_bin(data, bins):
    x = torch.tensor(data)
    state = seen(Histogram(bins), x)
    edges = state.windows.edges(torch.arange(bins + 1))[0]
    for i in torch.nonzero(state.histogram).flatten().tolist():
        inside = ((x.double() >= edges[i]) & (x.double() <= edges[i + 1])).sum()
        assert inside >= state.histogram[i]


def test_widening_far_gives_the_bin_of_zero():
    low, high = torch.tensor([1e-30, -1.0]), torch.tensor([1e-30, 1e30])
    old, new = windows(low[:1], high[:1], 4), windows(low[1:], high[1:], 4)
    assert widen(count(torch.tensor([[1e-30]]), None, old, 4), old, new).tolist() == [[1, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0, 1e-3, math.inf, -math.inf, math.nan]), max_size=8), max_size=4
    )
)
def test_skipped_zeros_are_as_if_they_were_not_there(batches):
    tensors = [torch.tensor(batch) for batch in batches]
    skipping, counting = Histogram(16, skip_zeros=True), Histogram(16)
    state = seen(skipping, *tensors)
    assert same(state, seen(counting, *(x[x != 0] for x in tensors)))
    assert state.histogram.sum() == state.counts[0] - state.counts[1:].sum()
    assert same(skipping.merge(seen(skipping, *tensors[:1]), seen(skipping, *tensors[1:])), state)


def test_statistics_say_whether_zeros_were_skipped():
    assert repr(Histogram(8)) == "Histogram(bins=8, axis=None, group_size=None)"
    assert repr(Histogram(8, skip_zeros=True)) == "Histogram(bins=8, axis=None, group_size=None, skip_zeros=True)"
