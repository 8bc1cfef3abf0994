"""Range estimators: minima, maxima and moving averages, as pure functions on values.

Each estimator is a frozen description with ``init / update / merge / range``; its state is a frozen dataclass of
tensors, never changed in place. Values that must not widen a range are counted apart in ``counts`` (see `TALLY`).

Nothing is read back to the host where that would wait for a device or break a compiled graph; where reading is free
(`on_host`) it saves passes over the data, and the numbers are the same bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quant2e.errors import AnnotationError, CalibrationError

TALLY = ("total", "nan", "posinf", "masked")
"""Meaning of the four int64 entries of ``counts``: all values seen; NaN; +inf; mask sentinels (-inf, huge values).

Only ``total - nan - posinf - masked`` values entered the statistics.
"""

SENTINEL = 2.0**100
"""Finite values at least this large are attention-mask sentinels (``finfo.min`` and the like), not data."""

S = TypeVar("S")


class Range(Protocol[S]):
    """A range estimator with states of type ``S``."""

    def init(self, like: Tensor | None = None) -> S:
        """The state before any data, on the device of ``like``."""

    def update(self, state: S, x: Tensor) -> S:
        """The state after also seeing ``x``: floating point, any shape. Raises `CalibrationError` for other dtypes."""

    def merge(self, a: S, b: S) -> S:
        """The state after seeing what ``a`` and ``b`` saw; raises `CalibrationError` when that cannot be known."""

    def range(self, state: S) -> tuple[Tensor, Tensor]:
        """``(min, max)``, float32, a scalar or ``[channels]``."""


@dataclass(frozen=True)
class MinMaxState:
    """``min_val``, ``max_val``: float32, a scalar or ``[channels]``; ``(inf, -inf)`` or ``[0]`` before any data.

    ``counts``: int64 ``[4]``, see `TALLY`.
    """

    min_val: Tensor
    max_val: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Seen:
    """What the rows of one tensor, ``[R, N]``, contribute.

    ``min_val``, ``max_val``: float32 ``[R]``, ``(inf, -inf)`` where no value is usable; ``counts``: int64 ``[4]``, see
    `TALLY`; ``usable``: bool ``[R, N]``, or None when every value is.
    """

    min_val: Tensor
    max_val: Tensor
    counts: Tensor
    usable: Tensor | None


def sentinel_of(dtype: torch.dtype) -> float:
    """Smallest magnitude taken for a mask sentinel. float16 cannot hold `SENTINEL`: there it is the largest value."""
    return torch.finfo(dtype).max if dtype == torch.float16 else SENTINEL


def check_floating(x: Tensor) -> None:
    """Raise `CalibrationError` for integers and booleans, which have no range to quantize."""
    if not x.is_floating_point():
        raise CalibrationError(
            f"an observer was given a tensor of dtype {x.dtype} and shape {list(x.shape)}; "
            "only floating-point tensors have a range: remove the annotation from this integer or boolean tensor"
        )


def as_rows(x: Tensor, axis: int | None, group_size: int | None = None) -> Tensor:
    """``x`` as ``[channels, values]``, or with ``group_size`` as ``[*other dimensions, groups, group_size]``."""
    if group_size is not None:
        if x.dim() == 0 or x.shape[-1] % group_size:
            raise CalibrationError(
                f"groups of {group_size} do not divide the last dimension of a tensor of shape {list(x.shape)}"
            )
        return x.reshape(*x.shape[:-1], -1, group_size)
    if axis is None:
        return x.reshape(1, -1)
    if not -x.dim() <= axis < x.dim():
        raise CalibrationError(f"a tensor of shape {list(x.shape)} has no channel axis {axis}; correct ch_axis")
    return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def by_row(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` as ``[R, N]``, a row for each range, in any order of its values; and the shape that the ranges have."""
    if axis is not None or group_size is not None:
        rows = as_rows(x, axis, group_size)
        return rows.flatten(0, -2), rows.shape[:-1]
    if on_host(x):  # the order of the memory: a view, when it holds each value once
        x = x.permute(sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True))
    return x.reshape(1, -1), ()


def on_host(x: Tensor) -> bool:
    """Whether reading a value of ``x`` is free: not of a tensor behind a device's queue, or in a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def look(rows: Tensor) -> Seen:
    """Range per row and counts of non-empty floating-point rows, ``[R, N]``."""
    limit = sentinel_of(rows.dtype)
    if on_host(rows) and (ordinary := _ordinary(rows, limit)):
        return ordinary
    usable = rows.abs() < limit  # false for NaN
    low = torch.where(usable, rows, float("inf")).amin(1)
    high = torch.where(usable, rows, float("-inf")).amax(1)
    nan, posinf = torch.isnan(rows).sum(), torch.isposinf(rows).sum()
    masked = rows.numel() - usable.sum() - nan - posinf
    counts = torch.stack([torch.full_like(nan, rows.numel()), nan, posinf, masked])
    return Seen(_bound(low), _bound(high), counts, usable)


def without_zeros(rows: Tensor) -> Seen:
    """As `look`, as if the zeros of each row were not there; they are in none of the counts."""
    zero = rows == 0
    seen = look(torch.where(zero, float("-inf"), rows))  # counted as masked, and taken out again
    none = torch.zeros_like(zero.sum())
    return Seen(
        seen.min_val, seen.max_val, seen.counts - torch.stack([zero.sum(), none, none, zero.sum()]), seen.usable
    )


def _ordinary(rows: Tensor, limit: float) -> Seen | None:
    """What `look` finds when every value is data, with the least number of passes; None when some are not."""
    if rows.shape[0] == 1:  # torch.aminmax along a dimension is several times slower than the two
        low, high = (_bound(extreme.reshape(1)) for extreme in torch.aminmax(rows))
    else:
        low, high = _bound(rows.amin(1)), _bound(rows.amax(1))
    if not bool(((low > -limit) & (high < limit)).all()):  # NaN fails both comparisons
        return None
    return Seen(low, high, torch.tensor([rows.numel(), 0, 0, 0], dtype=torch.int64), None)


def _bound(extreme: Tensor) -> Tensor:
    """Float32; -0.0 becomes 0.0: which of the two a reduction returns depends on the order of the values."""
    return extreme.to(torch.float32) + 0.0


def _seen(x: Tensor, axis: int | None, group_size: int | None) -> MinMaxState:
    rows, shape = by_row(x.detach(), axis, group_size)
    batch = look(rows)
    return MinMaxState(batch.min_val.reshape(shape), batch.max_val.reshape(shape), batch.counts)


def state_without_data(like: Tensor | None, whole: bool) -> MinMaxState:
    """The state before any data, of a whole tensor or of its channels or groups."""
    device = None if like is None else like.device
    shape = () if whole else (0,)
    return MinMaxState(
        torch.full(shape, float("inf"), device=device, dtype=torch.float32),
        torch.full(shape, float("-inf"), device=device, dtype=torch.float32),
        torch.zeros(len(TALLY), dtype=torch.int64, device=device),
    )


def _channels(x: Tensor) -> str:
    return str(x.numel()) if x.dim() == 1 else "x".join(str(size) for size in x.shape)


def check_channels(a: Tensor, b: Tensor) -> None:
    """Raise `CalibrationError` unless both hold as many channels or groups."""
    if a.shape != b.shape:
        raise CalibrationError(
            f"a per-channel observer saw {_channels(a)} channels before and {_channels(b)} now; "
            "the channel axis must have a constant size: use a per-tensor scheme or correct ch_axis"
        )


def check_layout(axis: int | None, group_size: int | None) -> None:
    """Raise `AnnotationError` for a group size below 1, or for channels and groups at once."""
    if group_size is not None and (group_size < 1 or axis is not None):
        raise AnnotationError(
            f"group_size={group_size} with axis={axis}: groups have 1 or more neighbours along the last dimension, and "
            "no channel axis"
        )


@dataclass(frozen=True)
class MinMax:
    """Smallest and largest value seen. `merge` is exact and order-free.

    Per tensor; with ``axis`` per channel; with ``group_size`` per so many neighbours along the last dimension, with
    ranges of shape ``[*other dimensions, groups]``.
    """

    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_layout(self.axis, self.group_size)

    def init(self, like: Tensor | None = None) -> MinMaxState:
        return state_without_data(like, self.axis is None and self.group_size is None)

    def update(self, state: MinMaxState, x: Tensor) -> MinMaxState:
        check_floating(x)
        if x.numel() == 0:
            return state
        return self.merge(state, _seen(x, self.axis, self.group_size))

    def merge(self, a: MinMaxState, b: MinMaxState) -> MinMaxState:
        if a.min_val.numel() == 0 or b.min_val.numel() == 0:
            seen = a if b.min_val.numel() == 0 else b
            return MinMaxState(seen.min_val, seen.max_val, a.counts + b.counts)
        check_channels(a.min_val, b.min_val)
        low, high = torch.minimum(a.min_val, b.min_val), torch.maximum(a.max_val, b.max_val)
        return MinMaxState(low, high, a.counts + b.counts)

    def range(self, state: MinMaxState) -> tuple[Tensor, Tensor]:
        return state.min_val, state.max_val


@dataclass(frozen=True)
class MovingAverage:
    """Exponential moving average of each batch's minimum and maximum: ``m + averaging_constant * (batch - m)``.

    The first batch sets the average (arXiv:1712.05877, section 3.1). The result depends on the order of the batches.
    """

    averaging_constant: float = 0.01
    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_layout(self.axis, self.group_size)

    def init(self, like: Tensor | None = None) -> MinMaxState:
        return state_without_data(like, self.axis is None and self.group_size is None)

    def update(self, state: MinMaxState, x: Tensor) -> MinMaxState:
        check_floating(x)
        if x.numel() == 0:
            return state
        return self.follow(state, _seen(x, self.axis, self.group_size))

    def follow(self, state: MinMaxState, batch: MinMaxState) -> MinMaxState:
        """The state after a batch whose own range and counts are ``batch``."""
        counts = state.counts + batch.counts
        if state.min_val.numel() == 0:
            return MinMaxState(batch.min_val, batch.max_val, counts)
        check_channels(state.min_val, batch.min_val)
        low, high = self._towards(state.min_val, batch.min_val), self._towards(state.max_val, batch.max_val)
        return MinMaxState(low, high, counts)

    def _towards(self, average: Tensor, new: Tensor) -> Tensor:
        """One step; an infinity on either side stands for "no data there"."""
        moved = average + self.averaging_constant * (new - average)
        return torch.where(torch.isinf(average), new, torch.where(torch.isinf(new), average, moved))

    def merge(self, a: MinMaxState, b: MinMaxState) -> MinMaxState:
        raise CalibrationError(
            "moving averages depend on the order of the batches and cannot be merged; "
            "calibrate in one process, or use MinMaxObserver or HistogramObserver"
        )

    def range(self, state: MinMaxState) -> tuple[Tensor, Tensor]:
        return state.min_val, state.max_val
