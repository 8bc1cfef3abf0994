"""Drawing a graph as a list with lines: one row for each op, and one lane for each value that is still to be read.

A value keeps its lane from the row of the op that makes it to the row of its last reader, so no line crosses an op.
An op takes the lane of an operand that it reads last, else the first free one: a chain is one straight line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant2e.page.section import FlowNode

_ROW, _LANE, _MARGIN = 26, 16, 14
"""Pixels between two rows, between two lanes, and at the edges."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a node stands: ``x``, ``y`` of its dot, and ``text``, where its label begins, in pixels."""

    node: FlowNode
    x: int
    y: int
    text: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """A graph laid out: ``width`` and ``height`` in pixels, ``spots`` of nodes, ``lines`` as paths of SVG."""

    width: int
    height: int
    spots: tuple[Spot, ...]
    lines: tuple[str, ...]


def lanes_of(nodes: Sequence[FlowNode]) -> list[int]:
    """The lane of each node, counted from the left. Inputs that no node before has the id of are left out."""
    row = {node.id: index for index, node in enumerate(nodes)}
    last = {node.id: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        last |= dict.fromkeys(_before(node, row), index)
    free: list[int] = []
    lanes: list[int] = []
    most = 0
    for index, node in enumerate(nodes):
        ends = [lanes[row[name]] for name in _before(node, row) if last[name] == index]
        free = sorted({*free, *ends})
        lane = ends[0] if ends else free[0] if free else most
        most = max(most, lane + 1)
        free = [other for other in free if other != lane]
        lanes.append(lane)
        if last[node.id] == index:  # nothing reads it
            free = sorted({*free, lane})
    return lanes


def _before(node: FlowNode, row: Mapping[str, int]) -> list[str]:
    """What it reads of the nodes before it, each once."""
    own = row[node.id]
    return [name for name in dict.fromkeys(node.inputs) if row.get(name, own) < own]


def drawing(nodes: Sequence[FlowNode]) -> Drawing:
    """Where nodes and lines go. The ids of nodes differ."""
    lanes = lanes_of(nodes)
    row = {node.id: index for index, node in enumerate(nodes)}
    text = _MARGIN + (max(lanes, default=0) + 1) * _LANE
    spots = [
        Spot(node, _MARGIN + lane * _LANE, _MARGIN + index * _ROW, text)
        for index, (node, lane) in enumerate(zip(nodes, lanes, strict=True))
    ]
    lines = [_line(spots[row[name]], spots[index]) for index, node in enumerate(nodes) for name in _before(node, row)]
    longest = max((len(node.label) + len(node.detail) for node in nodes), default=0)
    return Drawing(text + 8 * longest + 3 * _MARGIN, 2 * _MARGIN + (len(nodes) - 1) * _ROW, tuple(spots), tuple(lines))


def _line(begin: Spot, end: Spot) -> str:
    """Down the lane of the value, and over to its reader in the last row."""
    if begin.x == end.x:
        return f"M{begin.x} {begin.y}V{end.y}"
    turn = end.y - _ROW
    down = f"V{turn}" if turn > begin.y else ""
    return f"M{begin.x} {begin.y}{down}C{begin.x} {end.y - 8} {end.x} {turn + 8} {end.x} {end.y}"
