"""On a copy: an algorithm of the calibrated stage applied in the step-by-step flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from quant2e.accuracy.algorithms.rounding.weight_layers import check_calibrated
from quant2e.calibration.batches import check_batch, check_iterable
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import copy_graph
from quant2e.report.record import RECORD_KEY, GraphRecord


def on_copy(
    name: str, edit: Callable[[GraphModule, Sequence[Call]], list[str]], prepared: GraphModule, data: Iterable[Any]
) -> GraphModule:
    """A copy of ``prepared`` after ``edit``, of the algorithm ``name``; what was done is in the notes of its report."""
    check_iterable(data, "data")
    calls = [check_batch(batch, f"batch {i}", prepared) for i, batch in enumerate(data)]
    check_calibrated(prepared, name)
    gm = copy_graph(prepared)
    lines = edit(gm, calls)
    record = gm.meta.get(RECORD_KEY)
    if isinstance(record, GraphRecord):
        notes = [f"{name}: {line}" for line in lines] or [f"{name}: there was nothing to change"]
        gm.meta[RECORD_KEY] = replace(record, report=record.report.with_notes(notes))
    return gm
