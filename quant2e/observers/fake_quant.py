"""Fake-quantize modules, for training: each observes a tensor and hands on what integers would make of it.

Names, arguments and buffers are those of PT2E. What forward computes, convert writes: scale and zero point come from
the same formulas (`qparams.NumberFormat`), so nothing moves when a trained model becomes integers. The maths is in
`straight_through`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quant2e.annotation.specs import PER_CHANNEL_SCHEMES
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.base import ObserverFactory
from quant2e.observers.data_parallel import is_distributed, observe_together, training_group
from quant2e.observers.keywords import check_when_made
from quant2e.observers.measuring import MovingAverageMinMaxObserver, UniformQuantizationObserverBase
from quant2e.observers.straight_through import fake_quantize
from quant2e.ranges.minmax import SENTINEL
from quant2e.ranges.qparams import FLOAT32_EPS, FLOAT_QPARAMS, SYMMETRIC_SCHEMES

_KERNEL_SMALLEST = 1e-4
"""Below 6.1e-5 torch's kernel replaces a scale by another."""


class FakeQuantizeBase(nn.Module, ABC):
    """Base of the fake-quantizers: two switches, which are buffers so that they are saved and reach all processes of
    DDP.

    ``observer_enabled``: forward learns from what it sees. ``fake_quant_enabled``: forward quantizes and dequantizes.
    """

    fake_quant_enabled: Tensor
    observer_enabled: Tensor
    activation_post_process: Any
    dtype: torch.dtype
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme
    ch_axis: int
    is_dynamic: bool = False
    of_constant: bool = False
    """The tensor depends on parameters only, which are the same in all processes; preparation says so."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_when_made(cls)

    def __init__(self) -> None:
        super().__init__()
        # uint8, because NCCL does not reduce booleans.
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x`` quantized and dequantized; same shape and dtype."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale and zero point that forward uses. Raises `CalibrationError` when it has none yet."""

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Quantize and dequantize in forward."""
        self.fake_quant_enabled[0] = 1 if enabled else 0

    def disable_fake_quant(self) -> None:
        """Hand tensors on as they are."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Learn scale and zero point from what forward sees."""
        self.observer_enabled[0] = 1 if enabled else 0

    def disable_observer(self) -> None:
        """Keep scale and zero point as they are."""
        self.enable_observer(False)

    @classmethod
    def with_args(cls, **kwargs: Any) -> ObserverFactory:
        """A factory of fake-quantizers of this class with these arguments."""
        return ObserverFactory(cls, kwargs)

    def _adopt(self, observer: Any) -> None:
        """Take over the observer and what converters read of it."""
        self.activation_post_process = observer
        self.dtype, self.qscheme = observer.dtype, observer.qscheme
        bounds = observer.quant_min, observer.quant_max
        axis = getattr(observer, "ch_axis", None)
        self.ch_axis = -1 if axis is None else int(axis)
        if None in (*bounds, self.qscheme):
            raise AnnotationError(
                f"{type(observer).__name__} measures no range of integers, which fake quantization needs"
            )
        self.quant_min, self.quant_max = bounds

    @property
    def is_per_channel(self) -> bool:
        """Whether each slice along ``ch_axis`` has parameters of its own."""
        return self.qscheme in PER_CHANNEL_SCHEMES

    @property
    def marks_never(self) -> bool:
        """The tensor holds values that stand for "never", so it is handed on as it is, and stays float."""
        return bool(getattr(self.activation_post_process, "marks_never", False))

    def _observed(self) -> bool:
        """Whether there is anything to take a scale from; other libraries' observers are believed to know."""
        return bool(getattr(self.activation_post_process, "observed", True))

    def _observes(self, x: Tensor) -> bool:
        """Whether forward learns from ``x``: not from a parameter in evaluation without gradients, where a range that
        it gave in training would go on moving towards it, away from what is evaluated and deployed.
        """
        if self.of_constant and not self.training and not (torch.is_grad_enabled() and x.requires_grad):
            return bool(self.observer_enabled[0] == 1) and not getattr(self.activation_post_process, "observed", False)
        return bool(self.observer_enabled[0] == 1)

    def _group(self) -> Any:
        """The processes whose batches are one batch to this module; None for its own only."""
        alone = self.of_constant or self.is_dynamic or not self.training
        return None if alone or not is_distributed() else training_group()

    def _show(self, x: Tensor) -> None:
        """Let the observer look at ``x``, and at that of the other processes in data-parallel training."""
        observer, group = self.activation_post_process, self._group()
        if group is not None and isinstance(observer, UniformQuantizationObserverBase):
            observe_together(observer, x, group)
        else:
            observer(x)

    def _need_data(self) -> None:
        if not self._observed():
            raise CalibrationError(
                "a fake-quantize module was asked for its scale and has seen no data: run a batch with "
                "its observer enabled "
                "(model.apply(quant2e.enable_observer)) before switching observers off or converting"
            )


class FakeQuantize(FakeQuantizeBase):
    """Observes with ``observer`` and fake-quantizes with the scale and zero point that it gives.

    ``observer``: an observer class, or what its ``with_args`` returns; further arguments are its own. ``scale``
    (float32) and ``zero_point`` (int32): ``[1]`` or ``[channels]``, of the last observation. ``is_dynamic``: the
    parameters are those of each batch, which an observer with ``averaging_constant=1`` gives.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if quant_min is not None or quant_max is not None:
            observer_kwargs |= {"quant_min": quant_min, "quant_max": quant_max}
        self._adopt(observer(**observer_kwargs, is_dynamic=is_dynamic))
        self.is_dynamic = bool(is_dynamic)
        self.eps = getattr(self.activation_post_process, "eps", FLOAT32_EPS)
        zero = torch.float32 if self.qscheme == FLOAT_QPARAMS else torch.int32
        self.register_buffer("scale", torch.tensor([1.0]))
        self.register_buffer("zero_point", torch.tensor([0], dtype=zero))

    def forward(self, x: Tensor) -> Tensor:
        if self._observes(x):
            self._observe(x.detach())
        if self.fake_quant_enabled[0] == 1 and not self.marks_never:
            self._need_data()
            size = getattr(self.activation_post_process, "group_size", None) or None
            axis = self.ch_axis if self.is_per_channel and size is None else None
            x = fake_quantize(
                x, self.scale, self.zero_point, self.quant_min, self.quant_max, axis=axis, group_size=size
            )
        return x

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        observer = self.activation_post_process
        if self.is_dynamic and isinstance(observer, UniformQuantizationObserverBase):
            observer.reset_min_max_vals()  # a + 1 * (b - a) is not quite b
        self._show(x)
        if not self._observed():
            return
        if isinstance(observer, UniformQuantizationObserverBase):
            scale, zero_point = observer.running_qparams()
        else:
            scale, zero_point = observer.calculate_qparams()
        self._store(scale, zero_point)

    def _store(self, scale: Tensor, zero_point: Tensor) -> None:
        for buffer, value in ((self.scale, scale), (self.zero_point, zero_point)):
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What forward uses: float32 scales, and zero points in int64 (float32 for float zero points)."""
        self._need_data()
        observer = self.activation_post_process
        if isinstance(observer, UniformQuantizationObserverBase):
            observer.range()  # says what is wrong with the data, NaN for one
        zero = self.zero_point if self.qscheme == FLOAT_QPARAMS else self.zero_point.to(torch.int64)
        return self.scale.detach(), zero.detach()

    def extra_repr(self) -> str:
        return (
            f"{self.dtype}, [{self.quant_min}, {self.quant_max}], {self.qscheme}, "
            f"fake_quant_enabled={bool(self.fake_quant_enabled)}, observer_enabled={bool(self.observer_enabled)}, "
            f"scale={self.scale.tolist() if self.scale.numel() <= 4 else list(self.scale.shape)}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        move: Any = super()._apply  # untyped in torch
        move(fn, recurse)
        # The parameters follow to another device, but stay exact when the model becomes half precision.
        for name in ("scale", "zero_point"):
            value = getattr(self, name)
            if value.is_floating_point() and value.dtype != torch.float32:
                setattr(self, name, value.to(torch.float32))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("scale", "zero_point"):
            if (saved := state_dict.get(prefix + name)) is not None:
                getattr(self, name).resize_(saved.shape)
        inner = f"{prefix}activation_post_process."
        seen = state_dict.get(inner + "min_val")
        ours = isinstance(self.activation_post_process, UniformQuantizationObserverBase)
        if ours and seen is not None and inner + "counts" not in state_dict:
            # A checkpoint of PT2E, which does not count: a finite range was learnt from something. Its eps is an
            # argument here.
            state_dict.pop(inner + "eps", None)
            state_dict[inner + "counts"] = torch.tensor([int(torch.isfinite(seen).sum()), 0, 0, 0])
        super()._load_from_state_dict(state_dict, prefix, *args)


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """`FakeQuantize` with a moving average, observed and quantized in one pass by torch's kernel while it trains.

    The kernel takes a symmetric scale by a formula of its own (``|min| / 128`` or ``max / 127``, where convert has
    127.5 steps on either side), so training is PT2E's to the bit. In evaluation, and at conversion, the scale is
    convert's. Where the two would differ by more than that (fewer than 8 bits, ranges below the smallest scale, NaN)
    the kernel is not used. The default range is 0..255, PT2E's.
    """

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = 0,
        quant_max: int | None = 255,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        inner = self.activation_post_process
        if not hasattr(inner, "averaging_constant"):
            raise AnnotationError(f"{type(inner).__name__} keeps no moving average; use FakeQuantize with it")
        symmetric = self.qscheme in SYMMETRIC_SCHEMES
        ours = isinstance(inner, UniformQuantizationObserverBase) and not self.is_dynamic
        close = not symmetric or (self.dtype == torch.int8 and self.quant_max - self.quant_min >= 254)
        plain = ours and not inner.grid.from_amax and inner.scale_amax == 1.0
        self._kernel_fits = plain and close and self.qscheme != FLOAT_QPARAMS

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self._refresh()
        elif self._kernel_fits and self.observer_enabled[0] == 1 and (made := self._by_kernel(x)) is not None:
            return made
        return super().forward(x)

    def _by_kernel(self, x: Tensor) -> Tensor | None:
        """One pass over ``x``; None, with everything as before, where the kernel's scale would not be near
        convert's.
        """
        observer = self.activation_post_process
        whole = not self.is_per_channel
        if x.dtype != torch.float32 or x.numel() == 0 or observer.frozen or x.device != self.scale.device:
            return None
        if observer.never is not None or self._group() is not None:
            return None  # the kernel knows no values apart, and no other process
        if not whole and self.ch_axis != 0:
            return None  # the kernel takes the first axis only
        kept = [buffer.clone() for buffer in (observer.min_val, observer.max_val)]
        made = torch.fused_moving_avg_obs_fake_quant(
            x,
            self.observer_enabled,
            self.fake_quant_enabled,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.averaging_constant,
            self.quant_min,
            self.quant_max,
            self.ch_axis,
            not whole,
            self.qscheme in SYMMETRIC_SCHEMES,
        )
        floor = max(observer.eps, _KERNEL_SMALLEST)
        extremes = torch.stack([self.scale.amin(), -observer.min_val.amin(), observer.max_val.amax()]).tolist()
        if extremes[0] > floor and all(abs(value) < SENTINEL for value in extremes):
            observer.counts[0] += x.numel()
            return made
        for buffer, before in zip((observer.min_val, observer.max_val), kept, strict=True):
            buffer.resize_(before.shape).copy_(before)
        return None

    @torch.no_grad()
    def _refresh(self) -> None:
        """Take the scale that convert will write."""
        observer = self.activation_post_process
        if isinstance(observer, UniformQuantizationObserverBase) and self._observed():
            self._store(*observer.running_qparams())

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What forward uses in evaluation, and convert writes."""
        self._refresh()
        return super().calculate_qparams()


class FixedQParamsFakeQuantize(FakeQuantize):
    """Fake quantization with scales and zero points known in advance; ``observer`` makes a `FixedQParamsObserver`."""

    def __init__(self, observer: Callable[..., Any]) -> None:
        super().__init__(observer)
        fixed = self.activation_post_process
        if not hasattr(fixed, "scale") or not hasattr(fixed, "zero_point"):
            raise AnnotationError(f"{type(fixed).__name__} has no fixed scale; use FakeQuantize with it")
        self._store(fixed.scale, fixed.zero_point)

    def _observe(self, x: Tensor) -> None:
        """Nothing to learn."""


def enable_fake_quant(module: nn.Module) -> None:
    """Quantize and dequantize from now on: ``model.apply(enable_fake_quant)``. Other modules are left alone."""
    if isinstance(module, FakeQuantizeBase):
        module.enable_fake_quant()


def disable_fake_quant(module: nn.Module) -> None:
    """Compute in float from now on: ``model.apply(disable_fake_quant)``."""
    if isinstance(module, FakeQuantizeBase):
        module.disable_fake_quant()


def enable_observer(module: nn.Module) -> None:
    """Learn scales from data from now on: ``model.apply(enable_observer)``."""
    if isinstance(module, FakeQuantizeBase):
        module.enable_observer()


def disable_observer(module: nn.Module) -> None:
    """Keep all scales as they are: ``model.apply(disable_observer)``, some steps before the end of training."""
    if isinstance(module, FakeQuantizeBase):
        module.disable_observer()
