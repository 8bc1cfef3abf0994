"""Soft rounding: integers of a weight found by gradients, between rounding down and rounding up.

    W̃(V) = s (clamp(⌊W / s⌋ + h(V) + z) - z),       h(V) = clamp(σ(V) (ζ - γ) + γ, 0, 1)      (rectified sigmoid)
    minimise over V      E ‖f(W x + b) - f(W̃ x̂ + b̂)‖² / e  +  λ · mean(1 - |2 h - 1|^β)

with ζ = 1.1 and γ = -0.1; x is the input in float, x̂ as the rounded layers before give it, f the activation behind.
M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020, arXiv:2004.10568, equations 21 to 25. β falls along a cosine, which lets h move at first and
then drives it to 0 or 1. Here the error of each row is divided by e, that of its nearest integers, so that one λ serves
weights and inputs of any size; rows do not depend on each other, so each keeps its own balance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant2e.accuracy.algorithms.rounding.hessian_rounding import ColumnGrid

_ZETA, _GAMMA = 1.1, -0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftRounding:
    """Settings. ``iterations``: of Adam, with step size ``rate``. ``batch_size``: samples of each. ``regularizer``: λ.
    ``warm_up``: share of the iterations without it. ``beta``: its exponent at first and at last.
    """

    iterations: int
    rate: float
    batch_size: int
    regularizer: float
    warm_up: float
    beta: tuple[float, float]

    def beta_at(self, step: int) -> float | None:
        """The exponent at one step; None while the rounding is free."""
        start = self.warm_up * self.iterations
        if step < start:
            return None
        along = (step - start) / max(1.0, self.iterations - start)
        first, last = self.beta
        return last + (first - last) * 0.5 * (1 + math.cos(along * math.pi))


@dataclass(frozen=True, slots=True)
class Samples:
    """What one product reads and should give, of ``n`` samples.

    ``rounded``: its input x̂, ``[groups, n, columns]``. ``wanted``: f(W x + b), ``[groups, n, rows]``. ``bias``: b̂,
    ``[groups, 1, rows]`` or None. ``behind``: f.
    """

    rounded: Tensor
    wanted: Tensor
    bias: Tensor | None
    behind: Callable[[Tensor], Tensor]

    def error(self, w: Tensor, part: Tensor | slice = slice(None)) -> Tensor:
        """Mean squared error of each row, ``[groups, rows]``, with ``w``, ``[groups, rows, columns]``, for W̃."""
        result = rows_times(self.rounded[:, part], w, self.bias)
        return (self.behind(result) - self.wanted[:, part]).square().mean(1)


def rows_times(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """``x wᵀ + bias`` for ``[groups, n, columns]``, ``[groups, rows, columns]`` and ``[groups, 1, rows]``."""
    turned = w.transpose(1, 2)
    return torch.bmm(x, turned) if bias is None else torch.baddbmm(bias, x, turned)


def row_errors(samples: list[Samples], w: Tensor) -> Tensor:
    """The mean squared error of each row over all products of a weight, ``[groups, rows]``."""
    return torch.stack([each.error(w) for each in samples]).mean(0)


def round_softly(
    w: Tensor, grid: ColumnGrid, samples: list[Samples], settings: SoftRounding, generator: torch.Generator
) -> Tensor:
    """Integers for ``w``, float32 ``[groups, rows, columns]``, as floats; deterministic for a ``generator``.

    In rows where the nearest ones are as good on all samples it is these.
    """
    nearest = grid.nearest(w)
    with torch.no_grad():
        before = row_errors(samples, grid.real(nearest))
    floor = torch.floor(w * (1.0 / grid.scale))
    rest = (w * (1.0 / grid.scale) - floor).clamp(0.001, 0.999)
    v = torch.logit((rest - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()
    unit = torch.where(before > 0, before, 1.0)
    optimizer = torch.optim.Adam([v], lr=settings.rate)
    counts = [each.rounded.shape[1] for each in samples]
    for step in range(settings.iterations):
        h = (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        soft = grid.real(grid.within(floor + h + grid.zero_point))
        loss = torch.zeros((), device=w.device)
        for each, count in zip(samples, counts, strict=True):
            part = torch.randint(0, count, (min(settings.batch_size, count),), generator=generator).to(w.device)
            loss = loss + (each.error(soft, part) / unit).sum()
        if (beta := settings.beta_at(step)) is not None:
            loss = loss + settings.regularizer * (1 - (2 * h - 1).abs().pow(beta)).mean(-1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        up = (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA >= 0.5).float()
        integers = grid.within(floor + up + grid.zero_point)
        better = row_errors(samples, grid.real(integers)) < before
        return torch.where(better.unsqueeze(-1), integers, nearest)
