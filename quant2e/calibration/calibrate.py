"""Calibration: runs data through an observed graph. Statistics stay, data does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.calibration import distributed
from quant2e.calibration.batches import (
    SomeBatches,
    check_batch,
    check_count,
    check_iterable,
    describe,
    sample_count,
)
from quant2e.calibration.compiled import compiled_graph
from quant2e.calibration.early_stopping import EarlyStopping
from quant2e.calibration.feed import Feed, Transform
from quant2e.calibration.statistics import SAMPLES, Statistics, measuring, observers_of
from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import check_dtypes
from quant2e.graph.mutation import written_attributes
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.native import ops as native
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.stages import heard, quiet_where_told, stage

Progress = Callable[[int, int | None], None]
"""Called after each batch with the number done and, where it is known, the total."""


def batch_count(data: Any) -> int | None:
    """How many batches an iterable holds, when it says so."""
    try:
        return len(data)
    except TypeError:
        return None


@quiet_where_told
def calibrate(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    transform: Transform | None = None,
    num_batches: int | None = None,
    seconds: float | None = None,
    range_tolerance: float | None = None,
    checkpoint: str | Path | None = None,
    compiled: bool = False,
    progress: Progress | bool | None = None,
) -> GraphModule:
    """Run ``data`` through a prepared model, so that its observers learn their ranges; returns the same model.

    ``data``: any iterable of what the model takes: tensors, tuples of positional inputs, dicts of keyword inputs, or a
    `Call` for both; a DataLoader works, that of the training script as well: what the model does not take (labels, say)
    is left out where that is clear, and so is a last batch of fewer samples than it was captured for; the report notes
    it. ``transform``: a function of an item of the data that returns what the model takes. Nothing but statistics is
    kept, and the caller's random stream is as it was.

    It stops after ``num_batches``; after ``seconds``; or when no range grew by more than ``range_tolerance`` (0.01 is 1
    %) of its extent for a while; by default at the end of the data. ``checkpoint``: a statistics file, written every
    `CHECKPOINT_EVERY` batches and at the end; when it exists, calibration goes on from there, skipping the batches it
    has seen. ``compiled``: run the observed graph through ``torch.compile``, for long runs; equal tensors give equal
    statistics, but a compiled float op may differ from an eager one in the last bits. ``progress``: called with the
    number of batches done and the total, where it is known; False shows nothing on a terminal.

    Under ``torch.distributed`` each rank feeds its own shard, and at the end every rank has the statistics of all:
    those that one process would have. Moving averages cannot be merged and are refused.

    Raises `CalibrationError` for a model that was not prepared, for data without a batch, and names the batch that a
    model fails on, or that holds NaN or +inf.
    """
    _check_prepared(prepared)
    check_iterable(data, "calibration data")
    check_count(num_batches)
    if checkpoint is not None and not isinstance(checkpoint, str | Path):
        raise CalibrationError(f"checkpoint is a {type(checkpoint).__name__}: the path of a statistics file")
    told = heard(progress)
    stopping = EarlyStopping(seconds, range_tolerance)
    place = data.place if isinstance(data, SomeBatches) else int
    run = _Run(prepared, stopping, None if checkpoint is None else Path(checkpoint), told, compiled, place)
    feed = Feed(data, prepared, "calibration", transform)
    known = batch_count(data)
    total = known if num_batches is None else num_batches if known is None else min(known, num_batches)
    native.load_ops()
    if distributed.world() > 1:
        _shard(run, islice(feed, num_batches), total)
    elif run.feed(islice(feed, num_batches), total) == 0:
        raise CalibrationError("the calibration data held no batch (an exhausted generator?); give it anew")
    add_notes(prepared, feed.notes)
    return prepared


def add_notes(prepared: GraphModule, notes: tuple[str, ...]) -> None:
    """Put notes into the report of a prepared graph, where it has one."""
    record = prepared.meta.get(RECORD_KEY)
    if notes and isinstance(record, GraphRecord):
        prepared.meta[RECORD_KEY] = replace(record, report=record.report.with_notes(notes))


def _check_prepared(prepared: Any) -> None:
    if not isinstance(prepared, GraphModule):
        raise CalibrationError(f"calibrate takes what prepare_pt2e returned, not a {type(prepared).__name__}")
    if observers_of(prepared):
        return
    record = prepared.meta.get(RECORD_KEY)
    if isinstance(record, GraphRecord) and record.report.quantized_bytes is not None:
        raise CalibrationError("this model is converted already: its ranges are fixed; calibrate the prepared one")
    if not isinstance(record, GraphRecord):
        raise CalibrationError(
            "this model was not prepared, so nothing in it learns a range: call prepare_pt2e(model, quantizer) on it, "
            "and calibrate what that returns"
        )


def _shard(run: _Run, data: Iterable[Any], total: int | None) -> None:
    """Feed the part of the data that this rank has, then add up the parts of all."""
    distributed.check_mergeable(run.prepared)
    before = Statistics.of(run.prepared)
    for observer in measuring(run.prepared).values():
        if not observer.frozen:  # what all ranks have in common already must not be added up
            observer.reset_min_max_vals()
    error: Exception | None = None
    done = 0
    try:
        done = run.feed(data, total)
    except Exception as failure:  # noqa: BLE001 - raised below, once the other ranks have been told
        error = failure
    if distributed.all_well(error, done, run.prepared) == 0:
        raise CalibrationError("the calibration data of every rank held no batch; give it anew")
    distributed.reduce_statistics(run.prepared)
    before.merge(Statistics.of(run.prepared)).restore(run.prepared)


CHECKPOINT_EVERY = 100
"""Batches between two checkpoints."""


@dataclass(slots=True)
class _Run:
    """One pass over data in one process. ``place``: where each batch stands in what the user gave."""

    prepared: GraphModule
    stopping: EarlyStopping
    checkpoint: Path | None
    progress: Progress | None
    compiled: bool
    place: Callable[[int], int]

    def feed(self, data: Iterable[Any], total: int | None) -> int:
        """Run every batch that no checkpoint has seen; returns how many were seen, those before included."""
        path = self._path()
        done = self._resume(path)
        batches = iter(data)
        for _ in islice(batches, done):
            pass
        saved, samples = done, None if done or distributed.world() > 1 else 0
        model = compiled_graph(self.prepared) if self.compiled else self.prepared
        randomness = IsolatedRandomness()
        with _restored(self.prepared), stage("calibrate") as shown:
            for batch in batches:
                call = _run_batch(self.prepared, model, batch, self.place(done), randomness)
                samples = None if samples is None else samples + sample_count(pytree.tree_leaves(tuple(call)))
                done += 1
                shown(done, total)
                if self.progress is not None:
                    self.progress(done, total)
                if path is not None and done - saved >= CHECKPOINT_EVERY:
                    Statistics.of(self.prepared, done).save(path)
                    saved = done
                if self.stopping.enough(self.prepared, done):
                    break
        if path is not None and done > saved:
            Statistics.of(self.prepared, done).save(path)
        if samples is None:
            self.prepared.meta.pop(SAMPLES, None)
        else:
            self.prepared.meta[SAMPLES] = self.prepared.meta.get(SAMPLES, 0) + samples
        return done

    def _path(self) -> Path | None:
        """Every rank has a file of its own: what it has seen is its shard."""
        if self.checkpoint is None or distributed.world() == 1:
            return self.checkpoint
        return self.checkpoint.with_name(f"{self.checkpoint.name}.rank{torch.distributed.get_rank()}")

    def _resume(self, path: Path | None) -> int:
        if path is None or not path.exists():
            return 0
        found = Statistics.load(path)
        found.restore(self.prepared, str(path))
        return found.batches


def _run_batch(
    prepared: GraphModule, model: Callable[..., Any], batch: Any, index: int, randomness: IsolatedRandomness
) -> Call:
    call = check_batch(batch, f"calibration batch {index}", prepared)
    try:
        check_dtypes(prepared, call)
        args, kwargs = call.copied()  # a model may write into its inputs
        with torch.no_grad(), randomness:
            model(*args, **kwargs)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the model failed on calibration batch {index} ({describe(batch)}): {error}. "
            "Give batches of what the captured model takes; transform= can pick it out of each."
        ) from error
    return call


@contextmanager
def _restored(gm: GraphModule) -> Iterator[None]:
    """Put back what the model itself writes (a cache, a counter):
    calibration leaves observers changed, nothing else.
    """
    saved = {path: value.detach().clone() for path, value in written_attributes(gm).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for path, value in written_attributes(gm).items():
                value.copy_(saved[path])
