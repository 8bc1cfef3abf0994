"""Runs data through an observed graph. Statistics stay, data does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.errors import CalibrationError
from quant2e.in_place import written_attributes

Progress = Callable[[int, int | None], None]
"""Called after each batch with the number done and, where it is known, the total."""


@dataclass(frozen=True, slots=True)
class Call:
    """A batch with both positional and keyword inputs."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class IsolatedRandomness:
    """Runs code on a random stream of its own, so that the caller's stream is as it was."""

    def __init__(self) -> None:
        self._own = torch.get_rng_state()
        self._callers = self._own

    def __enter__(self) -> None:
        self._callers = torch.get_rng_state()
        torch.set_rng_state(self._own)

    def __exit__(self, *exc: object) -> None:
        self._own = torch.get_rng_state()
        torch.set_rng_state(self._callers)


def call_with(model: Callable[..., Any], batch: Any) -> Any:
    """Call ``model`` on one batch: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs."""
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    raise CalibrationError(
        f"a calibration batch is a {type(batch).__name__}; give a tensor, a tuple of positional inputs or a dict of "
        "keyword inputs"
    )


def batch_count(data: Any) -> int | None:
    """How many batches an iterable holds, when it says so."""
    try:
        return len(data)
    except TypeError:
        return None


def calibrate(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    num_batches: int | None = None,
    progress: Progress | None = None,
) -> GraphModule:
    """Run ``data`` through a prepared model, so that its observers learn their ranges; returns the same model.

    ``data``: any iterable of what the model takes: tensors, tuples of positional inputs, dicts of keyword inputs; a
    DataLoader works. ``num_batches``: stop after so many. Nothing but statistics is kept, and the caller's random
    stream is as it was. Raises `CalibrationError` for data without a batch, and names the batch a model fails on.
    """
    if not isinstance(prepared, GraphModule):
        raise CalibrationError(f"calibrate takes what prepare_pt2e returned, not a {type(prepared).__name__}")
    if isinstance(data, (Tensor, str)):
        raise CalibrationError("calibration data is an iterable of batches; wrap a single batch in a list: [batch]")
    if not isinstance(data, Iterable):
        raise CalibrationError(f"calibration data is an iterable of batches, and this is a {type(data).__name__}")
    if num_batches is not None and num_batches < 1:
        raise CalibrationError(f"num_batches={num_batches}: calibrate on at least one batch, or leave it out for all")
    known = batch_count(data)
    total = known if num_batches is None else num_batches if known is None else min(known, num_batches)
    with _restored(prepared):
        done = _feed(prepared, islice(data, num_batches), total, progress)
    if done == 0:
        raise CalibrationError("the calibration data held no batch (an exhausted generator?); give it anew")
    return prepared


@contextmanager
def _restored(gm: GraphModule) -> Iterator[None]:
    """Put back what the model itself writes (a cache, a counter): calibration leaves observers changed, nothing else."""
    saved = {path: value.detach().clone() for path, value in written_attributes(gm).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for path, value in written_attributes(gm).items():
                value.copy_(saved[path])


def _feed(prepared: GraphModule, data: Iterable[Any], total: int | None, progress: Progress | None) -> int:
    """Run every batch; returns how many there were."""
    randomness = IsolatedRandomness()
    done = 0
    for batch in data:
        try:
            with torch.no_grad(), randomness:
                call_with(prepared, batch)
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"the model failed on calibration batch {done} ({describe(batch)}): {error}. "
                "Give batches of what the captured model takes."
            ) from error
        done += 1
        if progress is not None:
            progress(done, total)
    return done


def describe(batch: Any) -> str:
    """Shapes and dtypes of a batch, for messages."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(describe(v) for v in batch) + ")"
    return type(batch).__name__
