import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import CalibrationError
from quant2e.ranges.minmax import SENTINEL, MinMax, MovingAverage, look, sentinel_of

INF, NAN = math.inf, math.nan


def seen(estimator, *tensors):
    state = estimator.init()
    for x in tensors:
        state = estimator.update(state, x)
    return state


def numbers(state):
    return state.min_val.tolist(), state.max_val.tolist(), state.counts.tolist()


def same(a, b):
    """Equal bit for bit: -0.0 is not 0.0."""
    return repr(numbers(a)) == repr(numbers(b))


# tensors, axis -> min, max, [total, nan, +inf, masked]
TABLE = [
    ([], None, INF, -INF, [0, 0, 0, 0]),
    ([[]], None, INF, -INF, [0, 0, 0, 0]),
    ([[1.0, -2.0], [3.0]], None, -2.0, 3.0, [3, 0, 0, 0]),
    ([[1.0, NAN, INF, -INF, 3.0, -3.4e38, SENTINEL, 2.0]], None, 1.0, 3.0, [8, 1, 1, 3]),
    ([[-INF, -INF]], None, INF, -INF, [2, 0, 0, 2]),
    ([[1e30, -1e30]], None, -1e30, 1e30, [2, 0, 0, 0]),  # large, but below 2**100
    ([[[1.0, 2.0], [3.0, -4.0]]], 0, [1.0, -4.0], [2.0, 3.0], [4, 0, 0, 0]),
    ([[[1.0, 2.0], [3.0, -4.0]]], 1, [1.0, -4.0], [3.0, 2.0], [4, 0, 0, 0]),
    ([[[1.0, 2.0], [3.0, -4.0]]], -1, [1.0, -4.0], [3.0, 2.0], [4, 0, 0, 0]),
    ([[1.0, 2.0], [0.0, 5.0]], 0, [0.0, 2.0], [1.0, 5.0], [4, 0, 0, 0]),  # one dimension: each value a channel
    ([[[1.0, NAN], [-INF, -INF]]], 0, [1.0, INF], [1.0, -INF], [4, 1, 0, 2]),
    ([], 0, [], [], [0, 0, 0, 0]),
]


@pytest.mark.parametrize(("tensors", "axis", "low", "high", "counts"), TABLE)
def test_min_max(tensors, axis, low, high, counts):
    state = seen(MinMax(axis), *(torch.tensor(t, dtype=torch.float32) for t in tensors))
    expected = torch.tensor(low), torch.tensor(high)
    assert state.min_val.dtype == state.max_val.dtype == torch.float32
    assert state.min_val.tolist() == expected[0].tolist()
    assert state.max_val.tolist() == expected[1].tolist()
    assert state.counts.tolist() == counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes(dtype):
    x = torch.tensor([0.5, -1.5, torch.finfo(dtype).min, -INF, NAN], dtype=dtype)
    assert numbers(seen(MinMax(), x)) == (-1.5, 0.5, [5, 1, 0, 2])


def test_what_counts_as_a_mask():
    assert (sentinel_of(torch.float32), sentinel_of(torch.bfloat16), sentinel_of(torch.float16)) == (
        2**100,
        2**100,
        65504,
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("estimator", [MinMax(), MovingAverage()])
def test_integers_have_no_range(dtype, estimator):
    with pytest.raises(CalibrationError, match="only floating-point tensors have a range"):
        estimator.update(estimator.init(), torch.ones(3, dtype=dtype))


def test_an_update_is_pure():
    estimator = MinMax()
    before = seen(estimator, torch.tensor([1.0]))
    copy = numbers(before)
    x = torch.tensor([5.0], requires_grad=True)
    after = estimator.update(before, x)
    assert numbers(before) == copy
    assert not after.max_val.requires_grad


def test_moving_average_by_hand():
    estimator = MovingAverage(0.25)
    state = seen(
        estimator, torch.tensor([0.0, 4.0]), torch.tensor([-4.0, 8.0]), torch.tensor([]), torch.tensor([-1.0, 5.0])
    )
    assert numbers(state) == (-1.0, 5.0, [6, 0, 0, 0])  # 0 -> -1 -> -1 and 4 -> 5 -> 5


def test_a_masked_batch_does_not_move_an_average():
    estimator = MovingAverage(0.5, axis=0)
    state = seen(estimator, torch.tensor([[2.0], [-INF]]), torch.tensor([[4.0], [6.0]]), torch.tensor([[-INF], [8.0]]))
    assert numbers(state) == ([3.0, 7.0], [3.0, 7.0], [6, 0, 0, 2])


def test_moving_averages_do_not_merge():
    estimator = MovingAverage()
    with pytest.raises(CalibrationError, match="depend on the order"):
        estimator.merge(estimator.init(), estimator.init())


def test_the_channel_axis_must_exist_and_stay():
    with pytest.raises(CalibrationError, match="no channel axis 2"):
        seen(MinMax(2), torch.ones(2, 2))
    for estimator in (MinMax(0), MovingAverage(axis=0)):
        with pytest.raises(CalibrationError, match="saw 2 channels before and 3 now"):
            seen(estimator, torch.ones(2, 2), torch.ones(3, 2))


values = st.floats(width=32)  # with NaN, infinities, zeros of both signs and denormals
tensors = st.lists(values, max_size=6).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(st.lists(tensors, max_size=5), st.randoms())
def test_min_max_is_order_free_and_merges_exactly(batches, random):
    estimator = MinMax()
    whole = seen(estimator, *batches)
    shuffled = random.sample(batches, len(batches))
    assert same(seen(estimator, *shuffled), whole)
    cut = random.randint(0, len(batches))
    a, b = seen(estimator, *shuffled[:cut]), seen(estimator, *shuffled[cut:])
    assert same(estimator.merge(a, b), whole)
    assert same(estimator.merge(b, a), whole)
    if batches:
        assert same(seen(estimator, torch.cat(batches)), whole)


def test_look_marks_the_usable_values():
    assert look(torch.tensor([[1.0, 2.0]])).usable is None
    usable = look(torch.tensor([[1.0, NAN], [2.0, -INF]])).usable
    assert usable is not None
    assert usable.tolist() == [[True, False], [True, False]]
