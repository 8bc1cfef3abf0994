"""Places along axes: found by running ops, and taken by slices and views that give the same tensor."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant2e.graph.constants import Constants
from quant2e.graph.places import Runs, SplitAxis, places_along_axes, slicing, slicings

aten = torch.ops.aten
OWN = "it puts values of its own between those of its operand"
IMAGE = torch.randn(2, 4, 6, 6)


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("order", torch.tensor([3, 0, 1]))

    def forward(self, x):
        return self.function(self, x)


def last_op(function, x=IMAGE, **options):
    gm = torch.export.export(Fn(function), (x,), strict=False, **options).module(check_guards=False)
    moves = [node for node in gm.graph.nodes if node.op == "call_function" and "Tensor" in str(node.target._schema)]
    return moves[-1], Constants(gm.graph)


def taken(x, axis, along):
    """What a slicing takes, by slices of two views at most at a time."""
    if isinstance(along, Runs):
        return torch.cat([x.narrow(axis, start, stop - start) for start, stop in along.spans], axis)
    split = taken(x.unflatten(axis, (along.outer.size, along.inner.size)), axis, along.outer)
    return taken(split, axis + 1, along.inner).flatten(axis, axis + 1)


MOVES = {
    "flip": lambda m, x: x.flip(0, -1),
    "roll": lambda m, x: x.roll((1, -2), (2, 3)),
    "fftshift": lambda m, x: torch.fft.fftshift(x),
    "step": lambda m, x: x[:, :, 1::2],
    "index_select": lambda m, x: x.index_select(2, m.order),
    "index": lambda m, x: x[:, [3, 0, 0]],
    "gather": lambda m, x: x.gather(3, m.order.expand(2, 4, 6, 3)),
    "repeat": lambda m, x: x.repeat(2, 1, 1, 3, 1),
    "expand": lambda m, x: x[:, :1].expand(3, 2, 4, 6, 6),
    "tile": lambda m, x: x.tile(1, 2),
    "repeat_interleave": lambda m, x: x.repeat_interleave(3, 1),
    "nearest": lambda m, x: F.interpolate(x, scale_factor=2.0),
    "nearest, by no whole factor": lambda m, x: F.interpolate(x, size=(8, 9)),
    "nearest in three dimensions": lambda m, x: F.interpolate(x[:, :, None], scale_factor=(2, 1, 3)),
    "reflect": lambda m, x: F.pad(x, (2, 1, 0, 3), mode="reflect"),
    "replicate": lambda m, x: F.pad(x, (2, 1, 0, 3), mode="replicate"),
    "circular": lambda m, x: F.pad(x, (2, 1, 0, 3), mode="circular"),
}


@pytest.mark.parametrize("name", MOVES)
def test_slices_take_what_the_op_takes(name):
    node, constants = last_op(MOVES[name])
    found = slicings(node, constants)
    assert not isinstance(found, str), found
    x = IMAGE if node.args[0].op == "placeholder" else None
    if x is None:  # an indexed or raised operand: its own values
        x = torch.randn(node.args[0].meta["val"].shape)
    args = [torch.tensor([3, 0, 0]) if isinstance(arg, list) and name == "index" else arg for arg in node.args[1:]]
    result = x.reshape([1] * (len(found) - x.dim()) + list(x.shape))
    for axis, along in enumerate(found):
        result = taken(result, axis, along)
    expected = MOVES[name](Fn(None), IMAGE) if x is IMAGE else node.target(x, *args, **node.kwargs)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x + x, "'add' is not known to move values of one tensor"),
        (lambda m, x: x.as_strided((2, 2), (1, 2)), "what it takes depends on how its operand lies in memory"),
        (lambda m, x: x.tril(), "it puts zeros between values"),
        (lambda m, x: F.pad(x, (1, 1)), "it puts zeros between values"),
        *(
            (lambda m, x, value=value, sizes=sizes: F.pad(x[:1, :1, :1], sizes, value=value), OWN)
            for value in (2.0, 1.0, 0.5, -3.0, 1e9, math.inf, -math.inf, math.nan)
            for sizes in ((1, 1), (0, 0, 2, 0))
        ),
        (lambda m, x: x.diagonal(), "it has fewer axes than its operand"),
        (lambda m, x: x.roll(5), "what it takes along one axis depends on another"),
        (lambda m, x: x.index_select(2, x.int()[0, 0, 0]), "which says what it takes, is not constant"),
        (lambda m, x: torch.cat([x] * 7, 2).flip(2)[:, :, :41].flip(2), "it takes 43 slices and concatenations"),
    ],
)
def test_what_is_no_matter_of_places_or_slices_says_why(function, reason):
    assert reason in slicings(*last_op(function))


def test_sizes_that_vary_have_no_places():
    batch = {0: torch.export.Dim.DYNAMIC}
    node, constants = last_op(lambda m, x: x.flip(2), dynamic_shapes=(batch,))
    assert places_along_axes(node, constants) == "it has sizes that vary"


@pytest.mark.parametrize(
    ("size", "places", "ops"),
    [
        (6, range(6), 0),
        (6, range(2, 5), 2),  # a view and a slice
        (640, range(1, 640, 2), 2),  # pairs, of which the second
        (5, [*range(5)] * 3, 5),  # the axis three times
        (5, [place for place in range(5) for _ in range(2)], 4),
        (8, [2, 1, *range(8), 6, 5], 7),
        (768, range(767, -1, -1), 29),  # by its factors, not one by one
        (9, [place * 9 // 12 for place in range(12)], 4),
    ],
)
def test_how_many_ops_places_take(size, places, ops):
    found = slicing(size, tuple(places))
    assert found.ops == ops
    assert found.size == size
    assert isinstance(found, Runs | SplitAxis)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), min_size=1))))
def test_any_places_are_taken(case):
    size, places = case
    x = torch.arange(size)
    assert torch.equal(taken(x, 0, slicing(size, tuple(places))), x[places])
