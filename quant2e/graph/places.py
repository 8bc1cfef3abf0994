"""Places: from where along each axis an op that moves values takes them, and how few slices and views that is.

    index_select(x, 2, [3, 0, 1])     takes, along axis 2, the places 3, 0, 1:  cat(x[:, :, 3:4], x[:, :, 0:2])
    flip, repeat, tile, expand, a step in a slice, a reflecting pad, nearest upsampling        are such places, too

Which places they are is seen by moving numbers: an op is run on the numbers of its operand's elements, and again on
their negatives. What does not change sign is a value that the op brings, as a padding with ones does, and is no place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.data_movement import movement
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor

_BY_STRIDES = frozenset({torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_copy.default})
_SHAPES_ONLY = frozenset({torch.ops.aten.expand_as.default})
"""Of their second operand only the shape counts."""

Places = tuple[int, ...]
"""For each place along an axis of a result, the place of the operand's axis that its values come from."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Slices one behind the other: ``spans`` from one place up to another, of an axis of ``size``."""

    size: int
    spans: tuple[tuple[int, int], ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is the axis as it is."""
        return self.spans == ((0, self.size),)

    @property
    def count(self) -> int:
        """How many places."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def ops(self) -> int:
        """How many views, slices and concatenations."""
        joined = len(self.spans) > 1
        return 0 if self.is_whole else 1 + len(self.spans) + joined


@dataclass(frozen=True, slots=True)
class SplitAxis:
    """The axis seen as two, with places along ``outer`` and then along ``inner``."""

    outer: Runs | SplitAxis
    inner: Runs | SplitAxis

    @property
    def size(self) -> int:
        """Size of the axis."""
        return self.outer.size * self.inner.size

    @property
    def ops(self) -> int:
        """How many views, slices and concatenations."""
        return self.outer.ops + self.inner.ops


Slicing = Runs | SplitAxis

MOST_OPS = 32
"""With more views, slices and concatenations than these a kernel that moves single values is as fast."""


def slicings(node: Node, constants: Constants) -> tuple[Slicing, ...] | str:
    """For each axis of the result of an op that moves values, its `slicing`; or why it is no matter of a few slices."""
    found = places_along_axes(node, constants)
    if isinstance(found, str):
        return found
    sizes = tuple(operand(node, 0).meta["val"].shape)
    made = tuple(map(slicing, (*[1] * (len(found) - len(sizes)), *sizes), found))
    ops = sum(along.ops for along in made)
    return made if ops <= MOST_OPS else f"it takes {ops} slices and concatenations"


def places_along_axes(node: Node, constants: Constants) -> tuple[Places, ...] | str:
    """For each axis of the result of an op that moves values, its places; or why it has none.

    Operands of fewer axes count as having axes of one place in front. Costs two runs of the op on 64-bit numbers.
    """
    row, x = movement(node.target), node_tensor(operand(node, 0))
    if row is None or x is None or node_tensor(node) is None:
        return f"'{node.name}' is not known to move values of one tensor"
    if node.target in _BY_STRIDES:
        return "what it takes depends on how its operand lies in memory"
    if not _fixed(x) or not _fixed(node_tensor(node)):
        return "it has sizes that vary"
    source = operand(node, 0)
    others = [other for other in node.all_input_nodes if other is not source and node.target not in _SHAPES_ONLY]
    if (other := next((other for other in others if other not in constants), None)) is not None:
        return f"'{other.name}', which says what it takes, is not constant"
    numbers = torch.arange(1, x.numel() + 1, dtype=torch.float64).reshape(x.shape)
    result = _run(node, numbers)
    if not torch.equal(_run(node, -numbers), -result):
        return "it puts values of its own between those of its operand"
    if bool((result == 0).any()):
        return "it puts zeros between values"
    return _separated(result.to(torch.int64) - 1, tuple(x.shape))


def _fixed(tensor: Tensor | None) -> bool:
    sizes: Sequence[Any] = () if tensor is None else tensor.shape
    return tensor is not None and all(isinstance(size, int) for size in sizes)


def _run(node: Node, numbers: Tensor) -> Tensor:
    """What an op makes of ``numbers`` in the place of its operand, with its other operands as they are."""
    gm, known = node.graph.owning_module, dict[Node, Any]()
    assert gm is not None, "graphs that are rewritten belong to a module"
    source = operand(node, 0)

    def value(other: Node) -> Any:
        if node.target in _SHAPES_ONLY and other is not source:
            return numbers.new_empty(other.meta["val"].shape)
        return numbers if other is source else evaluate(gm, other, known)

    args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
    assert callable(node.target), "a call"
    with torch.no_grad():
        result: Tensor = node.target(*args, **kwargs)
    return result


def _separated(result: Tensor, shape: tuple[int, ...]) -> tuple[Places, ...] | str:
    """Numbers of elements of a tensor of ``shape`` as places along each axis, if the axes do not mix."""
    lead = result.dim() - len(shape)
    if lead < 0 or 0 in result.shape:
        return "it has fewer axes than its operand" if lead < 0 else "it is empty"
    sizes = (*[1] * lead, *shape)
    strides = [int(np.prod(sizes[axis + 1 :])) for axis in range(len(sizes))]
    together, found = torch.zeros_like(result), []
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        line = result[tuple(slice(None) if other == axis else 0 for other in range(len(sizes)))]
        places = line // stride % size
        together += (places * stride).reshape([-1 if other == axis else 1 for other in range(len(sizes))])
        found.append(tuple(places.tolist()))
    return tuple(found) if torch.equal(together, result) else "what it takes along one axis depends on another"


@lru_cache(maxsize=1024)
def slicing(size: int, places: Places) -> Slicing:
    """The fewest views, slices and concatenations that take ``places`` of an axis of ``size``."""
    best: Slicing = Runs(size, tuple(_spans(places)))
    for inner, outer in _grids(size, places):
        if best.ops <= 2:  # a view and a slice: no grid has less
            return best
        made = SplitAxis(slicing(*outer), slicing(*inner))
        best = min(best, made, key=lambda candidate: candidate.ops)
    return best


def _spans(places: Places) -> Iterator[tuple[int, int]]:
    start = last = places[0]
    for place in places[1:]:
        if place != last + 1:
            yield start, last + 1
            start = place
        last = place
    yield start, last + 1


def _grids(size: int, places: Places) -> Iterator[tuple[tuple[int, Places], tuple[int, Places]]]:
    """Ways to see the axis and the places as rows of equal length: sizes and places within a row, and of rows."""
    line, count = np.array(places), len(places)
    for inside in _divisors(size):
        for length in _divisors(count):
            if (inside, length) in ((1, 1), (size, count)):
                continue
            table = line.reshape(-1, length)
            rows, columns = table[:, 0] // inside, table[0] % inside
            if (rows[:, None] * inside + columns == table).all():
                yield (inside, tuple(columns.tolist())), (size // inside, tuple(rows.tolist()))


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
