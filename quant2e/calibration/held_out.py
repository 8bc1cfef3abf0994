"""Held-out data: a few batches of the calibration data that are not calibrated on, but measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from quant2e.calibration.batches import check_iterable
from quant2e.calibration.calibrate import batch_count

_EVERY = 8
_AT_MOST = 8


class HoldOut:
    """Hands on most of an iterable and keeps a few batches back: the second one, then every eighth, at most eight.

    When there is only one batch it is handed on and kept.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        check_iterable(data, "calibration_data")
        self._data = data
        self.kept: list[Any] = []
        self.separate = False

    def __len__(self) -> int:
        total = batch_count(self._data)
        if total is None:
            raise TypeError("the data does not say how many batches it holds")
        return total - len([i for i in range(total) if self._keeps(i)])

    @staticmethod
    def _keeps(index: int) -> bool:
        return index % _EVERY == 1 and index // _EVERY < _AT_MOST

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self._data):
            if self._keeps(index):
                if not self.separate:
                    self.kept.clear()
                    self.separate = True
                self.kept.append(batch)
                continue
            if index == 0:
                self.kept.append(batch)
            yield batch
