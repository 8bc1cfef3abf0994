"""Clipping estimates: what each of many candidate ranges of a histogram would lose, all at once.

Clipping loses the squared distance to the nearer bound; rounding within the bounds loses ``scale**2 / 12`` on average
(W. R. Bennett, "Spectra of quantized signals", 1948). Both follow from running sums over the bins, so a candidate costs
a few look-ups instead of a walk over the histogram. The estimate chooses where `search` looks closely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.quantization_error import Filling

_COARSE = tuple(2.0 ** (-i / 2) for i in range(18))
_FINE = tuple(2.0 ** (i / 24) for i in range(-7, 8))
"""Factors on the bounds: first down to 1/362 in steps of 41 %, then around the best in steps of 3 %."""


class Clipping:
    """Running sums over the bins of several histograms."""

    def __init__(self, bins: Filling) -> None:
        self.centers = (bins.edges[:, :-1] + bins.edges[:, 1:]) / 2
        weighted = bins.count * self.centers
        sums = torch.stack([bins.count, weighted, weighted * self.centers])
        self._below = torch.nn.functional.pad(sums.cumsum(-1), (1, 0))
        # Zero is exact on every grid: a bin that stands out there (the zeros after a relu) loses nothing.
        at_zero = bins.peak & (bins.edges[:, :-1] <= 0) & (bins.edges[:, 1:] >= 0)
        self._exact = (bins.count * at_zero).sum(1, keepdim=True)

    def error(self, grid: NumberFormat, low: Tensor, high: Tensor) -> Tensor:
        """Estimated summed squared error of the ranges ``[low, high]``: all float64 ``[histograms, candidates]``."""
        scale, zero_point = (v.to(torch.float64) for v in grid.qparams(low, high))
        least, most = (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale
        under, inside = self._up_to(least), self._up_to(most)
        rounded = (inside[0] - under[0] - self._exact).clamp(min=0) * scale**2 / 12
        return rounded + _squares(under, least) + _squares(self._below[..., -1:] - inside, most)

    def _up_to(self, bound: Tensor) -> Tensor:
        """The sums over the bins below each bound: ``[3, histograms, candidates]``."""
        index = torch.searchsorted(self.centers, bound)
        return self._below.gather(2, index.expand(3, *index.shape))


def _squares(sums: Tensor, bound: Tensor) -> Tensor:
    """Sum of ``(x - bound)**2`` from the sums of 1, ``x`` and ``x**2``."""
    return (sums[2] - 2 * bound * sums[1] + bound**2 * sums[0]).clamp(min=0)


def products(low: Tensor, high: Tensor, factors: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """Bounds ``[histograms, 1]`` multiplied by each factor, both together or each independently of the other.

    ``[histograms, factors]``, or ``[histograms, factors**2]``.
    """
    lows, highs = low * factors, high * factors
    if together:
        return lows, highs
    lows, highs = torch.broadcast_tensors(lows.unsqueeze(2), highs.unsqueeze(1))
    return lows.flatten(1), highs.flatten(1)


def promising(bins: Filling, grid: NumberFormat, low: Tensor, high: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """The ranges within ``[low, high]``, which include 0, whose estimated errors are smallest.

    All float64 ``[histograms, 1]``. ``together``: both bounds shrink alike, as when the grid is symmetric or one is 0.
    """
    estimate = Clipping(bins)
    best = low, high
    for factors in (_COARSE, _FINE):
        lows, highs = products(*best, torch.tensor(factors, dtype=torch.float64), together)
        lows, highs = torch.maximum(lows, low), torch.minimum(highs, high)
        pick = torch.argmin(estimate.error(grid, lows, highs), 1, keepdim=True)
        best = lows.gather(1, pick), highs.gather(1, pick)
    return best
