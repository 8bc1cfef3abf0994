"""Derived observers: parameters computed from those of other observers, as a bias's from its input's and weight's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant2e.annotation.plan import DerivedFrom
from quant2e.annotation.specs import INTEGER_BOUNDS, PER_CHANNEL_SCHEMES
from quant2e.observers.encodings import integer_range, saw_no_data
from quant2e.observers.fake_quant import FakeQuantize
from quant2e.observers.straight_through import fake_quantize, round_to_grid


class DerivedObserver(nn.Module):
    """Parameters computed from those of other observers. Observes nothing itself."""

    def __init__(self, spec: DerivedFrom, sources: Sequence[nn.Module]) -> None:
        super().__init__()
        # A plain list: the sources are already registered under their own names.
        self.sources = list(sources)
        self.derive = spec.derive
        self.dtype = spec.dtype
        self.quant_min, self.quant_max = spec.quant_min, spec.quant_max
        self.qscheme, self.ch_axis = spec.qscheme, spec.ch_axis
        self.is_dynamic = False

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)`` from the sources' observers, by the author's function."""
        scale, zero_point = self.derive(self.sources)
        return scale, zero_point


class DerivedFakeQuantize(DerivedObserver):
    """Hands on what conversion will make of its tensor, with the parameters that its sources use at that moment.

    It is called after its sources, and rounds while all of them do: it has no switches and no state of its own.
    ``of_constant``: its tensor depends on parameters only. One that does not, and stays float, is not rounded.
    """

    def __init__(self, spec: DerivedFrom, sources: Sequence[nn.Module]) -> None:
        super().__init__(spec, sources)
        self.of_constant = False

    def forward(self, x: Tensor) -> Tensor:
        stays = self.dtype not in INTEGER_BOUNDS and not (self.dtype == torch.float32 and self.of_constant)
        if stays or not all(map(_rounds, self.sources)) or saw_no_data(self):
            return x
        with torch.no_grad():
            scale, zero_point = self.derive([_InUse(source) for source in self.sources])
        if self.dtype == torch.float32:
            return round_to_grid(x, torch.as_tensor(scale).flatten())
        low, high = integer_range(self)
        return fake_quantize(
            x,
            torch.as_tensor(scale).flatten(),
            torch.as_tensor(zero_point).flatten(),
            low,
            high,
            axis=self.ch_axis if self.qscheme in PER_CHANNEL_SCHEMES else None,
        )


def is_fake_quantizer(observer: Any) -> bool:
    """Whether a module hands on rounded tensors in training; another library's is known by its switch."""
    return isinstance(getattr(observer, "fake_quant_enabled", None), Tensor)


def _rounds(source: Any) -> bool:
    return bool((source.fake_quant_enabled == 1).all()) and not getattr(source, "marks_never", False)


class _InUse:
    """A source as the author's function sees it in training: with the parameters that its last forward used.

    `calculate_qparams` of the source itself would refuse a range that one bad batch spoiled, and end the training.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What the source's last forward used."""
        if isinstance(self._source, FakeQuantize):
            return self._source.scale, self._source.zero_point
        scale, zero_point = self._source.calculate_qparams()
        return scale, zero_point
