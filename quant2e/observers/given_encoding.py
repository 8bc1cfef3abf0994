"""Given encodings: an observer that is told what its tensor becomes, by a user or a file.

Unlike `quant2e.observers.given`, which chooses other numbers for a tensor that is quantized, it settles everything:
also that a tensor stays float or gets its parameters at run time, and whatever calibration found, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quant2e.errors import CalibrationError
from quant2e.observers.base import ObserverBase
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
)


class GivenObserver(ObserverBase):
    """``encoding``: what its tensor becomes, exactly; None leaves it float.

    ``observer``: the one in whose place it stands. It goes on measuring, so that the report can say what the given
    numbers lose, and decides nothing. Tensors of the encoding are buffers: they move with the model.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    observed = True
    """It needs no data."""

    def __init__(self, encoding: Encoding | None, observer: nn.Module) -> None:
        super().__init__(getattr(encoding, "dtype", torch.float32), isinstance(encoding, DynamicEncoding))
        self.activation_post_process = observer
        self._encoding = encoding
        of_tensor = isinstance(encoding, PerTensorEncoding)
        for name in ("scale", "zero_point"):
            value = getattr(encoding, name, None)
            self.register_buffer(name, torch.tensor([value]) if of_tensor else None if value is None else value.clone())
        self.quant_min, self.quant_max = getattr(encoding, "quant_min", None), getattr(encoding, "quant_max", None)
        self.qscheme, self.ch_axis = _scheme(encoding), getattr(encoding, "axis", None)
        self.eps = getattr(observer, "eps", None)

    def given_encoding(self) -> Encoding | None:
        """The encoding, with its tensors where the model is."""
        encoding = self._encoding
        if isinstance(encoding, RoundedConstant):
            assert self.scale is not None
            return replace(encoding, scale=self.scale)
        if isinstance(encoding, PerChannelEncoding | PerGroupEncoding):
            assert self.scale is not None
            assert self.zero_point is not None
            return replace(encoding, scale=self.scale, zero_point=self.zero_point)
        return encoding

    def forward(self, x: Tensor) -> Tensor:
        """``x``, which the observer in whose place it stands has seen."""
        self.activation_post_process(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as given: ``[1]`` or ``[channels]``, for what derives its parameters from these.

        Raises `CalibrationError` for an encoding that has none.
        """
        if self.scale is None or self.zero_point is None:
            raise CalibrationError("its encoding was given, and has no scale with a zero point")
        return self.scale, self.zero_point

    def extra_repr(self) -> str:
        return "float" if self._encoding is None else type(self._encoding).__name__


def _scheme(encoding: Encoding | None) -> torch.qscheme | None:
    if isinstance(encoding, PerTensorEncoding):
        return torch.per_tensor_affine
    if isinstance(encoding, PerChannelEncoding | PerGroupEncoding):
        return torch.per_channel_affine
    return None


def in_place_of(encoding: Encoding | None, observer: nn.Module) -> GivenObserver:
    """``observer`` with a given encoding; one that was given before is replaced. See `GivenObserver`."""
    assert not isinstance(encoding, CustomEncoding), "it belongs to its observer"
    return GivenObserver(
        encoding, observer.activation_post_process if isinstance(observer, GivenObserver) else observer
    )


def has_given(observer: Any) -> bool:
    """Whether what an observer's tensor becomes was given, so that nothing that it measures decides."""
    return isinstance(observer, GivenObserver)
