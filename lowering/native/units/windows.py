"""Windows: what a convolution reads for each pixel that it writes, and a transposed one as plain ones.

    y[s·m + r]  =  Σₜ x[m + c - t·d/g] · w[k + t·s/g]        0 ≤ r < s,  g = gcd(s, d),  s·c = r + p - k·d

in each dimension, for stride s, padding p and dilation d; k is the first place of the kernel for which c is an integer.
The results at r, a part of them, are a convolution of stride 1 by every (s/g)-th place of the kernel, the last first. A
part that no place of the kernel meets is the bias alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Pair = tuple[int, int]
"""Of height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A convolution's geometry, height first.

    ``before``, ``after``: pixels that it reads beyond the top and left edge, and beyond the bottom and right one; fewer
    than none where it does not come to the edge.
    """

    kernel: Pair
    stride: Pair
    before: Pair
    dilation: Pair
    after: Pair

    @property
    def border(self) -> Pair:
        """Rows above and below the image, and pixels left and right of it, that are read."""
        return max(0, self.before[0], self.after[0]), max(0, self.before[1], self.after[1])


POINT = Window(kernel=(1, 1), stride=(1, 1), before=(0, 0), dilation=(1, 1), after=(0, 0))
"""Of a linear layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPart:
    """The rows and columns of a result that one step writes: every so many, from ``first`` on.

    ``rows``, ``columns``: places of the kernel that meet there, in the order in which ``window`` reads; None of both
    for all of them. ``window``: None where no place does, and the result is the bias.
    """

    window: Window | None
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None
    every: Pair = (1, 1)
    first: Pair = (0, 0)


def plain_window(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, x: Pair, y: Pair) -> Window:
    """The window of a convolution of an image of size ``x`` whose result has size ``y``."""
    after = [
        (y[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] - padding[i] - (x[i] - 1) for i in range(len(kernel))
    ]
    return Window(kernel=kernel, stride=stride, before=padding, dilation=dilation, after=(after[0], after[1]))


def transposed_parts(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, x: Pair, y: Pair
) -> tuple[ResultPart, ...]:
    """The parts of the result of a transposed convolution, of size ``y``, for an image of size ``x``."""
    axes = [
        [_phase(kernel[i], stride[i], padding[i], dilation[i], x[i], y[i], r) for r in range(min(stride[i], y[i]))]
        for i in range(len(kernel))
    ]
    return tuple(_part(rows, columns, stride) for rows in axes[0] for columns in axes[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase:
    """The results at ``first`` of one dimension."""

    first: int
    places: tuple[int, ...]
    before: int
    dilation: int
    after: int


def _phase(kernel: int, stride: int, padding: int, dilation: int, x: int, y: int, first: int) -> _Phase:
    shared = math.gcd(stride, dilation)
    meeting = [k for k in range(min(kernel, stride // shared)) if (first + padding - k * dilation) % stride == 0]
    if not meeting:
        return _Phase(first=first, places=(), before=0, dilation=1, after=0)
    places = tuple(range(meeting[0], kernel, stride // shared))[::-1]
    apart = dilation // shared if len(places) > 1 else 1
    reach = (len(places) - 1) * apart
    before = reach - (first + padding - meeting[0] * dilation) // stride
    after = (y - first - 1) // stride + reach - before - (x - 1)
    return _Phase(first=first, places=places, before=before, dilation=apart, after=after)


def _part(rows: _Phase, columns: _Phase, stride: Pair) -> ResultPart:
    first = (rows.first, columns.first)
    if not rows.places or not columns.places:
        return ResultPart(window=None, rows=(), columns=(), every=stride, first=first)
    window = Window(
        kernel=(len(rows.places), len(columns.places)),
        stride=(1, 1),
        before=(rows.before, columns.before),
        dilation=(rows.dilation, columns.dilation),
        after=(rows.after, columns.after),
    )
    return ResultPart(window=window, rows=rows.places, columns=columns.places, every=stride, first=first)
