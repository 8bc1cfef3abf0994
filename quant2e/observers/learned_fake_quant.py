"""Learned ranges: fake-quantizers whose scale (LSQ) or clipping values (PACT) are trained with the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant2e.errors import AnnotationError, Quant2eError
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.observers.measuring import MovingAverageMinMaxObserver, UniformQuantizationObserverBase
from quant2e.observers.placeholder import FixedAmaxObserver
from quant2e.observers.straight_through import clipped_fake_quantize, learned_fake_quantize
from quant2e.ranges.qparams import FLOAT32_EPS, SYMMETRIC_SCHEMES


class LearnedFakeQuantizeBase(FakeQuantizeBase):
    """Base of the fake-quantizers with parameters: a third switch, ``learning_enabled``, which excludes observing."""

    learning_enabled: Tensor
    learned: tuple[str, ...] = ()
    """Names of the parameters; each is None before the first data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("learning_enabled", torch.tensor([0], dtype=torch.uint8))
        for name in self.learned:
            self.register_parameter(name, None)
        self._initialized = False

    def enable_range_learning(self) -> None:
        """Train the parameters; stop observing."""
        self.learning_enabled[0] = 1
        self.disable_observer()
        self._set_gradients()

    def disable_range_learning(self) -> None:
        """Keep the parameters as they are."""
        self.learning_enabled[0] = 0
        self._set_gradients()

    def enable_observer(self, enabled: bool = True) -> None:
        """Observe instead of learning."""
        self.observer_enabled[0] = 1 if enabled else 0
        if enabled:
            self.disable_range_learning()

    @abstractmethod
    def allocate(self) -> None:
        """Make the parameters before any data, so that an optimizer built now knows them. Per-tensor schemes only."""

    def _make(self, **values: Tensor) -> None:
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.detach().clone().float()))
        self._set_gradients()

    def _take(self, **values: Tensor) -> None:
        """New values, in place of an optimizer's own tensors where there are any."""
        if any(getattr(self, name) is None for name in values):
            self._make(**values)
        else:
            for name, value in values.items():
                held = getattr(self, name)
                held.data = value.detach().to(held.device).float().clone()
        self._initialized = True

    def _set_gradients(self) -> None:
        for name in self.learned:
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.requires_grad_(bool(self.learning_enabled[0] == 1))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self.learned:
            if (saved := state_dict.get(prefix + name)) is not None:
                held = getattr(self, name)
                if held is None or held.shape != saved.shape:
                    self._make(**{name: torch.ones_like(saved)})
                self._initialized = True
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._set_gradients()


class LearnableFakeQuantize(LearnedFakeQuantizeBase):
    """Fake quantization whose scale and zero point are trained with the weights (LSQ, LSQ+).

    They start from what ``observer`` measures and are None before the first data; `enable_range_learning` stops
    observing and gives them gradients. ``use_grad_scaling``: LSQ's scaling of those gradients (see `straight_through`).
    The zero point of a symmetric scheme stays 0.
    """

    scale: nn.Parameter | None
    zero_point: nn.Parameter | None
    learned = ("scale", "zero_point")
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

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0 and stays so."""
        return self.qscheme in SYMMETRIC_SCHEMES

    def allocate(self) -> None:
        if self.scale is None and not self.is_per_channel:
            device = self.eps.device
            self._make(scale=torch.ones(1, device=device), zero_point=torch.zeros(1, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if self._observes(x) or not self._initialized:
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
        self._take(scale=scale, zero_point=zero_point)

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


class PACTFakeQuantize(LearnedFakeQuantizeBase):
    """Fake quantization between clipping values that are trained (PACT).

    ``alpha``: the largest value that is kept, ``[1]`` or ``[channels]``. ``beta``: how far below zero values are kept,
    of affine schemes; it stays 0 where no negative value is seen, as behind a relu, which is the paper's case. Of
    symmetric schemes, and with ``from_amax``, ``alpha`` bounds both sides.

    Both start from what ``observer`` measures, or from ``amax``; `enable_range_learning` stops observing and trains
    them, which a given ``amax`` does from the beginning. `clipping_penalty` is the paper's regularisation. Further
    arguments are the observer's. Scale and zero point are the observer's for that range, so training and conversion
    agree. J. Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv:1805.06085.
    Raises `AnnotationError` for an observer of another library, and with ``is_dynamic``.
    """

    alpha: nn.Parameter | None
    beta: nn.Parameter | None
    learned = ("alpha", "beta")

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        amax: float | Sequence[float] | Tensor | None = None,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if observer_kwargs.get("is_dynamic"):
            raise AnnotationError("a learned range is static: drop is_dynamic, or use FakeQuantize")
        made = observer(**observer_kwargs)
        if not isinstance(made, UniformQuantizationObserverBase):
            raise AnnotationError(f"{type(made).__name__} measures no range to start from: use an observer of quant2e")
        self.grid = made.grid
        self.alpha_bounds_both = self.grid.symmetric or self.grid.from_amax
        if amax is not None:
            if not self.alpha_bounds_both:
                raise AnnotationError(
                    "amax bounds both sides: use a symmetric scheme, or an observer with from_amax=True"
                )
            options = {**observer_kwargs, "from_amax": self.grid.from_amax, "scale_amax": made.scale_amax}
            made = _fixed(amax, options)
        self._adopt(made)
        self.eps = self.grid.eps
        if amax is not None:
            self._take_range(-made.amax * made.scale_amax, made.amax * made.scale_amax)
            self.enable_range_learning()

    def allocate(self) -> None:
        if self.alpha is None and not self.is_per_channel:
            device = self.learning_enabled.device
            self._take_range(-torch.ones(1, device=device), torch.ones(1, device=device))
            self._initialized = False

    def forward(self, x: Tensor) -> Tensor:
        if self._observes(x) or not self._initialized:
            self._observe(x.detach())
        if self.fake_quant_enabled[0] == 1 and not self.marks_never:
            self._need_data()
            assert self.alpha is not None
            scale, zero_point = self.calculate_qparams()
            axis = self.ch_axis if self.is_per_channel else None
            bounds = self.quant_min, self.quant_max
            x = clipped_fake_quantize(x, self.alpha, self.beta, scale, zero_point, *bounds, axis=axis)
        return x

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        self._show(x)
        if (
            self._observed()
            and not self.marks_never
            and not isinstance(self.activation_post_process, FixedAmaxObserver)
        ):
            self._take_range(*self.activation_post_process.range())

    @torch.no_grad()
    def _take_range(self, low: Tensor, high: Tensor) -> None:
        low, high = torch.atleast_1d(low).clamp(max=0.0), torch.atleast_1d(high).clamp(min=0.0)
        if self.alpha_bounds_both:
            self._take(alpha=torch.maximum(-low, high))
        else:
            self._take(alpha=high, beta=-low)

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What forward uses: the scale and zero point of the clipping values."""
        self._need_data()
        assert self.alpha is not None
        return self.grid.qparams(-(self.alpha if self.beta is None else self.beta), self.alpha)

    def extra_repr(self) -> str:
        return (
            f"{self.dtype}, [{self.quant_min}, {self.quant_max}], {self.qscheme}, "
            f"learning_enabled={bool(self.learning_enabled)}"
        )


def _fixed(amax: Any, options: dict[str, Any]) -> FixedAmaxObserver:
    names = ("dtype", "qscheme", "quant_min", "quant_max", "eps", "power_of_two", "ch_axis", "scale_amax")
    return FixedAmaxObserver(amax, **{name: options[name] for name in names if options.get(name) is not None})


def clipping_penalty(model: nn.Module) -> Tensor:
    """The summed squares of all learned clipping values of a model: a scalar to add to the loss, times a small factor.

    It draws ranges together, which makes steps finer (arXiv:1805.06085, section 3.2). Raises `Quant2eError` for a model
    without `PACTFakeQuantize`, or of which none has seen data.
    """
    clips = [module for module in model.modules() if isinstance(module, PACTFakeQuantize)]
    values = [value for clip in clips for value in (clip.alpha, clip.beta) if value is not None]
    if not values:
        raise Quant2eError(
            "no clipping value is learned here: put PACTFakeQuantize into the specs, and run a batch first"
        )
    return torch.stack([value.square().sum() for value in values]).sum()


def enable_range_learning(module: nn.Module) -> None:
    """Train scales (`LearnableFakeQuantize`) and clipping values (`PACTFakeQuantize`):
    ``model.apply(enable_range_learning)``. Other modules are left alone.
    """
    if isinstance(module, LearnedFakeQuantizeBase):
        module.enable_range_learning()


def disable_range_learning(module: nn.Module) -> None:
    """Stop training scales and clipping values."""
    if isinstance(module, LearnedFakeQuantizeBase):
        module.disable_range_learning()
