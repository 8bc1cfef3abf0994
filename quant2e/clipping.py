"""How much of a histogram's range is worth representing: the classic estimate, for many candidates at once.

Clipping loses the squared distance to the nearer bound; rounding within the bounds loses ``scale**2 / 12`` on average
(W. R. Bennett, "Spectra of quantized signals", 1948). Both follow from running sums over the bins, so a candidate costs
a few look-ups instead of a walk over the histogram. The estimate chooses where `range_search` looks closely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant2e.qparams import Grid
from quant2e.quantization_error import Filling

_COARSE = tuple(2.0 ** (-i / 2) for i in range(18))
_FINE = tuple(2.0 ** (i / 24) for i in range(-7, 8))
"""Factors on the bounds: first down to 1/362 in steps of 41 %, then around the best in steps of 3 %."""


class Clipping:
    """Running sums over the bins of one histogram."""

    def __init__(self, bins: Filling) -> None:
        self.centers = (bins.edges[:-1] + bins.edges[1:]) / 2
        weighted = bins.count * self.centers
        sums = torch.stack([bins.count, weighted, weighted * self.centers])
        self._below = torch.nn.functional.pad(sums.cumsum(1), (1, 0))
        # Zero is exact on every grid: a bin that stands out there (the zeros after a relu) loses nothing.
        at_zero = bins.peak & (bins.edges[:-1] <= 0) & (bins.edges[1:] >= 0)
        self._exact = float(bins.count[at_zero].sum())

    def error(self, grid: Grid, low: Tensor, high: Tensor) -> Tensor:
        """Estimated summed squared error of the ranges ``[low, high]``, float64 ``[candidates]``."""
        scale, zero_point = (v.to(torch.float64) for v in grid.qparams(low, high))
        least, most = (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale
        inside = self._below[:, torch.searchsorted(self.centers, torch.stack([least, most]))]
        rounded = (inside[0, 1] - inside[0, 0] - self._exact).clamp(min=0) * scale**2 / 12
        above = self._below[:, -1:] - inside[:, 1]
        return rounded + _squares(inside[:, 0], least) + _squares(above, most)


def _squares(sums: Tensor, bound: Tensor) -> Tensor:
    """Sum of ``(x - bound)**2`` from the sums of 1, ``x`` and ``x**2``."""
    return (sums[2] - 2 * bound * sums[1] + bound**2 * sums[0]).clamp(min=0)


def products(low: float, high: float, factors: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Bounds multiplied by each factor: each independently of the other, or together; a bound of 0 stays."""
    if symmetric or low == 0 or high == 0:
        return low * factors, high * factors
    lows, highs = torch.meshgrid(low * factors, high * factors, indexing="ij")
    return lows.flatten(), highs.flatten()


def promising(bins: Filling, grid: Grid, low: float, high: float) -> tuple[float, float]:
    """The range within ``[low, high]``, which includes 0, whose estimated error is smallest."""
    estimate = Clipping(bins)
    best = low, high
    for factors in (_COARSE, _FINE):
        lows, highs = products(*best, torch.tensor(factors, dtype=torch.float64), grid.symmetric)
        lows, highs = lows.clamp(min=low), highs.clamp(max=high)
        pick = int(torch.argmin(estimate.error(grid, lows, highs)))
        best = float(lows[pick]), float(highs[pick])
    return best
