"""Layouts: which heads of which tensor an operand of attention is made of, and which ops put heads side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.native.units.layouts import heads_at, rows_made_of
from lowering.native.units.rows import straighten_rows
from quant2e import capture

N, ROWS, HEADS, SIZE = 2, 5, 3, 4
WIDTH = HEADS * SIZE


def graph_of(function: Callable[[Tensor], Tensor], width: int) -> GraphModule:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return capture(Model(), (torch.randn(N, ROWS, width),))


def ends(gm: GraphModule) -> tuple[Node, Node]:
    """The input, and what is returned."""
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    last = gm.graph.output_node().args[0]
    return first, last[0] if isinstance(last, list | tuple) else last


MADE = {
    "view, transpose": (WIDTH, lambda x: x.view(N, ROWS, HEADS, SIZE).transpose(1, 2), (0, HEADS, HEADS)),
    "permute": (WIDTH, lambda x: x.view(N, ROWS, HEADS, SIZE).permute(0, 2, 1, 3), (0, HEADS, HEADS)),
    "one of three": (3 * WIDTH, lambda x: x.split(WIDTH, 2)[1].unflatten(2, (HEADS, SIZE)).transpose(1, 2),
                     (WIDTH, HEADS, HEADS)),
    "a slice": (WIDTH + 1, lambda x: x[..., 1:].unflatten(2, (HEADS, SIZE)).transpose(1, 2), (1, HEADS, HEADS)),
    "samples and heads joined": (WIDTH, lambda x: x.view(N, ROWS, HEADS, SIZE).transpose(1, 2).reshape(-1, ROWS, SIZE),
                                 (0, HEADS, HEADS)),
    "repeated": (SIZE * 2, lambda x: x.view(N, ROWS, 2, SIZE).transpose(1, 2).repeat_interleave(3, 1), (0, 2, 6)),
    "channels of heads first": (WIDTH, lambda x: x.view(N, ROWS, SIZE, HEADS).permute(0, 3, 1, 2), None),
    "repeated in turn": (SIZE * 2, lambda x: x.view(N, ROWS, 2, SIZE).transpose(1, 2).repeat(1, 3, 1, 1), None),
    "not transposed": (WIDTH, lambda x: x.view(N, HEADS, ROWS, SIZE), None),
}  # fmt: skip
"""By name: channels, the ops, and of what they make heads: first channel, heads, readers."""


@pytest.mark.parametrize("name", MADE)
def test_heads_are_known_by_where_their_values_come_from(name):
    width, function, wanted = MADE[name]
    first, last = ends(graph_of(function, width))
    found = heads_at(last)
    assert (None if found is None else (found.first, found.count, found.readers)) == wanted
    if found is not None:
        assert (found.source, found.size) == (first, SIZE)


def test_heads_of_rows_that_were_moved_are_those_of_the_tensor_behind():
    _, last = ends(graph_of(lambda x: x.flip(1).view(N, ROWS, HEADS, SIZE).transpose(1, 2), WIDTH))
    found = heads_at(last)
    assert found is not None
    assert found.source.target is torch.ops.aten.flip.default
    assert len(found.moved) == 2


def test_heads_of_keys_are_transposed():
    _, last = ends(graph_of(lambda x: x.view(N, ROWS, HEADS, SIZE).permute(0, 2, 3, 1), WIDTH))
    assert heads_at(last) is None
    found = heads_at(last, transposed=True)
    assert found is not None
    assert (found.first, found.count, found.size) == (0, HEADS, SIZE)


JOINED = {
    "transpose, reshape": (lambda x: x.transpose(1, 2).reshape(N, ROWS, WIDTH), True),
    "contiguous between": (lambda x: x.permute(0, 2, 1, 3).contiguous().view(N, ROWS, WIDTH), True),
    "and on": (lambda x: x.transpose(1, 2).reshape(N, ROWS, WIDTH).transpose(1, 2), True),
    "not transposed": (lambda x: x.reshape(N, ROWS, WIDTH), False),
}


@pytest.mark.parametrize("name", JOINED)
def test_heads_are_side_by_side_where_every_value_is(name):
    function, wanted = JOINED[name]

    def whole(x: Tensor) -> Tensor:
        return function(x.view(N, ROWS, HEADS, SIZE).transpose(1, 2).exp()) + 1

    gm = graph_of(whole, WIDTH)
    exp = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.exp.default)
    assert (rows_made_of(exp) is not None) == wanted


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.relu(x.transpose(0, 1)).transpose(0, 1),
        lambda x: torch.relu(x.reshape(-1, WIDTH)).view(N, ROWS, WIDTH) + x,
        lambda x: (torch.relu(x.transpose(0, 1)) + x.transpose(0, 1)).transpose(0, 1),
    ],
)
def test_an_op_on_rows_reads_them_where_they_lie(function):
    gm = graph_of(function, WIDTH)
    x = torch.randn(N, ROWS, WIDTH)
    before = gm(x)
    straighten_rows(gm)
    gm.recompile()
    relu = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.relu.default)
    assert relu.args[0] is ends(gm)[0]
    assert relu.meta["val"].shape == (N, ROWS, WIDTH)
    after = gm(x)
    assert torch.equal(*(y[0] if isinstance(y, list | tuple) else y for y in (before, after)))


def test_what_mixes_rows_and_channels_keeps_its_place():
    gm = graph_of(lambda x: torch.relu(x.transpose(1, 2)), WIDTH)
    text = str(gm.graph)
    straighten_rows(gm)
    assert str(gm.graph) == text
