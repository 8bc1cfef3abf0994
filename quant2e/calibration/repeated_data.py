"""Repeated data: calibration data that is read several times, always with the same batches held out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.calibration.batches import check_iterable, check_kind
from quant2e.calibration.calibrate import Progress, calibrate
from quant2e.calibration.feed import Feed
from quant2e.calibration.held_out import SELECT_RANGES_ON, HeldOutData, HoldOut, calibrate_but_some
from quant2e.calibration.range_selection import select_ranges
from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call

KEPT_BATCHES = 256
"""Batches that are kept in memory; with more of them, the data is read again for each calibration on all of it."""

LEARN_ON = 64
"""Batches, those held out included, that algorithms learn from and on which their trials are calibrated."""


class RepeatedData:
    """``calls``: what algorithms may look at, none of it held out, unless there is only one batch.

    ``complete``: a calibration on some is one on all. Without ``data`` (dynamic and weight-only quantizers need none),
    ``example`` is all there is: nothing is calibrated, and it is also what measures.

    Raises `CalibrationError` for data with more than `KEPT_BATCHES` batches that can be read only once, or that gives
    other batches each time: those held out would be calibrated on the next time.
    """

    def __init__(self, data: Iterable[Any] | None, example: Call) -> None:
        self._example = example
        self._all: Iterable[Any] | None = None
        self._some: list[Any] = []
        self.complete, self.calls = True, [example]
        if data is None:
            return
        check_iterable(data, "calibration_data")
        first = list(itertools.islice(_owned(data), KEPT_BATCHES + 1))
        if len(first) > KEPT_BATCHES:
            _check_repeatable(data, first)
        self._all = first if len(first) <= KEPT_BATCHES else data
        self._some = first[:LEARN_ON]
        self.complete = len(first) <= LEARN_ON
        stream = HoldOut(self._some)
        self.calls = [check_kind(batch, f"calibration batch {stream.place(i)}") for i, batch in enumerate(stream)]

    @property
    def separate(self) -> bool:
        """Whether what measures is not what algorithms learn from."""
        return len(self._some) > 1

    def calibrate(self, prepared: GraphModule, progress: Progress | None = None) -> HeldOutData:
        """Calibrate ``prepared`` in place on all but what is held out."""
        return self._calibrate(prepared, self._all, progress)

    def calibrate_on_some(self, prepared: GraphModule, progress: Progress | None = None) -> HeldOutData:
        """Calibrate ``prepared`` in place on what the first `LEARN_ON` batches hold but those held out."""
        return self._calibrate(prepared, None if self._all is None else self._some, progress)

    def calibrate_on_calls(self, prepared: GraphModule) -> None:
        """Calibrate ``prepared`` in place, its ranges chosen, too, on what algorithms may look at and nothing else."""
        if self._all is not None:
            calibrate(prepared, self.calls)
            select_ranges(prepared, self.calls[:SELECT_RANGES_ON])

    def _calibrate(self, prepared: GraphModule, data: Iterable[Any] | None, progress: Progress | None) -> HeldOutData:
        if data is None:
            return HeldOutData([self._example], "the example inputs")
        return calibrate_but_some(prepared, data, progress)


def _owned(data: Iterable[Any]) -> Iterator[Any]:
    """Batches that stay as they are while further ones are read: some loaders fill one buffer again and again."""
    if isinstance(_source(data), list | tuple):
        return iter(data)
    return (pytree.tree_map_only(Tensor, torch.clone, batch) for batch in data)


def _source(data: Iterable[Any]) -> Iterable[Any]:
    """What the user gave."""
    return data.data if isinstance(data, Feed) else data


def _check_repeatable(data: Iterable[Any], first: list[Any]) -> None:
    why = f"algorithms need to read the calibration data several times, and it has more than {KEPT_BATCHES} batches, "
    if iter(source := _source(data)) is source:
        raise CalibrationError(
            f"{why}the most that are kept in memory, of which each can be read only once: give something that can be "
            "read again (a list, a DataLoader), or fewer batches, itertools.islice(data, 256)"
        )
    one, other = (pytree.tree_leaves(list(itertools.islice(batches, 2))) for batches in (first, data))
    if len(one) != len(other) or not all(map(_equal, one, other)):
        raise CalibrationError(
            f"{why}the most that are kept in memory, and other ones each time it is read, so that the batches that "
            "measure the result would be calibrated on: give them in one order (shuffle=False), or fewer batches, "
            "itertools.islice(data, 256)"
        )


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)
