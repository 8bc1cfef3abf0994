"""Signal to quantization noise ratio: ``10 log10(Σx² / Σ(x - x̂)²)``, in dB."""

from __future__ import annotations

import math


def sqnr_db(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(signal / noise)`` of two powers; inf without noise."""
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise < math.inf else -math.inf
