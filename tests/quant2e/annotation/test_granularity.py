"""Blocks that share a scale."""

from __future__ import annotations

import pytest
import torchao.quantization.granularity as theirs
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization.utils import get_block_size as their_block_size

from quant2e import AnnotationError
from quant2e.annotation.granularity import PerAxis, PerGroup, PerRow, PerTensor, PerToken, get_block_size


@pytest.mark.parametrize(
    ("granularity", "block"),
    [
        (PerTensor(), (4, 6, 8)),
        (PerAxis(1), (4, 1, 8)),
        (PerAxis(-1), (4, 6, 1)),
        (PerGroup(4), (1, 1, 4)),
        (PerToken(), (1, 1, 8)),
        (PerRow(), (1, 1, 8)),
        (PerRow(0), (4, 1, 1)),
    ],
)
def test_block(granularity, block):
    assert get_block_size((4, 6, 8), granularity) == block


@given(shape=st.lists(st.integers(1, 8).map(lambda n: 4 * n), min_size=1, max_size=4), data=st.data())
def test_agrees_with_the_peer(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    for ours, other in (
        (PerTensor(), theirs.PerTensor()),
        (PerAxis(axis), theirs.PerAxis(axis)),
        (PerGroup(4), theirs.PerGroup(4)),
        (PerToken(), theirs.PerToken()),
        (PerRow(axis), theirs.PerRow(axis)),
    ):
        assert get_block_size(tuple(shape), ours) == tuple(their_block_size(tuple(shape), other))


@pytest.mark.parametrize(
    ("shape", "granularity", "message"),
    [
        ((4, 6), PerGroup(4), "groups of 4 do not divide the last dimension, 6"),
        ((4, 6), PerAxis(2), "axis 2 does not exist"),
        ((), PerToken(), "needs a last dimension"),
        ((4,), object(), "unknown granularity"),
    ],
)
def test_what_cannot_be(shape, granularity, message):
    with pytest.raises(AnnotationError, match=message):
        get_block_size(shape, granularity)
