"""ChosenRange: the range that calibration chose for one tensor, and what its readers keep with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChosenRange:
    """The range that calibration chose for one tensor, by the ops that read it.

    ``method``, ``percentile``: how it was found (see `quant2e.select_ranges`). ``sqnr_db``: SQNR in dB of what those
    ops make of the tensor, with it alone quantized.
    """

    tensor: str
    method: str
    percentile: float
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.tensor}: what is computed from it keeps {self.sqnr_db:.1f} dB with the best range, {self.method}"
