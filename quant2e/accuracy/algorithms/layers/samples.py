"""Samples: what an algorithm reads of the data, the moments of each channel, and its line in the report of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.calibration.batches import check_batch, check_iterable, sample_count
from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call
from quant2e.report.algorithm_step import KEPT, NO_EFFECT, AlgorithmStep
from quant2e.report.record import RECORD_KEY, GraphRecord


def first_samples(calls: Iterable[Call], samples: int) -> list[Call]:
    """The first batches that together hold ``samples`` samples, or all."""
    taken: list[Call] = []
    for call in calls:
        taken.append(call)
        if sum(sample_count([*one.args, *one.kwargs.values()]) for one in taken) >= samples:
            break
    return taken


def read_samples(data: Iterable[Any], samples: int, algorithm: str, graph: GraphModule) -> list[Call]:
    """As `first_samples`, of data that a user gave for ``graph``.

    Raises `CalibrationError` for none, and for what is no batch.
    """
    check_iterable(data, "data")
    calls = first_samples((check_batch(batch, f"batch {i}", graph) for i, batch in enumerate(data)), samples)
    if not calls:
        raise CalibrationError(f"{algorithm}: the data held no batch (an exhausted generator?); give it anew")
    return calls


def channel_moments(values: Sequence[Tensor], axis: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, along ``axis``, over all of ``values``; float64, ``[channels]``."""
    rows = [value.detach().double().movedim(axis, 0).flatten(1) for value in values]
    count = sum(row.shape[1] for row in rows)
    mean = torch.stack([row.sum(1) for row in rows]).sum(0) / count
    square = torch.stack([(row - mean[:, None]).square().sum(1) for row in rows]).sum(0) / count
    return mean, square.sqrt()


def along_axis(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """A value for each channel in a shape that broadcasts against ``x``, and in its dtype."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.to(x.dtype).reshape(shape)


def note_step(gm: GraphModule, name: str, changes: Sequence[str]) -> None:
    """Add what an algorithm that was called by itself changed to the report of ``gm``, in place."""
    record = gm.meta.get(RECORD_KEY)
    if isinstance(record, GraphRecord):
        outcome = KEPT if changes else NO_EFFECT
        step = AlgorithmStep(name, outcome, tuple(changes), "called by itself, so it was not measured")
        report = replace(record.report, algorithms=(*record.report.algorithms, step))
        gm.meta[RECORD_KEY] = replace(record, report=report)
