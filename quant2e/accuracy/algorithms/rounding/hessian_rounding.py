"""Rounding by the Hessian: integers of a weight, column by column, each making up for the errors of those before it.

    minimise over q      tr (W - Q) H (W - Q)ᵀ,      Q = s (q - z),   H = Σ x xᵀ

With the upper Cholesky factor U of H⁻¹ = Uᵀ U, rounding column i and moving the columns behind it by

    w_j  -=  (w_i - Q_i) U_ij / U_ii        for j > i

leaves the least error that those columns can make up for (Frantar et al., "GPTQ: Accurate Post-Training Quantization
for Generative Pre-trained Transformers", arXiv:2210.17323, algorithm 1; Hassibi and Stork, "Optimal Brain Surgeon",
1993). U is the inverse of the factor R of H = R Rᵀ, R upper triangular, so H is never inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPINGS = 4
"""How often damping grows tenfold before it is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnGrid:
    """The integers of each value: ``scale``, ``zero_point``: float32 ``[groups, rows, columns]``.

    ``low``, ``high``: the smallest and the largest; of all, or, where a kernel bounds what integers of a row are
    together, of each, float32 of that shape.
    """

    scale: Tensor
    zero_point: Tensor
    low: int | Tensor
    high: int | Tensor

    def nearest(self, w: Tensor) -> Tensor:
        """The nearest integers, as floats; ties to even."""
        return self.within(torch.round(w * (1.0 / self.scale)) + self.zero_point)

    def within(self, integers: Tensor) -> Tensor:
        """Integers, as floats, moved to the nearest that there are."""
        return integers.clamp(torch.as_tensor(self.low).to(integers), torch.as_tensor(self.high).to(integers))

    def real(self, integers: Tensor) -> Tensor:
        """The numbers that integers stand for."""
        return (integers - self.zero_point) * self.scale

    def columns(self, part: slice) -> ColumnGrid:
        """The grid of some columns."""
        return self.apply(lambda t: t[..., part])

    def apply(self, rearrange: Callable[[Tensor], Tensor]) -> ColumnGrid:
        """The grid of columns in another order."""
        low, high = (rearrange(end) if isinstance(end, Tensor) else end for end in (self.low, self.high))
        return ColumnGrid(scale=rearrange(self.scale), zero_point=rearrange(self.zero_point), low=low, high=high)


@dataclass(frozen=True, slots=True)
class HessianRounding:
    """``integers``: float32 ``[groups, rows, columns]``. ``before``, ``after``: the error of the nearest ones and of
    these, float64 ``[groups, rows]``. ``damping``: what was needed; None where no factor was found, with the nearest.
    """

    integers: Tensor
    before: Tensor
    after: Tensor
    damping: float | None


def squared_error(delta: Tensor, hessian: Tensor) -> Tensor:
    """``δ H δᵀ`` of each row: float64 ``[groups, rows]``."""
    delta = delta.double()
    return ((delta @ hessian.double()) * delta).sum(-1).clamp(min=0)


def round_by_hessian(
    w: Tensor, grid: ColumnGrid, hessian: Tensor, *, damping: float = 0.01, order: bool = True, block: int = 128
) -> HessianRounding:
    """Integers for ``w``, float32 ``[groups, rows, columns]``, by ``hessian``, ``[groups, columns, columns]``.

    ``damping``: part of the mean of the diagonal that is added to it; it grows tenfold, in float64, while H has no
    factor. ``order``: columns of large inputs first ("activation order"). ``block``: columns between two updates of all
    those behind. Of each row the nearest integers stay where they have the smaller error.
    """
    nearest = grid.nearest(w)
    before = squared_error(grid.real(nearest) - w, hessian)
    sizes = hessian.diagonal(dim1=-2, dim2=-1)
    first = torch.argsort(sizes if order else torch.zeros_like(sizes), dim=-1, descending=True, stable=True)
    index = first.unsqueeze(1).expand_as(w)
    factor, used = _factor(_both(hessian, first), damping)
    if factor is None:
        return HessianRounding(nearest, before, before, None)
    integers = _columns(w.gather(2, index), grid.apply(lambda t: t.gather(2, index)), factor, block)
    integers = torch.empty_like(integers).scatter_(2, index, integers)
    after = squared_error(grid.real(integers) - w, hessian)
    better = after < before
    return HessianRounding(
        torch.where(better.unsqueeze(-1), integers, nearest), before, torch.where(better, after, before), used
    )


def _both(hessian: Tensor, order: Tensor) -> Tensor:
    rows = hessian.gather(1, order.unsqueeze(-1).expand_as(hessian))
    return rows.gather(2, order.unsqueeze(1).expand_as(hessian))


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """U with ``H⁻¹ = Uᵀ U``, float32, and the damping with which there is one; first in float32, then in float64."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    if not bool(torch.isfinite(hessian).all()) or not bool((mean > 0).any()):
        return None, damping
    silent = torch.where(diagonal > 0, 0.0, 1.0).to(hessian) * torch.where(mean > 0, mean, 1.0)
    for attempt in range(_DAMPINGS + 1):
        dtype = torch.float64 if attempt else torch.float32
        used = damping * 10 ** max(0, attempt - 1)
        whole = hessian.to(dtype) + torch.diag_embed((silent + used * mean).to(dtype))
        lower, wrong = torch.linalg.cholesky_ex(whole.flip(-1, -2))
        if bool(wrong.any()):
            continue
        eye = torch.eye(whole.shape[-1], dtype=dtype, device=whole.device).expand_as(whole)
        factor = torch.linalg.solve_triangular(lower.flip(-1, -2), eye, upper=True).float()
        if bool(torch.isfinite(factor).all()) and bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all()):
            return factor, used
    return None, damping


def _columns(w: Tensor, grid: ColumnGrid, factor: Tensor, block: int) -> Tensor:
    w = w.clone()
    integers, count = torch.empty_like(w), w.shape[-1]
    for first in range(0, count, block):
        last = min(first + block, count)
        errors = torch.empty_like(w[..., first:last])
        for i in range(first, last):
            column = slice(i, i + 1)
            one = grid.columns(column)
            q = one.nearest(w[..., column])
            integers[..., column] = q
            error = (w[..., column] - one.real(q)) / factor[:, column, column]
            w[..., i:last] -= error * factor[:, column, i:last]
            errors[..., i - first : i - first + 1] = error
        w[..., last:] -= errors @ factor[:, first:last, last:]
    return integers
