"""Blocks of rows: every row once, and the bits of the whole."""

import pytest
import torch

from quant2e.graph.qdq_ops import qd
from quant2e.ranges import blocks
from quant2e.ranges.blocks import by_blocks, row_blocks

SIZES = {"several": (7, 70, 2), "one row each": (3, 30, 3), "all at once": (4, 8, 4), "a single row": (1, 40, 1)}


@pytest.mark.parametrize("case", SIZES)
def test_every_row_once(case, monkeypatch):
    monkeypatch.setattr(blocks, "VALUES", 20 if case != "one row each" else 5)
    rows, values, step = SIZES[case]
    found = [list(range(rows))[block] for block in row_blocks(rows, values)]
    assert [row for block in found for row in block] == list(range(rows))
    assert max(map(len, found)) == (step if case != "one row each" else 1)


def test_no_rows_are_one_block():
    assert list(row_blocks(0, 0)) == [slice(0, 0)]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strides", ["as they are", "turned"])
def test_the_bits_of_the_whole(axis, strides, monkeypatch):
    monkeypatch.setattr(blocks, "VALUES", 10)
    x = torch.randn(6, 9) if strides == "as they are" else torch.randn(9, 6).t()
    scale, zero = torch.rand(x.shape[axis]) / 20 + 0.01, torch.arange(x.shape[axis])
    args = (axis, -128, 127, torch.int8)
    whole = qd.quantize_per_channel.default(x, scale, zero, *args)
    found = by_blocks(qd.quantize_per_channel.default, x, (scale, zero), axis == 0, args, torch.int8)
    assert torch.equal(found, whole)
    assert (found.dtype, found.stride()) == (whole.dtype, x.stride())


def test_numbers_without_a_dimension():
    found = by_blocks(torch.mul, torch.tensor(3.0), (2.0,), True, (), torch.float32)
    assert found == 6
