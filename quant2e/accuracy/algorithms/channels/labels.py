"""Channel labels: which factor lies on each value of a tensor, followed through ops that move values.

A label is the number of a factor, 0 that of the factor 1. The labels of a tensor are an int64 tensor of its rank, whose
size is 1 along axes where the label does not change: of a convolution's result (N, C, H, W) they are (1, C, 1, 1),
flattened behind it (1, C·H·W). An op that moves values moves labels, so it is run on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.data_movement import Effect, When, movement
from quant2e.graph.dataflow import literal, operand
from quant2e.graph.effects import trains
from quant2e.graph.fake_values import is_float, node_tensor, shape_of

aten = torch.ops.aten

Labels = Tensor | None
"""Labels of a tensor; None where all are 0."""

Size = int | torch.SymInt

MOST_LABELS = 1 << 22
"""More labels than these are not written out one by one."""

_ONE_BY_ONE = frozenset({Effect.PICK, Effect.REORDER, Effect.SHUFFLE, Effect.REPEAT})
_WITH_ZEROS = frozenset({aten.tril.default, aten.triu.default})
_EXPANDING = frozenset(
    {aten.expand.default, aten.expand_as.default, aten.expand_copy.default, aten.broadcast_to.default}
)


def tidy(labels: Tensor) -> Labels:
    """The same labels with size 1 along every axis where they do not change; None where all are 0."""
    for axis in range(labels.dim()):
        first = labels.narrow(axis, 0, min(1, labels.size(axis)))
        if labels.size(axis) > 1 and bool((labels == first).all()):
            labels = first
    return labels if bool(labels.any()) else None


def aligned(labels: Tensor, rank: int) -> Tensor:
    """Labels of a tensor that is broadcast to ``rank`` axes."""
    return labels.reshape((1,) * (rank - labels.dim()) + tuple(labels.shape))


def along(labels: Labels, axis: int, size: int) -> Tensor | None:
    """The labels along one axis, ``(size,)``; None where they change along another one as well."""
    if labels is None:
        return torch.zeros(size, dtype=torch.int64)
    if labels.numel() != labels.size(axis):
        return None
    return labels.flatten().expand(size)


def on_axis(vector: Tensor, axis: int, rank: int) -> Tensor:
    """Labels of a tensor of ``rank`` axes that change along one of them."""
    return vector.reshape([-1 if other == axis % rank else 1 for other in range(rank)])


def moved(node: Node, labels: Tensor) -> Tensor | None:
    """Labels of what an op that only moves values makes of its first operand; None where they cannot be told."""
    row, source = movement(node.target), operand(node, 0)
    if row is None or not isinstance(source, Node) or node_tensor(node) is None:
        return None
    if row.effect is Effect.SAME:
        kept = is_float(node) if row.when is When.SAME_DTYPE else not trains(node)
        return labels if kept else None
    if row.effect is Effect.RESHAPE:
        return reshaped(labels, shape_of(source), shape_of(node))
    if node.target in _EXPANDING:
        return aligned(labels, len(shape_of(node)))
    if node.target in _WITH_ZEROS:
        return labels
    if row.effect is Effect.PERMUTE:
        return _tensor(_run(node, labels))
    if row.effect in (Effect.SLICE, Effect.SELECT):
        axis = _axis(node, labels)
        if axis is not None and labels.size(axis) == 1:
            return labels.squeeze(axis) if row.effect is Effect.SELECT else labels
        return _tensor(_run(node, labels))
    return _one_by_one(node, labels, shape_of(source)) if row.effect in _ONE_BY_ONE else None


def split_labels(node: Node, labels: Tensor) -> list[Tensor] | None:
    """Labels of the tensors into which an op splits its first operand; None where they cannot be told."""
    made, axis = node.meta.get("val"), _axis(node, labels)
    if axis is None or not isinstance(made, list | tuple):
        return None
    if labels.size(axis) > 1:
        found = _run(node, labels)
        return list(found) if isinstance(found, list | tuple) and len(found) == len(made) else None
    if all(part.dim() == labels.dim() for part in made):
        return [labels] * len(made)
    return [labels.squeeze(axis)] * len(made)


def reshaped(labels: Tensor, before: Sequence[Size], after: Sequence[Size]) -> Tensor | None:
    """Labels of the same values in the same order, in other sizes; None where channels mix with a size that varies."""
    left = _blocks(before, after)
    i, j = (sum(lengths) for lengths in zip(*left, strict=True)) if left else (0, 0)
    right = _blocks(before[i:][::-1], after[j:][::-1])[::-1]
    m, n = (sum(lengths) for lengths in zip(*right, strict=True)) if right else (0, 0)
    between = [(len(before) - i - m, len(after) - j - n)]
    wide: list[int] = []
    final: list[int] = []
    start = stop = 0
    for count, made in (*left, *between, *right):
        old, new = before[start : start + count], after[stop : stop + made]
        start, stop = start + count, stop + made
        if prod(labels.shape[start - count : start]) == 1:
            wide += [1] * count
            final += [1] * made
            continue
        if not all(isinstance(size, int) for size in (*old, *new)):
            return None
        wide += [int(size) for size in old]
        final += [int(size) for size in new]
    return labels.expand(wide).reshape(final)


def _blocks(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[int, int]]:
    """Runs of axes from the front that hold the same values: how many before and after; up to sizes that vary."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        m, n = (1, 1) if _same(before[i], after[j]) else _block(before[i:], after[j:])
        if m == 0:
            break
        found.append((m, n))
        i, j = i + m, j + n
    return found


def _block(before: Sequence[Size], after: Sequence[Size]) -> tuple[int, int]:
    """The fewest axes from the front with equal products of fixed sizes; 0 and 0 where there are none."""
    m = n = 1
    while all(isinstance(size, int) for size in (*before[:m], *after[:n])):
        p, q = prod(before[:m]), prod(after[:n])
        if p == q:
            return m, n
        if m + (p < q) > len(before) or n + (p > q) > len(after):
            break
        m, n = m + (p < q), n + (p > q)
    return 0, 0


def _same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every input; asks no question that would become a guard."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def _axis(node: Node, labels: Tensor) -> int | None:
    axis = literal(node, "dim")
    return axis % labels.dim() if isinstance(axis, int) else None


def _one_by_one(node: Node, labels: Tensor, sizes: Sequence[Size]) -> Tensor | None:
    """What an op makes of labels that are written out for every value."""
    if not all(isinstance(size, int) for size in sizes) or prod(sizes) > MOST_LABELS:
        return None
    found = _run(node, labels.expand([int(size) for size in sizes]).contiguous())
    return found if isinstance(found, Tensor) and tuple(found.shape) == tuple(shape_of(node)) else None


def _tensor(made: Any) -> Tensor | None:
    return made if isinstance(made, Tensor) else None


def _run(node: Node, labels: Tensor) -> Any:
    """What an op makes of labels in the place of its first operand; None where another operand is no literal."""
    source = operand(node, 0)
    if any(other is not source for other in node.all_input_nodes):
        return None
    args = tuple(labels if arg is source else arg for arg in node.args)
    kwargs = {name: labels if arg is source else arg for name, arg in node.kwargs.items()}
    assert callable(node.target), "a call"
    try:
        return node.target(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError):  # not for these sizes, or not for integers
        return None
