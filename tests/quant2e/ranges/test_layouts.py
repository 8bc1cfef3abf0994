"""Channels and groups are tensors of their own; and what reads no value gives the same numbers as what does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.ranges import histogram, minmax
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.minmax import MinMax, MovingAverage
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.search import search

VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)


def seen(estimator, batches):
    state = estimator.init()
    for x in batches:
        state = estimator.update(state, x)
    return {part: value.tolist() for part, value in vars(state).items()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=4))
def test_behind_a_device_the_numbers_are_those_of_the_host(batches):
    batches = [torch.tensor(values) for values in batches]
    for estimator in (MinMax(), MovingAverage(0.3), Histogram(16)):
        host = seen(estimator, batches)
        with pytest.MonkeyPatch.context() as patch:
            for module in (minmax, histogram):
                patch.setattr(module, "on_host", lambda x: False)
            assert repr(seen(estimator, batches)) == repr(host)


LAYOUTS = [{"axis": 1}, {"axis": -1}, {"group_size": 4}]


def parts(x, axis=None, group_size=None):
    """The tensors that share a range."""
    if group_size is not None:
        return [x[..., i : i + group_size][j] for j in range(x.shape[0]) for i in range(0, x.shape[-1], group_size)]
    return list(x.movedim(axis, 0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_channels_and_groups_are_tensors_of_their_own(layout):
    batches = [torch.randn(3, 8) * 10**i for i in range(3)]
    batches[1][0, 0] = math.nan
    estimator = Histogram(32, **layout)
    state, bounds = estimator.init(), MinMax(**layout).init()
    for x in batches:
        state, bounds = estimator.update(state, x), MinMax(**layout).update(bounds, x)
    halves = [estimator.update(estimator.update(estimator.init(), batches[0]), batches[1])]
    halves.append(estimator.update(estimator.init(), batches[2]))
    merged = estimator.merge(halves[1], halves[0])
    for i, row in enumerate(state.rows()):
        alone = Histogram(32).init()
        for x in batches:
            alone = Histogram(32).update(alone, parts(x, **layout)[i])
        assert torch.equal(row.histogram, alone.histogram)
        assert torch.equal(merged.rows()[i].histogram, alone.histogram)
        assert (row.min_val, row.max_val) == (alone.min_val, alone.max_val)
        assert bounds.min_val.flatten()[i] == alone.min_val
        grid = NumberFormat(dtype=torch.int8, quant_min=-8, quant_max=7)
        found = search(state, grid, "mse")
        assert [v.flatten()[i] for v in found] == list(search(alone, grid, "mse"))
    assert state.counts.tolist() == [72, 1, 0, 0]
    assert state.min_val.shape == ((3, 2) if "group_size" in layout else (8,))


def test_layouts_that_make_no_sense_are_refused():
    for estimator in (MinMax, Histogram, MovingAverage):
        with pytest.raises(AnnotationError, match="group_size=4 with axis=0"):
            estimator(axis=0, group_size=4)
        with pytest.raises(AnnotationError, match="group_size=0"):
            estimator(group_size=0)
    with pytest.raises(CalibrationError, match="groups of 3 do not divide"):
        MinMax(group_size=3).update(MinMax(group_size=3).init(), torch.randn(2, 8))
    state = MinMax(group_size=4).update(MinMax(group_size=4).init(), torch.randn(3, 8))
    with pytest.raises(CalibrationError, match="saw 3x2 channels before and 5x2 now"):
        MinMax(group_size=4).update(state, torch.randn(5, 8))
    state = Histogram(8, axis=1).update(Histogram(8, axis=1).init(), torch.randn(3, 8))
    with pytest.raises(CalibrationError, match="saw 8 channels before and 6 now"):
        Histogram(8, axis=1).update(state, torch.randn(3, 6))


def test_nothing_is_read_back():
    """Meta tensors have no values: whatever runs on them reads none."""
    x = torch.empty(4, 100, device="meta")
    for estimator in (MinMax(), MovingAverage(), Histogram(16), MinMax(axis=0), Histogram(16, axis=0)):
        state = estimator.update(estimator.init(x), x)
        again = estimator.update(state, x)
        assert again.min_val.shape == state.min_val.shape
