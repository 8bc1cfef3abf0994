from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.observers.measuring import HistogramObserver
from quant2e.ranges.exact_sum import COUNT, mean, slots_of
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.search import mean_of_maxima

VALUES = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=30)


def total(values):
    return slots_of(torch.tensor(values), torch.ones(len(values), dtype=torch.bool)).sum(0)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.randoms())
def test_the_mean_is_exact_in_any_order(values, random):
    exact = float(sum(Fraction(v) for v in values) / len(values))
    assert mean(total(values)) == exact
    random.shuffle(values)
    assert mean(total(values)) == exact


def test_what_is_not_wanted_does_not_count():
    slots = slots_of(torch.tensor([3.0, 5.0]), torch.tensor([True, False])).sum(0)
    assert (int(slots[COUNT]), mean(slots)) == (1, 3.0)
    assert mean(torch.zeros(256, dtype=torch.int64)) == 0.0


def test_mean_of_maxima_against_a_slow_implementation():
    batches = [torch.randn(1000 + i) * (1 + i) for i in range(7)]
    low = sum(Fraction(x.min().item()) for x in batches) / 7
    high = sum(Fraction(x.max().item()) for x in batches) / 7
    estimator, fast = Histogram(64), HistogramObserver(64, method="mean_of_maxima")
    states = []
    for x in batches:
        states.append(estimator.update(estimator.init(), x))
        fast(x)
    merged = states[0]
    for state in states[:0:-1]:
        merged = estimator.merge(state, merged)
    empty = estimator.update(merged, torch.tensor([float("nan")]))
    for state in (merged, empty, fast.state):
        assert mean_of_maxima(state) == (float(low), float(high))
    assert torch.equal(fast.range()[1], torch.tensor(float(high), dtype=torch.float32))
