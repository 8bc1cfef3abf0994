"""Fake quantization with scales that are found at run time, for each token or image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quant2e.annotation.granularity import Granularity, PerToken
from quant2e.errors import CalibrationError
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.observers.placeholder import PlaceholderObserver
from quant2e.observers.straight_through import fake_quantize_dynamic


class DynamicFakeQuantize(FakeQuantizeBase):
    """Fake-quantizes each token, or each image of a batch, with a scale of its own, as the converted graph will.

    ``granularity``: `PerToken`, or ``PerAxis(0)`` for images; the other arguments are those of `PlaceholderObserver`.
    Nothing is learnt: switching its observer off changes nothing. Raises `AnnotationError` as that does.
    """

    def __init__(self, granularity: Granularity | None = None, **options: Any) -> None:
        super().__init__()
        self.granularity = granularity or PerToken()
        self._adopt(PlaceholderObserver(granularity=self.granularity, **{**options, "is_dynamic": True}))
        self.eps = self.activation_post_process.eps
        self.is_dynamic = True

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize_dynamic(x, self.granularity) if self.fake_quant_enabled[0] == 1 else x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Raises `CalibrationError`: each tensor has its own."""
        raise CalibrationError("scales that are found at run time cannot be asked for: each tensor has its own")

    def extra_repr(self) -> str:
        return f"{self.dtype}, {self.granularity}, fake_quant_enabled={bool(self.fake_quant_enabled)}"
