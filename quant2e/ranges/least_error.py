"""Least squared error of known values: scales and zero points of rows that are there, not only their histograms.

    minimise over s, z      Σ_p d_p (x_p - s (q_p - z))²,      q_p = clamp(round(x_p / s) + z, low, high)

for each row x, with importances d. Two steps in turn, neither of which can raise the error:

1. candidate ranges: the row's own bounds times factors, both together on a symmetric grid, else each by itself;
2. for fixed integers the error is a parabola in s, and smallest at  s = Σ d x (q - z) / Σ d (q - z)².

The second is the optimal scale of Lloyd, "Least squares quantization in PCM" (1982), for uniform steps. Weighted by the
second moment of the inputs, d_c = E[x_c²], the sum is the expected squared error of a product, as long as the inputs
are uncorrelated (Nagel et al., arXiv:2106.08295, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant2e.ranges.clipping import products
from quant2e.ranges.qparams import SMALLEST_SCALE, NumberFormat
from quant2e.ranges.quantization_error import QParams, pointwise

_TOGETHER = (*(i / 32 for i in range(1, 10)), *(i / 24 for i in range(8, 29)))
_APART = tuple(i / 8 for i in range(3, 9))
_CLOSE = tuple(1 + i / 60 for i in range(-2, 3))
_CLOSER = tuple(1 + i / 200 for i in range(-2, 3))
"""Factors on the bounds of a row: over all of the range where both shrink together, or apart, and around the best."""

_TURNS = 6
"""Of least squares and rounding, at most."""

_AT_A_TIME = 1 << 22
"""Values times candidates that are compared at once."""


def as_it_is(scale: Tensor) -> Tensor:
    """Every scale can be stored."""
    return scale


@dataclass(frozen=True, slots=True)
class KnownRows:
    """``values``: ``[rows, points]``; ``importance``: of their shape or ``[1, points]``, not negative; None: all equal.

    ``stored``: what is left of a scale where a backend keeps it in another dtype.
    """

    values: Tensor
    importance: Tensor | None = None
    stored: Callable[[Tensor], Tensor] = as_it_is

    def errors(self, grid: NumberFormat, qparams: QParams) -> Tensor:
        """The weighted mean squared error of each row, float64 ``[rows, candidates]``.

        ``qparams``: scales and zero points, ``[rows, candidates]``.
        """
        scale, zero_point = qparams
        count, points = self.values.shape
        made = torch.empty(scale.shape, dtype=torch.float64, device=self.values.device)
        for low in range(0, count, step := max(1, _AT_A_TIME // max(1, points))):
            part = slice(low, low + step)
            x = self.values[part].double()
            d = self._weights(part)
            for first in range(0, scale.shape[1], width := max(1, _AT_A_TIME // max(1, x.numel()))):
                some = slice(first, first + width)
                error = pointwise(x, grid, (scale[part, some], zero_point[part, some]))
                error = error if d is None else error.mul_(d.unsqueeze(1))
                made[part, some] = error.mean(-1)
        return made

    def least_squares(self, grid: NumberFormat, qparams: QParams) -> Tensor:
        """The best scale of each row for the integers that ``qparams``, ``[rows, 1]``, round it to: float64 alike."""
        scale, zero_point = (each.double() for each in qparams)
        made = torch.empty_like(scale)
        step = max(1, _AT_A_TIME // max(1, self.values.shape[1]))
        for low in range(0, self.values.shape[0], step):
            part = slice(low, low + step)
            x, zero = self.values[part].double(), zero_point[part]
            steps = torch.clamp(torch.round(x / scale[part]), grid.quant_min - zero, grid.quant_max - zero)
            d = self._weights(part)
            weighted = steps if d is None else steps * d
            above, below = (weighted * x).sum(1, keepdim=True), (weighted * steps).sum(1, keepdim=True)
            made[part] = torch.where((above > 0) & (below > 0), above / below, scale[part])
        return made

    def _weights(self, part: slice) -> Tensor | None:
        if self.importance is None:
            return None
        return (self.importance if self.importance.shape[0] == 1 else self.importance[part]).double()


@dataclass(frozen=True, slots=True)
class Fit:
    """``scale`` float32 and ``zero_point`` int64, ``[rows]``; ``before``, ``after``: mean squared errors, float64."""

    scale: Tensor
    zero_point: Tensor
    before: Tensor
    after: Tensor


def fit(rows: KnownRows, grid: NumberFormat, qparams: QParams) -> Fit:
    """Scales and zero points of least error, starting from ``qparams``, ``[rows]`` each, and never worse than these.

    A symmetric grid keeps its zero point; an affine one finds both. Powers of two stay such.
    """
    scale, zero_point = (each.reshape(-1, 1) for each in qparams)
    before = after = rows.errors(grid, (scale, zero_point))
    for scheme in dict.fromkeys((_symmetric(grid), grid)):
        found = _candidates(rows, scheme)
        scale, zero_point, after = _better(rows, grid, (scale, zero_point, after), found)
    for _ in range(0 if grid.power_of_two else _TURNS):
        wanted = rows.least_squares(grid, (scale, zero_point)).clamp(min=max(grid.eps, SMALLEST_SCALE))
        last = after
        candidate = rows.stored(wanted.float()), zero_point
        scale, zero_point, after = _better(rows, grid, (scale, zero_point, after), candidate)
        if torch.equal(last, after):
            break
    return Fit(scale.squeeze(1), zero_point.squeeze(1), before.squeeze(1), after.squeeze(1))


def _symmetric(grid: NumberFormat) -> NumberFormat:
    """The grid without zero points, which affine parameters can have as well."""
    if grid.symmetric or not grid.dtype.is_signed:
        return grid
    return replace(grid, qscheme=torch.per_tensor_symmetric)


def _better(
    rows: KnownRows, grid: NumberFormat, best: tuple[Tensor, Tensor, Tensor], found: QParams
) -> tuple[Tensor, ...]:
    """Row by row the best so far, or what was ``found`` where its error is smaller."""
    scale, zero_point, error = best
    other = rows.errors(grid, found)
    less = other < error
    return (
        torch.where(less, found[0], scale),
        torch.where(less, found[1].to(zero_point.dtype), zero_point),
        torch.where(less, other, error),
    )


def _candidates(rows: KnownRows, grid: NumberFormat) -> QParams:
    """The best range among the row's own one times factors, searched finer and finer."""
    low = rows.values.amin(1, keepdim=True).double().clamp(max=0)
    high = rows.values.amax(1, keepdim=True).double().clamp(min=0)
    for tried in (_TOGETHER if grid.symmetric else _APART, _CLOSE, _CLOSER):
        factors = torch.tensor(tried, dtype=torch.float64, device=low.device)
        lows, highs = products(low, high, factors, grid.symmetric)
        scale, zero_point = grid.qparams(lows, highs)
        pick = torch.argmin(rows.errors(grid, (rows.stored(scale), zero_point)), 1, keepdim=True)
        low, high = lows.gather(1, pick), highs.gather(1, pick)
    scale, zero_point = grid.qparams(low, high)
    return rows.stored(scale), zero_point
