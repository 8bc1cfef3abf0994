"""Base of the measuring observers: arguments, an estimator and its state in buffers, the range and its encoding.

Their buffers hold the statistics and nothing else, so ``state_dict``, ``deepcopy`` and ``.to(device)`` carry exactly
what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Generic, Self, TypedDict, TypeVar

import torch
from torch import Tensor

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.base import ObserverBase
from quant2e.observers.native.update import kernel_of, native_update
from quant2e.ranges.histogram import HistogramState
from quant2e.ranges.minmax import MinMaxState, Range
from quant2e.ranges.qparams import FLOAT32_EPS, NumberFormat, plain_dtype
from quant2e.ranges.sentinels import hide_sentinels

S = TypeVar("S", bound="MinMaxState | HistogramState")

_REDUCED = {torch.int8: (-64, 63), torch.uint8: (0, 127)}


class ObserverOptions(TypedDict, total=False):
    """Arguments that all measuring observers take; ``None`` stands for the default.

    ``dtype``: integer dtype of the quantized tensor (uint8). ``qscheme``: symmetric or affine.
    ``quant_min``, ``quant_max``: both or neither (all integers of the dtype). ``reduce_range``: one bit less.
    ``eps``: smallest scale. ``power_of_two``: scales are powers of two; ``from_amax``: scale ``max|x| / quant_max`` and
    zero point 0 (see `NumberFormat`). ``scale_amax``: a positive factor on the range that was found. ``is_dynamic``:
    parameters are found at run time. ``factory_kwargs``: ``device`` of the statistics. ``ch_axis`` matters per channel
    only.
    """

    dtype: torch.dtype | None
    qscheme: torch.qscheme | None
    reduce_range: bool | None
    quant_min: int | None
    quant_max: int | None
    factory_kwargs: Mapping[str, Any] | None
    eps: float | None
    power_of_two: bool | None
    from_amax: bool | None
    scale_amax: float | None
    is_dynamic: bool | None
    ch_axis: int | None


def _integer_range(dtype: torch.dtype, options: ObserverOptions) -> tuple[int, int, bool]:
    """``quant_min, quant_max``, and whether the caller gave them."""
    low, high = options.get("quant_min"), options.get("quant_max")
    reduce = bool(options.get("reduce_range"))
    if (low is None) != (high is None):
        raise AnnotationError(f"quant_min={low} and quant_max={high}: give both, or neither for all of {dtype}")
    if low is not None and high is not None:
        return (low // 2, high // 2, True) if reduce else (low, high, True)
    if dtype not in INTEGER_BOUNDS:
        known = ", ".join(str(d) for d in INTEGER_BOUNDS)
        raise AnnotationError(f"dtype={dtype}: an observed range becomes integers of one of {known}")
    full = INTEGER_BOUNDS[dtype]
    return (*(_REDUCED.get(dtype, full) if reduce else full), False)


def number_format_of(
    options: ObserverOptions, allowed: tuple[torch.qscheme, ...], default: torch.qscheme
) -> NumberFormat:
    """The integers that ``options`` ask for.
    Raises `AnnotationError` when they contradict each other or ``allowed``.
    """
    requested = options.get("dtype") or torch.quint8
    dtype, qscheme = plain_dtype(requested), options.get("qscheme") or default
    if qscheme not in allowed:
        raise AnnotationError(f"qscheme={qscheme}: this observer takes {' or '.join(str(s) for s in allowed)}")
    if requested == torch.quint4x2 and options.get("quant_min") is None and options.get("quant_max") is None:
        low, high, custom = 0, 15, False
    else:
        low, high, custom = _integer_range(dtype, options)
    eps = options.get("eps")
    grid = NumberFormat(
        dtype=dtype,
        quant_min=low,
        quant_max=high,
        qscheme=qscheme,
        eps=FLOAT32_EPS if eps is None else float(eps),
        custom_range=custom,
        power_of_two=bool(options.get("power_of_two")),
        from_amax=bool(options.get("from_amax")),
    )
    if options.get("reduce_range") and grid.symmetric and dtype == torch.uint8 and not custom:
        raise AnnotationError(
            "symmetric uint8 has its zero point at 128, outside the reduced range [0, 127]; use int8, or affine uint8"
        )
    return grid


def checked_factor(given: float | None) -> float:
    """The factor on a range. Raises `AnnotationError` unless it is positive and finite."""
    factor = 1.0 if given is None else float(given)
    if not (math.isfinite(factor) and factor > 0):
        raise AnnotationError(f"scale_amax={given}: the factor on a range is a positive, finite number")
    return factor


class UniformQuantizationObserverBase(ObserverBase, Generic[S]):
    """Common part of the measuring observers: an estimator, its state in buffers, and the `NumberFormat` it is measured
    for.

    ``frozen``: statistics are final and ``forward`` only returns its input. ``statistics``: names of the buffers that
    hold them, in the order of the state's fields. ``never``: where readers of the tensor may take far values for
    "never", the magnitudes from which these are counted as masked, see `sentinels`; preparation sets it.
    """

    never: tuple[float, float] | None = None

    min_val: Tensor
    max_val: Tensor
    counts: Tensor
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme

    def __init__(
        self, estimator: Range[S], state_type: Callable[..., S], grid: NumberFormat, options: ObserverOptions
    ) -> None:
        super().__init__(grid.dtype, bool(options.get("is_dynamic")))
        self.estimator: Range[S] = estimator
        self.grid = grid
        self.quant_min, self.quant_max, self.qscheme, self.eps = grid.quant_min, grid.quant_max, grid.qscheme, grid.eps
        self.reduce_range = bool(options.get("reduce_range"))
        self.scale_amax = checked_factor(options.get("scale_amax"))
        self.frozen = False
        self._state_type: Callable[..., S] = state_type
        device = (options.get("factory_kwargs") or {}).get("device")
        nothing = estimator.init(torch.empty(0, device=device))
        self.statistics = tuple(f.name for f in fields(nothing))
        self.kernel = kernel_of(estimator)
        for name in self.statistics:
            self.register_buffer(name, getattr(nothing, name))

    def _live_state(self) -> S:
        return self._state_type(*(getattr(self, name) for name in self.statistics))

    def _store(self, state: S) -> None:
        # In place: buffers made under inference mode could not be updated outside it.
        for name in self.statistics:
            buffer, value = getattr(self, name), getattr(state, name)
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)

    @property
    def state(self) -> S:
        """The statistics as an immutable value (a copy), for the functions of `estimator`."""
        return self._state_type(*(getattr(self, name).clone() for name in self.statistics))

    @property
    def total(self) -> int:
        """How many values were seen, of every kind."""
        return int(self.counts[0])

    @property
    def nan_count(self) -> int:
        """How many values were NaN."""
        return int(self.counts[1])

    @property
    def posinf_count(self) -> int:
        """How many values were +inf."""
        return int(self.counts[2])

    @property
    def masked_count(self) -> int:
        """How many values were mask sentinels: -inf, or huge (`minmax.SENTINEL`), or found as such (``never``)."""
        return int(self.counts[3])

    @property
    def marks_never(self) -> bool:
        """Sentinels were seen, and readers of the tensor tell them from data: no integer can stand for them."""
        return self.never is not None and self.masked_count > 0

    @property
    def observed(self) -> bool:
        """At least one value entered the statistics."""
        return self.total > self.nan_count + self.posinf_count + self.masked_count

    def forward(self, x: Tensor) -> Tensor:
        if not self.frozen:
            data = x if self.never is None else hide_sentinels(x, self.never)
            if not native_update(self, data):
                self._update(data)
        return x

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        if x.device != self.counts.device:
            self.to(x.device)
        self._store(self.estimator.update(self._live_state(), x))

    def freeze(self) -> Self:
        """Keep the statistics as they are from now on."""
        self.frozen = True
        return self

    def narrow(self, bits: int) -> Self:
        """Use the integers of so many bits: the middle ones of a signed dtype, the lowest ones of an unsigned one.

        Raises `AnnotationError` unless ``2 <= bits`` and the dtype has as many.
        """
        size = torch.iinfo(self.dtype).bits
        if not 2 <= bits <= size:
            raise AnnotationError(f"bits={bits}: {self.dtype} holds 2 to {size} bits")
        low = 0 if INTEGER_BOUNDS[self.dtype][0] == 0 else -(2 ** (bits - 1))
        high = low + 2**bits - 1
        self.grid = replace(self.grid, quant_min=low, quant_max=high, custom_range=True)
        self.quant_min, self.quant_max = low, high
        return self

    @torch.no_grad()
    def reset_min_max_vals(self) -> None:
        """Forget all data."""
        self._store(self.estimator.init(self.counts))

    def range(self) -> tuple[Tensor, Tensor]:
        """The range ``(min, max)`` to represent: float32, a scalar or ``[channels]``.

        Raises `CalibrationError` when no value was seen (in any channel), or NaN or +inf were.
        """
        if self.nan_count or self.posinf_count:
            raise CalibrationError(
                f"saw {self.nan_count} NaN and {self.posinf_count} +inf among {self.total} values: their range is "
                "unknown; fix the calibration data or the model, or leave this op in floating point"
            )
        if not self.observed:
            seen = f"all {self.total} values seen were masked" if self.total else "no data was seen"
            raise CalibrationError(f"{seen}: run calibration data that reaches this tensor before converting")
        if missing := int(torch.isinf(self.min_val).sum()):
            raise CalibrationError(f"{missing} of {self.min_val.numel()} channels saw masked values only")
        if self.grid.from_amax and self.quant_min == 0 and float(self.min_val.min()) < 0:
            raise CalibrationError(
                f"saw {float(self.min_val.min()):g} where integers from 0 to {self.quant_max} stand for values from 0 "
                "on: quantize this tensor with signed integers, or clamp it first"
            )
        return self._scaled_range()

    def _scaled_range(self) -> tuple[Tensor, Tensor]:
        low, high = self._range()
        return (low, high) if self.scale_amax == 1.0 else (low * self.scale_amax, high * self.scale_amax)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.estimator.range(self._live_state())

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Float32 scales and int64 zero points, ``[1]`` or ``[channels]``. Raises as `range` does."""
        return self.grid.qparams(*self.range())

    @torch.no_grad()
    def running_qparams(self) -> tuple[Tensor, Tensor]:
        """As `calculate_qparams`, in the middle of the data:
        one batch with NaN or +inf does not stop a training run.
        """
        return self.grid.qparams(*self._scaled_range())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Statistics follow their module to another device, but stay exact when the model becomes half precision.
        for name, value in self.named_buffers(recurse=False):
            moved = fn(value)
            setattr(self, name, moved if moved.dtype == value.dtype else value.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "peaks", None)  # in checkpoints of versions that had it
        for name in self.statistics:
            saved, buffer = state_dict.get(prefix + name), self.get_buffer(name)
            if saved is not None and saved.dim() and buffer.dim():
                buffer.resize_(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        seen = f"min_val={self.min_val}, max_val={self.max_val}" if self.observed else "no data"
        return f"{self.dtype}, [{self.quant_min}, {self.quant_max}], {self.qscheme}, {seen}"
