"""Weights with a scale for each run of neighbours along the last dimension, as 4-bit tables and matrices have them."""

from __future__ import annotations

from typing import Unpack

from quant2e.errors import AnnotationError
from quant2e.observer import ObserverOptions, PerChannelMinMaxObserver
from quant2e.ranges import MinMax


class PerGroupMinMaxObserver(PerChannelMinMaxObserver):
    """The smallest and largest value of each ``group_size`` neighbours along the last dimension of a matrix.

    Its parameters have the shape ``[rows, columns / group_size]``. Raises `AnnotationError` for groups of fewer than 2.
    """

    def __init__(self, group_size: int, **options: Unpack[ObserverOptions]) -> None:
        if group_size < 2:
            raise AnnotationError(f"group_size={group_size}: a group has at least 2 values")
        super().__init__(**options)
        self.group_size = group_size
        self.estimator = MinMax(group_size=group_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups of {self.group_size}"
