"""Ranges of weights by least squared error: what `least_error.fit` makes of the encoding of one observer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant2e.errors import AnnotationError
from quant2e.observers.base import inner_observer, integer_limits
from quant2e.observers.encodings import PerChannelEncoding, PerGroupEncoding, PerTensorEncoding
from quant2e.observers.given import GivenObserver, StaticEncoding
from quant2e.observers.placeholder import FixedQParamsObserver
from quant2e.ranges.least_error import KnownRows, as_it_is, fit
from quant2e.ranges.minmax import as_rows
from quant2e.ranges.qparams import FLOAT32_EPS, FLOAT_QPARAMS, NumberFormat

_CLEARLY = 0.95
"""A weight gets zero points that nobody asked for only where they leave less than this part of the error."""


@dataclass(frozen=True, slots=True)
class FittedRange:
    """``encoding``: of least squared error; ``before``, ``after``: mean squared errors of the old one and of this."""

    encoding: StaticEncoding
    before: float
    after: float


def fit_encoding(
    observer: nn.Module,
    encoding: StaticEncoding,
    values: Sequence[Tensor],
    importances: Sequence[Tensor | None],
    *,
    zero_points: str = "as_asked",
) -> FittedRange | str:
    """The encoding of the weights ``values`` with the least squared error, of the kind that their observer asks for.

    ``importances``: of each value, of its shape, or None where all count the same. ``zero_points``: "where_better" also
    gives them to a symmetric encoding. A string says why there is none.
    """
    grid = _number_format(observer, encoding)
    if isinstance(grid, str):
        return grid
    if any(integer_limits(observer, torch.zeros_like(value)) is not None for value in values):
        return "its scales leave room for what a kernel adds in few bits"
    rows = _rows(observer, encoding, values, importances)
    if isinstance(rows, str):
        return rows
    scale, zero_point = torch.as_tensor(encoding.scale), torch.as_tensor(encoding.zero_point)
    start = scale.float().flatten().to(rows.values.device), zero_point.flatten().to(rows.values.device, torch.int64)
    found = fit(rows, grid, start)
    if zero_points == "where_better" and grid.symmetric:
        affine = fit(rows, replace(grid, qscheme=torch.per_channel_affine), (found.scale, found.zero_point))
        if float(affine.after.sum()) < _CLEARLY * float(found.after.sum()):
            found = replace(affine, before=found.before)
    if not bool((found.after < found.before).any()):
        return FittedRange(encoding, float(found.before.mean()), float(found.before.mean()))
    made = _with(encoding, found.scale, found.zero_point)
    return FittedRange(made, float(found.before.mean()), float(found.after.mean()))


def _with(encoding: StaticEncoding, scale: Tensor, zero_point: Tensor) -> StaticEncoding:
    if isinstance(encoding, PerTensorEncoding):
        return replace(encoding, scale=float(scale), zero_point=int(zero_point))
    zero = zero_point.reshape(encoding.zero_point.shape).to(encoding.zero_point)
    return replace(encoding, scale=scale.reshape(encoding.scale.shape).to(encoding.scale), zero_point=zero)


def _number_format(observer: Any, encoding: StaticEncoding) -> NumberFormat | str:
    """The integers of an encoding, and what its observer asks of scales and zero points."""
    inner = inner_observer(observer)
    if isinstance(inner, FixedQParamsObserver):
        return "its spec fixes its scale"
    own = getattr(inner, "grid", None)
    scheme = getattr(observer, "qscheme", None)
    if scheme == FLOAT_QPARAMS or torch.as_tensor(encoding.zero_point).is_floating_point():
        return "its zero points are no integers"
    kept: dict[str, Any] = {"dtype": encoding.dtype, "quant_min": encoding.quant_min, "quant_max": encoding.quant_max}
    try:
        if isinstance(own, NumberFormat):
            grid = replace(own, qscheme=scheme or own.qscheme, **kept)
        else:
            eps = getattr(inner, "eps", None)
            eps = FLOAT32_EPS if eps is None else float(eps)
            grid = NumberFormat(qscheme=scheme or torch.per_tensor_affine, eps=eps, **kept)
    except AnnotationError as error:
        return str(error)
    if grid.symmetric:
        middle = grid.qparams(torch.zeros(1), torch.ones(1))[1]
        if not bool((torch.as_tensor(encoding.zero_point).cpu() == middle).all()):
            return "its zero point is not in the middle of its integers"
    return grid


def _rows(
    observer: Any, encoding: StaticEncoding, values: Sequence[Tensor], importances: Sequence[Tensor | None]
) -> KnownRows | str:
    """A row for each scale; of several weights that share them, side by side."""
    axis = encoding.axis if isinstance(encoding, PerChannelEncoding) else None
    size = encoding.group_size if isinstance(encoding, PerGroupEncoding) else None
    laid = [as_rows(value.float(), axis, size).flatten(0, -2) for value in values]
    if len({rows.shape[0] for rows in laid}) > 1:
        return "it shares its scales with weights of another shape"
    dtype = getattr(inner_observer(observer), "scale_dtype", None)
    stored = as_it_is if dtype is None else lambda scale: scale.to(dtype).to(scale.dtype)
    if all(importance is None for importance in importances):
        return KnownRows(torch.cat(laid, 1), None, stored)
    each = [torch.ones_like(v) if d is None else d.float() for v, d in zip(values, importances, strict=True)]
    weights = torch.cat([as_rows(d, axis, size).flatten(0, -2) for d in each], 1)
    return KnownRows(torch.cat(laid, 1), weights, stored)


def was_given(observer: Any) -> bool:
    """Whether the parameters of an observer were chosen by somebody before."""
    return isinstance(observer, FixedQParamsObserver | GivenObserver)
