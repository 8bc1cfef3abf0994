"""Per-group observers: a scale for each run of neighbours along the last dimension, as in 4-bit weights."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from quant2e.errors import AnnotationError
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.observers.native.update import kernel_of
from quant2e.observers.uniform import ObserverOptions
from quant2e.ranges.minmax import MinMax, MovingAverage


class PerGroupMinMaxObserver(PerChannelMinMaxObserver):
    """The smallest and largest value of each ``group_size`` neighbours along the last dimension of a matrix.

    Its parameters have the shape ``[rows, columns / group_size]``. ``scale_dtype``: the dtype in which a backend stores
    the scales of groups, bfloat16 say; scales are rounded to it. ``averaging_constant``: keep a moving average of them
    instead, for weights in training. Raises `AnnotationError` for groups of fewer than 2.
    """

    def __init__(
        self,
        group_size: int,
        scale_dtype: torch.dtype | None = None,
        averaging_constant: float | None = None,
        **options: Unpack[ObserverOptions],
    ) -> None:
        if group_size < 2:
            raise AnnotationError(f"group_size={group_size}: a group has at least 2 values")
        super().__init__(**options)
        self.group_size = group_size
        self.scale_dtype = scale_dtype
        self.averaging_constant = averaging_constant
        if averaging_constant is None:
            self.estimator = MinMax(group_size=group_size)
        else:
            self.estimator = MovingAverage(averaging_constant, group_size=group_size)
        self.kernel = kernel_of(self.estimator)

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().calculate_qparams()
        return self._as_stored(scale), zero_point

    @torch.no_grad()
    def running_qparams(self) -> tuple[Tensor, Tensor]:
        """As `calculate_qparams`, in the middle of a training run."""
        scale, zero_point = super().running_qparams()
        return self._as_stored(scale), zero_point

    def _as_stored(self, scale: Tensor) -> Tensor:
        return scale if self.scale_dtype is None else scale.to(self.scale_dtype).to(scale.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups of {self.group_size}"
