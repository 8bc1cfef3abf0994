"""``warm=``: what it compiles ahead, and what it refuses before anything is compiled."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lowering import to_inductor
from lowering.inductor.source import source_of
from lowering.inductor.warm import warm_calls
from quant2e import LoweringError, capture

Dim = torch.export.Dim


class Pair(nn.Module):
    def forward(self, x, y):
        return x.relu(), y + 1


@pytest.fixture(scope="module")
def one_size():
    return capture(nn.Linear(4, 4).eval(), (torch.randn(3, 4),), dynamic_shapes=({0: Dim("batch", min=1, max=32)},))


@pytest.fixture(scope="module")
def two_sizes():
    shapes = ({0: Dim("a", max=16)}, {1: Dim("b", max=16)})
    return capture(Pair(), (torch.randn(3, 4), torch.randn(2, 5)), dynamic_shapes=shapes)


def shapes_of(warm, model, example):
    calls = warm_calls(warm, source_of(model, example, None, "to_inductor"))
    return [[tuple(value.shape) for value in call.args] for call in calls]


def test_what_becomes_a_call(one_size, two_sizes):
    image, pair = (torch.randn(3, 4),), (torch.randn(3, 4), torch.randn(2, 5))
    assert shapes_of([1, 32], one_size, image) == [[(1, 4)], [(32, 4)]]
    assert shapes_of([{"input.shape[0]": 2}, torch.randn(7, 4)], one_size, image) == [[(2, 4)], [(7, 4)]]
    assert shapes_of([{"y.shape[1]": 9}], two_sizes, pair) == [[(3, 4), (2, 9)]]
    assert shapes_of([{"x.shape[0]": 1, "y.shape[1]": 9}], two_sizes, pair) == [[(1, 4), (2, 9)]]
    assert shapes_of([], capture(Pair(), pair), pair) == []


@pytest.mark.parametrize(
    ("warm", "said"),
    [
        (1, "warm is a int: give a list, of sizes or of inputs"),
        ([33], r"warm\[0\]: input.shape\[0\] = 33, and the graph was captured for 1 to 32"),
        ([2, 0], r"warm\[1\]: input.shape\[0\] = 0, and the graph was captured for 1 to 32"),
        ([{"batch": 1}], r"warm\[0\]: there is no size 'batch': those that vary are 'input.shape\[0\]'"),
        ([torch.randn(1, 5)], r"warm\[0\]: dimension 1 of input 'input' is 5, and the program was compiled for 4"),
    ],
)
def test_what_is_refused_before_it_is_compiled(one_size, warm, said):
    with pytest.raises(LoweringError, match=said):
        to_inductor(one_size, (torch.randn(3, 4),), warm=warm, progress=False)


def test_a_number_alone_says_nothing_where_two_sizes_vary(two_sizes):
    with pytest.raises(
        LoweringError, match=r"warm\[0\]: which size is meant\? those that vary are 'x.shape\[0\]', 'y.sh"
    ):
        to_inductor(two_sizes, (torch.randn(3, 4), torch.randn(2, 5)), warm=[1], progress=False)


def test_nothing_is_compiled_again_where_no_size_varies():
    model = capture(nn.Linear(4, 4).eval(), (torch.randn(3, 4),))
    with pytest.raises(LoweringError, match="warm: no size of this graph varies"):
        to_inductor(model, (torch.randn(3, 4),), warm=[3], progress=False)


@pytest.mark.slow
@pytest.mark.inductor
def test_a_warm_program_compiles_nothing_when_it_is_called(one_size, caplog):
    caplog.set_level(logging.INFO, "quant2e")
    cold = to_inductor(one_size, (torch.randn(3, 4),), verify=False)
    program = to_inductor(one_size, (torch.randn(3, 4),), warm=[1, 8])
    assert len(program.verification.outputs) == 1
    (note,) = [note for note in program.report.notes if "compiled ahead" in note]
    assert note.startswith("compiled ahead for input.shape[0] = 1, which")
    caplog.clear()
    for size in (1, 8, 3, 20):
        x = torch.randn(size, 4)
        assert torch.allclose(program(x), one_size(x), atol=1e-6)
    assert not any("compile again" in record.getMessage() for record in caplog.records)
    cold(torch.randn(1, 4))
    assert any("compile again for input.shape[0] = 1" in record.getMessage() for record in caplog.records)
