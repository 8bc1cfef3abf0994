"""Sentinels: which values of a tensor stand for "never", and which are data that is merely large."""

import math

import pytest
import torch

from quant2e.ranges.minmax import MinMax
from quant2e.ranges.sentinels import hide_sentinels, owned_by_sentinels

DATA = torch.linspace(-3, 3, 25)
BELOW = (32.0, math.inf)
EITHER = (32.0, 32.0)


def joined(*values):
    return torch.cat([DATA, torch.tensor(values)])


# values beside DATA, what may be a sentinel -> how many are hidden
CASES = {
    "BERT's old mask": ((-1e4, -1e4), BELOW, 2),
    "scores under a mask": ((-1e9 + 3, -1e9 - 3), BELOW, 2),
    "two masks, added": ((-1e4, -2e4), BELOW, 2),
    "float16's lowest": ((-65504.0,), BELOW, 1),
    "the largest ratio of data": ((-191.0,), BELOW, 0),
    "just beyond it": ((-193.0,), BELOW, 1),
    "an outlier, 60 times larger": ((-180.0,), BELOW, 0),
    "outliers on both sides": ((-1e4, 1e4), EITHER, 0),
    "the other sign": ((1e4,), BELOW, 0),
    "either sign": ((1e4,), EITHER, 1),
    "something between": ((-1e4, -100.0), BELOW, 1),
    "a tail without a gap": ((-1e4, -2e3, -500.0, -100.0, -20.0), BELOW, 0),
    "beside infinities": ((-1e4, -math.inf), BELOW, 1),
    "beside NaN": ((-1e4, math.nan), BELOW, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_hidden(case, dtype):
    values, never, count = CASES[case]
    x = joined(*values).to(dtype)
    hidden = hide_sentinels(x, never)
    assert hidden.dtype == dtype
    if dtype == torch.float32 or ("ratio" not in case and "beyond" not in case):
        assert int(torch.isinf(hidden).sum()) - int(torch.isinf(x).sum()) == count
    assert torch.equal(hidden[:25], x[:25])


def test_a_compiled_graph_finds_the_same():
    for values, never, _ in CASES.values():
        x = joined(*values)
        made = torch.compile(hide_sentinels, backend="eager", dynamic=False)(x, never)
        assert torch.equal(made.nan_to_num(7.0), hide_sentinels(x, never).nan_to_num(7.0))


@pytest.mark.parametrize("x", [torch.zeros(0), torch.zeros(3), torch.full((4,), -1e4), torch.tensor(-1e4)])
def test_without_other_values_there_is_nothing_to_tell_apart(x):
    assert torch.equal(hide_sentinels(x, BELOW), x)


def test_a_mask_of_two_values():
    mask = torch.tensor([0.0, -100.0, 0.0, -100.0])
    assert torch.isinf(hide_sentinels(mask, BELOW)).tolist() == [False, True, False, True]
    assert torch.equal(hide_sentinels(mask, (1000.0, math.inf)), mask)


def test_what_is_hidden_counts_as_masked_and_moves_no_range():
    state = MinMax().update(MinMax().init(), hide_sentinels(joined(-1e9, -1e9), BELOW))
    assert (state.min_val.item(), state.max_val.item(), state.counts.tolist()) == (-3.0, 3.0, [27, 0, 0, 2])


@pytest.mark.parametrize(
    ("low", "high", "never", "owned"),
    [
        (-1e4, 5.0, BELOW, True),
        (-math.inf, 5.0, BELOW, True),
        (-1e4, 0.0, BELOW, True),
        (-500.0, 1.0, BELOW, False),
        (-1e4, 200.0, BELOW, False),
        (-5.0, 1e4, BELOW, False),
        (-5.0, 1e4, EITHER, True),
    ],
)
def test_a_range_alone(low, high, never, owned):
    assert owned_by_sentinels(low, high, never) is owned
