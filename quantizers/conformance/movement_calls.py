"""Calls of data-movement ops: arguments with which they can be called on a tensor of some shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantizers.conformance.program import Shape

aten = torch.ops.aten

Choose = Callable[[Sequence[Any]], Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Move:
    """``arguments`` of a shape: what follows the tensor, and keywords. ``ranks``: of the tensors it takes."""

    arguments: Callable[[Shape, Choose], Arguments]
    ranks: tuple[int, ...] = (4, 3, 2)


def _fixed(*arguments: Any, ranks: tuple[int, ...] = (4, 3, 2), **keywords: Any) -> Move:
    return Move(lambda _shape, _choose: (arguments, keywords), ranks)


def _of(make: Callable[[Shape, Choose], tuple[Any, ...]], *ranks: int) -> Move:
    return Move(lambda shape, choose: (make(shape, choose), {}), ranks or (4, 3, 2))


def _resized(shape: Shape, choose: Choose) -> tuple[Any, ...]:
    total = math.prod(shape)
    return (choose([[shape[0], total // shape[0]], [total], [*shape[:-1], 1, shape[-1]]]),)


def _reversed_axes(shape: Shape, choose: Choose) -> tuple[Any, ...]:
    axes = list(range(len(shape)))
    return (choose([[axes[0], *axes[:0:-1]], axes[::-1]]),)


def _padding(shape: Shape, choose: Choose) -> tuple[Any, ...]:
    return (choose([[1, 1] * (len(shape) - 2), [0, 1], [1, 1] * (len(shape) - 1)] if len(shape) > 2 else [[1, 1]]),)


def _padding_with_mode(shape: Shape, choose: Choose) -> tuple[Any, ...]:
    return (*_padding(shape, choose), "constant", choose([None, 0.0, 1.0]))


def _expanded(shape: Shape, _choose: Choose) -> tuple[Any, ...]:
    return ([2, *shape],)


CALLS: Mapping[Any, Move] = {
    aten.view.default: _of(_resized),
    aten._unsafe_view.default: _of(_resized),
    aten.reshape.default: _of(_resized),
    aten.flatten.using_ints: _of(lambda _s, choose: (1, choose([-1, -1, 1]))),
    aten.unflatten.int: _of(lambda shape, _c: (len(shape) - 1, [1, shape[-1]])),
    aten.permute.default: _of(_reversed_axes),
    aten.transpose.int: _of(lambda _s, choose: choose([(0, 1), (-1, -2)])),
    aten.swapaxes.default: _fixed(0, 1),
    aten.swapdims.default: _fixed(0, 1),
    aten.movedim.int: _fixed(0, 1),
    aten.movedim.intlist: _fixed([0], [1]),
    aten.t.default: _fixed(ranks=(2,)),
    aten.numpy_T.default: _fixed(ranks=(2,)),
    aten.mT.default: _fixed(),
    aten.slice.Tensor: _of(lambda shape, choose: (choose([1, -1]), 0, max(1, shape[-1] // 2))),
    aten.select.int: _fixed(1, 0, ranks=(4, 3)),
    aten.narrow.default: _fixed(1, 0, 1),
    aten.squeeze.default: _fixed(),
    aten.squeeze.dim: _fixed(0),
    aten.squeeze.dims: _fixed([0, 1]),
    aten.unsqueeze.default: _of(lambda _s, choose: (choose([0, 1, -1]),), 3, 2),
    aten.expand.default: _of(_expanded, 3, 2),
    aten.broadcast_to.default: _of(_expanded, 3, 2),
    aten.contiguous.default: _fixed(),
    aten.clone.default: _fixed(),
    aten.alias.default: _fixed(),
    aten.detach.default: _fixed(),
    aten.channel_shuffle.default: _fixed(1, ranks=(4,)),
    aten.pixel_shuffle.default: _fixed(1, ranks=(4,)),
    aten.pixel_unshuffle.default: _fixed(1, ranks=(4,)),
    aten.flip.default: _fixed([-1]),
    aten.roll.default: _fixed([1], [-1]),
    aten.repeat.default: _of(lambda shape, _c: ([1] * (len(shape) - 1) + [2],)),
    aten.pad.default: _of(_padding_with_mode, 4, 3),
    aten.constant_pad_nd.default: _of(_padding, 4, 3),
    aten.dropout.default: _fixed(0.5, False),
    aten.feature_dropout.default: _fixed(0.5, False, ranks=(4, 3)),
    aten.to.dtype: _fixed(torch.float32),
    aten.to.device: _fixed(torch.device("cpu"), torch.float32),
    aten._to_copy.default: _fixed(dtype=torch.float32),
}
"""Overload → how to call it. What moves is said in `quant2e.graph.data_movement`; random graphs hold what is here."""
