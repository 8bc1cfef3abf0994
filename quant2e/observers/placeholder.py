"""Placeholder observers, which measure nothing: they carry a decision made in advance, or only keep what they see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self, Unpack

import torch
from torch import Tensor

from quant2e.annotation.granularity import DYNAMIC, Granularity, PerTensor
from quant2e.annotation.specs import INTEGER_BOUNDS, PER_CHANNEL_SCHEMES
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.base import ObserverBase
from quant2e.observers.uniform import ObserverOptions, checked_factor, number_format_of
from quant2e.ranges.qparams import AFFINE_SCHEMES, FLOAT32_EPS, FLOAT_QPARAMS, SYMMETRIC_SCHEMES, plain_dtype


class PlaceholderObserver(ObserverBase):
    """Marks a tensor whose parameters are not found by calibration: dynamic quantization, float16, a float bias.

    ``dtype``: what the tensor becomes. With ``is_dynamic`` and an integer dtype, ``quant_min``/``quant_max`` default
    to all integers that dtype holds. ``granularity``: which elements share a dynamic scale, one of
    `granularity.DYNAMIC`; all but the whole tensor mean affine int8 in all of -128..127, by XNNPACK's formula.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool | None = None,
        ch_axis: int | None = None,
        granularity: Granularity | None = None,
    ) -> None:
        dtype = plain_dtype(dtype or torch.float32)
        super().__init__(dtype, bool(is_dynamic) or compute_dtype is not None)
        bounds = INTEGER_BOUNDS.get(dtype)
        if self.is_dynamic and bounds is not None:
            quant_min = bounds[0] if quant_min is None else quant_min
            quant_max = bounds[1] if quant_max is None else quant_max
            if not bounds[0] <= quant_min < quant_max <= bounds[1]:
                raise AnnotationError(
                    f"quant_min={quant_min}, quant_max={quant_max}: a range of integers within {bounds} fits {dtype}"
                )
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.qscheme = qscheme or torch.per_tensor_affine
        self.eps = FLOAT32_EPS if eps is None else float(eps)
        self.ch_axis = ch_axis
        self.custom_op = custom_op_name
        self.granularity = granularity or PerTensor()
        if self.granularity != PerTensor():
            self._check_granularity()

    def _check_granularity(self) -> None:
        if self.granularity not in DYNAMIC or not self.is_dynamic:
            raise AnnotationError(
                f"{self.granularity}: scales found at run time (is_dynamic=True) are of one of "
                f"{', '.join(map(str, DYNAMIC))}"
            )
        numbers = (self.dtype, self.quant_min, self.quant_max, self.qscheme)
        if numbers != (torch.int8, -128, 127, torch.per_tensor_affine):
            raise AnnotationError(
                f"{self.granularity} with {self.dtype} in [{self.quant_min}, {self.quant_max}], {self.qscheme}: the "
                "ops that find such scales make torch.per_tensor_affine torch.int8 in [-128, 127]"
            )

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        raise CalibrationError(
            "a PlaceholderObserver has no scale: its tensor is quantized dynamically or stays in floating point; "
            "use an observer that measures (MinMaxObserver, HistogramObserver) for static quantization"
        )

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"


def _apply_exactly(module: ObserverBase, fn: Callable[[Tensor], Tensor]) -> None:
    """Given numbers follow their module to another device, but stay exact when the model becomes half precision."""
    for name, value in module.named_buffers(recurse=False):
        moved = fn(value)
        setattr(module, name, moved if moved.dtype == value.dtype else value.to(moved.device))
    for child in module.children():
        child._apply(fn)


class FixedQParamsObserver(ObserverBase):
    """Scales and zero points known in advance: per tensor, with ``ch_axis`` per channel, with ``group_size`` per group.

    ``scale``: a number or float tensor, ``[1]``, ``[channels]`` or ``[rows, groups]``. ``zero_point``: as many integers
    or, for ``per_channel_affine_float_qparams``, floats. ``quant_min``/``quant_max`` default to all integers that
    ``dtype`` holds. Raises `AnnotationError` for a scale that is not positive and finite, a range that does not fit the
    dtype, or a zero point outside the range. Their place in a prepared graph: `quant2e.observers.given`.
    """

    scale: Tensor
    zero_point: Tensor
    observed = True
    """It needs no data."""

    def __init__(
        self,
        scale: float | Tensor,
        zero_point: float | Tensor,
        dtype: torch.dtype | None = None,
        qscheme: torch.qscheme | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool | None = None,
        ch_axis: int | None = None,
        group_size: int | None = None,
    ) -> None:
        dtype = plain_dtype(dtype or torch.uint8)
        super().__init__(dtype)
        if is_dynamic:
            raise AnnotationError("fixed parameters are static: drop is_dynamic, or use PlaceholderObserver")
        if dtype not in INTEGER_BOUNDS:
            raise AnnotationError(f"dtype={dtype}: fixed parameters describe integers")
        low, high = INTEGER_BOUNDS[dtype]
        self.quant_min = low if quant_min is None else quant_min
        self.quant_max = high if quant_max is None else quant_max
        self.qscheme = qscheme or torch.per_tensor_affine
        self.ch_axis, self.group_size = ch_axis, group_size
        self.eps = FLOAT32_EPS
        zero = torch.float32 if self.qscheme == FLOAT_QPARAMS else torch.int64
        self.register_buffer("scale", torch.atleast_1d(torch.as_tensor(scale)).detach().to(torch.float32, copy=True))
        self.register_buffer("zero_point", torch.atleast_1d(torch.as_tensor(zero_point)).detach().to(zero, copy=True))
        self._check((self.quant_min, self.quant_max))

    def _check(self, integers: tuple[int, int]) -> None:
        low, high = INTEGER_BOUNDS[self.dtype]
        least, most = integers
        scales, zeros = self.scale.flatten(), self.zero_point.flatten()
        if scales.numel() != zeros.numel() or not scales.numel():
            raise AnnotationError(f"{scales.numel()} scales and {zeros.numel()} zero points do not pair up")
        wrong = scales[~(torch.isfinite(scales) & (scales > 0))]
        if wrong.numel():
            raise AnnotationError(f"scale={wrong[0].item()}: a fixed scale is a positive, finite number")
        if zeros.is_floating_point() and bool(torch.isfinite(zeros).all()):
            zeros = zeros.new_zeros(1)  # such a zero point may lie anywhere
        outside = zeros[~((zeros >= least) & (zeros <= most))]
        if outside.numel() or not low <= least <= most <= high:
            zero = outside[0].item() if outside.numel() else zeros[0].item()
            raise AnnotationError(
                f"zero_point={zero} with the range [{least}, {most}]: "
                f"need {low} <= quant_min <= zero_point <= quant_max <= {high} for {self.dtype}"
            )
        if scales.numel() > 1 and self.qscheme not in PER_CHANNEL_SCHEMES:
            raise AnnotationError(
                f"{scales.numel()} scales with {self.qscheme}: one for the tensor, or a scheme of channels"
            )

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The fixed float32 scales and zero points, of the shapes that were given."""
        return self.scale, self.zero_point

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _apply_exactly(self, fn)
        return self

    def extra_repr(self) -> str:
        if self.scale.numel() == 1:
            return f"scale={self.scale.item():g}, zero_point={self.zero_point.item()}, dtype={self.dtype}"
        return f"{self.scale.numel()} scales, dtype={self.dtype}"


class FixedAmaxObserver(ObserverBase):
    """The largest magnitude known in advance, of a tensor or of each slice along ``ch_axis``: no data is looked at.

    ``amax``: a number, or one for each channel; finite and not negative. The scale is ``scale_amax * amax / quant_max``
    (at least ``eps``) and the zero point 0, see `NumberFormat.from_amax`; the other arguments are those of
    `ObserverOptions`. Raises `AnnotationError` for an ``amax`` that is none, or does not fit the scheme, and
    `CalibrationError` for a tensor with another number of channels.
    """

    amax: Tensor

    def __init__(self, amax: float | Sequence[float] | Tensor, **options: Unpack[ObserverOptions]) -> None:
        if options.get("is_dynamic"):
            raise AnnotationError("a fixed amax is static: drop is_dynamic, or use PlaceholderObserver")
        options["from_amax"] = True
        grid = number_format_of(options, (*AFFINE_SCHEMES, *SYMMETRIC_SCHEMES), torch.per_tensor_symmetric)
        super().__init__(grid.dtype)
        values = torch.as_tensor(amax, dtype=torch.float32).detach().clone()
        per_channel = grid.qscheme in PER_CHANNEL_SCHEMES
        if values.dim() != int(per_channel) or not bool((torch.isfinite(values) & (values >= 0)).all()):
            wanted = "one number per channel" if per_channel else "one number"
            raise AnnotationError(f"amax={values.tolist()}: {grid.qscheme} takes {wanted}, finite and 0 or larger")
        self.grid, self.eps = grid, grid.eps
        self.quant_min, self.quant_max, self.qscheme = grid.quant_min, grid.quant_max, grid.qscheme
        self.ch_axis = (options.get("ch_axis") or 0) if per_channel else None
        self.scale_amax = checked_factor(options.get("scale_amax"))
        self.register_buffer("amax", values)

    def forward(self, x: Tensor) -> Tensor:
        if self.ch_axis is not None and x.shape[self.ch_axis] != self.amax.numel():
            raise CalibrationError(
                f"amax holds {self.amax.numel()} numbers, and a tensor of shape {list(x.shape)} has "
                f"{x.shape[self.ch_axis]} channels along axis {self.ch_axis}: give one number for each"
            )
        return x

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Float32 scales and int64 zero points, which are 0: ``[1]`` or ``[channels]``."""
        amax = self.amax * self.scale_amax
        return self.grid.qparams(-amax, amax)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _apply_exactly(self, fn)
        return self

    def extra_repr(self) -> str:
        shown = f"{self.amax.item():g}" if self.amax.dim() == 0 else f"of {self.amax.numel()} channels"
        return f"amax={shown}, {self.dtype}, [{self.quant_min}, {self.quant_max}]"


class NoopObserver(ObserverBase):
    """Carries a dtype (float16, say) and does nothing."""

    def __init__(self, dtype: torch.dtype | None = None, custom_op_name: str = "") -> None:
        super().__init__(plain_dtype(dtype or torch.float16))
        self.custom_op = custom_op_name

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        raise CalibrationError("a NoopObserver has no scale; use an observer that measures")


class RecordingObserver(ObserverBase):
    """Keeps a copy of every tensor it sees, in ``tensor_val``. For debugging: memory grows with the data."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__(plain_dtype(dtype or torch.quint8))
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tensor_val.append(x.detach().clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        """The recorded tensors, oldest first."""
        return self.tensor_val

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        raise CalibrationError("a RecordingObserver has no scale; use an observer that measures")
