"""Layouts: where the values of a tensor come from that ops only move.

[n, rows, channels] ─ view, transpose, select, … ─▶ [n, heads, rows, size]: channels of the source, as heads

What ops do to places is found by letting them move the places themselves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lowering.native.units.unit import is_identity
from lowering.native.units.values import image_shape
from quant2e.graph.data_movement import Effect, When, movement

aten = torch.ops.aten

_MOVES = frozenset(
    {Effect.SAME, Effect.RESHAPE, Effect.PERMUTE, Effect.SLICE, Effect.SELECT, Effect.REPEAT, Effect.SPLIT}
)
_SAMPLES = 2
"""Of a batch whose size varies, where its places are followed: more than one, so that samples are told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads in the rows of ``source``, a tensor ``[n, rows, channels]``.

    ``count`` of them from channel ``first`` on, one behind the other, each ``size`` wide; repeated, they make
    ``readers``. ``moved``: the ops between, the last first.
    """

    source: Node
    first: int
    count: int
    size: int
    readers: int
    moved: tuple[Node, ...]


def moves(node: Node) -> bool:
    """Whether an op's result has values of its operand, in another place or shape."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[1], int)
    row = movement(node.target)
    return is_identity(node) or (row is not None and row.when is When.ALWAYS and row.effect in _MOVES and row.integers)


def moved_from(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """What the values of ``node`` were before ops moved them, and these ops, the last first."""
    passed = []
    while moves(node) and isinstance(node.args[0], Node):
        passed.append(node)
        node = node.args[0]
    return node, tuple(passed)


def heads_at(node: Node, *, transposed: bool = False) -> Heads | None:
    """The heads that ``node``, a tensor ``[n, heads, rows, size]`` or ``[n * heads, rows, size]``, was made of.

    None where they do not lie one behind the other in the rows of a tensor. ``transposed``: the last two axes of
    ``node`` are exchanged.
    """
    source, passed = moved_from(node)
    for end, start in reversed(list(enumerate((*passed, source)))):
        shape = image_shape(start)
        if shape is None or len(shape) != 3:
            continue
        places = follow(places_of(shape), passed[:end])
        if places is None or places.dim() not in (3, 4):
            continue
        found = _heads(start, places.transpose(-1, -2) if transposed else places)
        if found is not None:
            return replace(found, moved=passed[:end])
    return None


def _heads(source: Node, places: Tensor) -> Heads | None:
    """Read off what each value of ``[n, heads, rows, size]`` was in ``[n, rows, channels]``."""
    n, rows, channels = numbers(source.meta["val"].shape)
    size = places.shape[-1]
    if places.shape[-2] != rows or places.numel() % (n * rows * size):
        return None
    places = places.reshape(n, -1, rows, size)
    starts = places[0, :, 0, 0].tolist()
    first, count, readers = int(starts[0]), len(set(starts)), len(starts)
    if readers % count or first + count * size > channels:
        return None
    wanted = first + torch.arange(count).repeat_interleave(readers // count)[:, None, None] * size + torch.arange(size)
    wanted = wanted + torch.arange(rows)[:, None] * channels + torch.arange(n)[:, None, None, None] * rows * channels
    if not torch.equal(places, wanted):
        return None
    return Heads(source=source, first=first, count=count, size=size, readers=readers, moved=())


def rows_made_of(node: Node) -> tuple[Node, ...] | None:
    """The ops that put the heads of ``node``, ``[n, heads, rows, size]`` or ``[n * heads, rows, size]``, side by side:
    ``[n, rows, heads * size]`` is the result of the last. None where they do something else first.
    """
    passed: list[Node] = []
    last = node
    while len(last.users) == 1 and moves(user := next(iter(last.users))) and user.args[0] is last:
        last = user
        passed.append(last)
        shape = image_shape(last)
        if shape is None or len(shape) != 3:
            continue
        n, rows, channels = numbers(shape)
        sizes = numbers(node.meta["val"].shape)
        heads = math.prod(sizes[:-2]) // n
        if sizes[-2] != rows or heads * sizes[-1] != channels:
            continue
        places = places_of(sizes)
        wanted = places.reshape(n, heads, rows, -1).transpose(1, 2).reshape(n, rows, channels)
        found = follow(places, tuple(reversed(passed)))
        if found is not None and torch.equal(found, wanted):
            return tuple(passed)
    return None


def places_of(shape: Sequence[Any]) -> Tensor:
    """A number for each value of a tensor, in order."""
    sizes = numbers(shape)
    return torch.arange(math.prod(sizes)).view(sizes)


def numbers(shape: Sequence[Any]) -> tuple[int, ...]:
    """Sizes, with `_SAMPLES` for what varies."""
    return tuple(size if isinstance(size, int) else _number(size) for size in shape)


def _number(size: Any) -> int:
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _SAMPLES)))


def follow(places: Tensor, passed: Sequence[Node]) -> Tensor | None:
    """``places`` moved by ops, the last of which comes first; None where sizes that vary decide how."""
    value: Any = places
    for node in reversed(passed):
        row = movement(node.target)
        if is_identity(node) or (row is not None and row.effect is Effect.SAME):
            continue
        if row is not None and row.effect is Effect.RESHAPE:
            value = value.reshape(numbers(node.meta["val"].shape))
        elif node.target is aten.expand.default:
            value = value.expand(numbers(node.meta["val"].shape))
        elif len(node.all_input_nodes) != 1 or not callable(node.target):
            return None
        else:
            value = node.target(value, *node.args[1:], **node.kwargs)
    return value if isinstance(value, Tensor) else None
