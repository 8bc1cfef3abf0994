"""Learned step size quantization (LSQ): fake-quantizers whose scale and zero point are trained with the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quant2e.errors import AnnotationError
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.observers.straight_through import learned_fake_quantize
from quant2e.ranges.qparams import FLOAT32_EPS, SYMMETRIC_SCHEMES


class LearnableFakeQuantize(FakeQuantizeBase):
    """Fake quantization whose scale and zero point are trained with the weights (LSQ, LSQ+).

    They start from what ``observer`` measures and are None before the first data; `enable_range_learning` stops
    observing and gives them gradients. ``use_grad_scaling``: LSQ's scaling of those gradients (see `straight_through`).
    The zero point of a symmetric scheme stays 0.
    """

    scale: nn.Parameter | None
    zero_point: nn.Parameter | None
    learning_enabled: Tensor
    eps: Tensor

    def __init__(
        self,
        observer: Callable[..., Any],
        quant_min: int = 0,
        quant_max: int = 255,
        use_grad_scaling: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        self._adopt(observer(quant_min=quant_min, quant_max=quant_max, **observer_kwargs))
        if observer_kwargs.get("is_dynamic"):
            raise AnnotationError("a learned scale is static: drop is_dynamic, or use FakeQuantize")
        self.is_dynamic = False
        self.use_grad_scaling = use_grad_scaling
        self.register_buffer("eps", torch.tensor([getattr(self.activation_post_process, "eps", FLOAT32_EPS)]))
        self.register_buffer("learning_enabled", torch.tensor([0], dtype=torch.uint8))
        self.register_parameter("scale", None)
        self.register_parameter("zero_point", None)
        self._initialized = False

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0 and stays so."""
        return self.qscheme in SYMMETRIC_SCHEMES

    def enable_range_learning(self) -> None:
        """Train scale and zero point; stop observing."""
        self.learning_enabled[0] = 1
        self.disable_observer()
        self._set_gradients()

    def disable_range_learning(self) -> None:
        """Keep scale and zero point as they are."""
        self.learning_enabled[0] = 0
        self._set_gradients()

    def enable_observer(self, enabled: bool = True) -> None:
        """Observe instead of learning."""
        self.observer_enabled[0] = 1 if enabled else 0
        if enabled:
            self.disable_range_learning()

    def allocate(self) -> None:
        """Make the parameters before any data, so that an optimizer built now knows them. Per-tensor schemes only."""
        if self.scale is None and not self.is_per_channel:
            self._make(torch.ones(1, device=self.eps.device), torch.zeros(1, device=self.eps.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.observer_enabled[0] == 1 or not self._initialized:
            self._observe(x.detach())
        if self.fake_quant_enabled[0] == 1 and not self.marks_never:
            self._need_data()
            assert self.scale is not None
            assert self.zero_point is not None
            x = learned_fake_quantize(
                x,
                self.scale,
                self.zero_point * 0 if self.symmetric else self.zero_point,
                self.quant_min,
                self.quant_max,
                axis=self.ch_axis if self.is_per_channel else None,
                smallest_scale=float(self.eps),
                scale_gradients=self.use_grad_scaling,
            )
        return x

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        self._show(x)
        if not self._observed() or self.marks_never:
            return
        scale, zero_point = self.activation_post_process.calculate_qparams()
        if self.scale is None or self.zero_point is None:
            self._make(scale, zero_point)
        else:
            # Through ``data``: an optimizer may hold these parameters.
            self.scale.data = scale.to(self.scale.device).clone()
            self.zero_point.data = zero_point.to(self.scale.device).float()
        self._initialized = True

    def _make(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale = nn.Parameter(scale.detach().clone().float())
        self.zero_point = nn.Parameter(zero_point.detach().clone().float())
        self._set_gradients()

    def _set_gradients(self) -> None:
        for parameter in (self.scale, self.zero_point):
            if parameter is not None:
                parameter.requires_grad_(bool(self.learning_enabled[0] == 1))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What forward uses: float32 scales of at least ``eps``, int64 zero points within the range."""
        self._need_data()
        assert self.scale is not None
        assert self.zero_point is not None
        zero = torch.clamp(torch.round(self.zero_point.detach()), self.quant_min, self.quant_max).to(torch.int64)
        return torch.clamp(self.scale.detach(), min=self.eps), torch.zeros_like(zero) if self.symmetric else zero

    def extra_repr(self) -> str:
        return (
            f"{self.dtype}, [{self.quant_min}, {self.quant_max}], {self.qscheme}, "
            f"learning_enabled={bool(self.learning_enabled)}, use_grad_scaling={self.use_grad_scaling}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if (saved := state_dict.get(prefix + "scale")) is not None:
            if self.scale is None or self.scale.shape != saved.shape:
                self._make(torch.ones_like(saved), torch.zeros_like(saved))
            self._initialized = True
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_gradients()


def enable_range_learning(module: nn.Module) -> None:
    """Train scales and zero points: ``model.apply(enable_range_learning)``. Of `LearnableFakeQuantize` only."""
    if isinstance(module, LearnableFakeQuantize):
        module.enable_range_learning()


def disable_range_learning(module: nn.Module) -> None:
    """Stop training scales and zero points."""
    if isinstance(module, LearnableFakeQuantize):
        module.disable_range_learning()
