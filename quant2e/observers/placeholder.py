"""Placeholder observers, which measure nothing: they carry a decision made in advance, or only keep what they see."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant2e.annotation.granularity import DYNAMIC, Granularity, PerTensor
from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.base import ObserverBase
from quant2e.ranges.qparams import FLOAT32_EPS, plain_dtype


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


class FixedQParamsObserver(ObserverBase):
    """A scale and zero point known in advance, per tensor.

    ``quant_min``/``quant_max`` default to all integers that ``dtype`` holds. Raises `AnnotationError` for a scale that
    is not positive and finite, a range that does not fit the dtype, or a zero point outside the range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype | None = None,
        qscheme: torch.qscheme | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool | None = None,
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
        if not (math.isfinite(scale) and scale > 0):
            raise AnnotationError(f"scale={scale}: a fixed scale is a positive, finite number")
        if not low <= self.quant_min <= zero_point <= self.quant_max <= high:
            raise AnnotationError(
                f"zero_point={zero_point} with the range [{self.quant_min}, {self.quant_max}]: "
                f"need {low} <= quant_min <= zero_point <= quant_max <= {high} for {dtype}"
            )
        self.qscheme = qscheme or torch.per_tensor_affine
        self.eps = FLOAT32_EPS
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The fixed float32 scale and int64 zero point, ``[1]`` each."""
        return self.scale, self.zero_point

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():g}, zero_point={self.zero_point.item()}, dtype={self.dtype}"


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
