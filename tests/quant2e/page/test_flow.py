"""Graphs as lists with lines: which lane each op takes, and that no line crosses an op."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant2e.page.flow import drawing, lanes_of
from quant2e.page.section import FlowNode


def nodes(**inputs):
    return [FlowNode(id=name, label=name, kind="static", inputs=tuple(read)) for name, read in inputs.items()]


@pytest.mark.parametrize(
    ("graph", "lanes"),
    [
        (nodes(), []),
        (nodes(x="", a="x", b="a"), [0, 0, 0]),
        (nodes(x="", a="x", b="a", c="xb"), [0, 1, 1, 0]),  # a residual addition
        (nodes(x="", q="x", k="x", v="x", s="qk", o="sv"), [0, 1, 2, 0, 1, 1]),  # attention
        (nodes(a="?", b="?"), [0, 0]),  # nothing is known of what they read
        (nodes(a="aa", b="aa"), [0, 0]),
    ],
)
def test_lanes(graph, lanes):
    assert lanes_of(graph) == lanes


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 12))
    return [
        FlowNode(
            id=str(index),
            label="",
            kind="float",
            inputs=tuple(map(str, draw(st.lists(st.integers(0, max(index - 1, 0)), max_size=3)))) if index else (),
        )
        for index in range(count)
    ]


@given(graphs())
def test_a_value_has_its_lane_for_itself_until_it_was_read(graph):
    lanes = lanes_of(graph)
    for reader, node in enumerate(graph):
        for name in node.inputs:
            between = range(int(name) + 1, reader)
            assert all(lanes[row] != lanes[int(name)] for row in between)


def test_lines_go_from_an_operand_to_its_reader():
    drawn = drawing(nodes(x="", a="x", b="xa"))
    assert [(spot.x, spot.y) for spot in drawn.spots] == [(14, 14), (30, 40), (14, 66)]
    assert len(drawn.lines) == 3
    assert drawn.lines[1] == "M14 14V66"
    assert all(line.startswith("M") for line in drawn.lines)
    assert drawn.height == 80
