"""Held-out data: a few batches of the calibration data that are not calibrated on, but measured on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.fx import GraphModule

from quant2e.calibration.batches import SomeBatches, check_batch, check_iterable
from quant2e.calibration.calibrate import Progress, add_notes, batch_count, calibrate
from quant2e.calibration.feed import Feed, Transform
from quant2e.calibration.range_selection import RangeChoice, select_ranges
from quant2e.graph.captured.calls import Call

_EVERY = 8
_AT_MOST = 8


class HoldOut(SomeBatches):
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

    def place(self, index: int) -> int:
        """Where that batch that is handed on stands in the data."""
        return next(itertools.islice((place for place in itertools.count() if not self._keeps(place)), index, None))

    def place_kept(self, index: int) -> int:
        """Where that batch that is kept back stands in the data."""
        return 1 + index * _EVERY if self.separate else 0

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


class _Kept(SomeBatches):
    def __init__(self, calls: Sequence[Call], place: Callable[[int], int]) -> None:
        self._calls, self._place = calls, place

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def place(self, index: int) -> int:
        return self._place(index)


SELECT_RANGES_ON = 2
"""Held-out batches on which candidate ranges are compared; each costs about four forwards."""


class HeldOutData(NamedTuple):
    """Data that was not calibrated on, what it is in words, how candidate ranges fared on it, and what was left out."""

    calls: list[Call]
    source: str
    choices: tuple[RangeChoice, ...] = ()
    notes: tuple[str, ...] = ()


def calibrate_but_some(
    prepared: GraphModule,
    data: Iterable[Any],
    progress: Progress | None = None,
    transform: Transform | None = None,
) -> HeldOutData:
    """Calibrate ``prepared`` in place on most of ``data``, and choose its ranges on the rest."""
    check_iterable(data, "calibration_data")
    feed = data if isinstance(data, Feed) else Feed(data, prepared, "calibration", transform)
    stream = HoldOut(feed)
    calibrate(prepared, stream, progress=progress)
    held_out = [
        check_batch(batch, f"calibration batch {stream.place_kept(i)}", prepared) for i, batch in enumerate(stream.kept)
    ]
    add_notes(prepared, feed.notes)
    choices = select_ranges(prepared, _Kept(held_out[:SELECT_RANGES_ON], stream.place_kept))
    kind = "held-out batch" if stream.separate else "calibration batch"
    source = f"{len(held_out)} {kind}{'es' if len(held_out) > 1 else ''}"
    return HeldOutData(held_out, source, choices, feed.notes)
