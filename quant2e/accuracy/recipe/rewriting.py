"""Rewriting of specs: the numbers that a backend's annotation has, with what a recipe asks instead.

QuantizationSpec(int8, per tensor affine, HistogramObserver)   and   {bits: 4, method: minmax}
=>   QuantizationSpec(int8[-8, 7], per tensor affine, MinMaxObserver)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from quant2e.accuracy.recipe.settings import DTYPES, Mode, OperandSettings, TensorRule
from quant2e.annotation.granularity import PerToken
from quant2e.annotation.specs import INTEGER_BOUNDS, PER_CHANNEL_SCHEMES, QuantizationSpec
from quant2e.errors import AnnotationError
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from quant2e.observers.placeholder import FixedQParamsObserver, PlaceholderObserver


def is_plain(spec: Any) -> bool:
    """Whether a spec has numbers of its own that are to be found: neither shared nor derived nor fixed."""
    return hasattr(spec, "observer_or_fake_quant_ctr") and spec.dtype in INTEGER_BOUNDS


def rewritten(spec: Any, asked: OperandSettings, *, activation: bool) -> Any:
    """A plain ``spec`` with the numbers that are asked for. Raises `AnnotationError` for those that cannot be."""
    if activation and asked.granularity in ("channel", "group"):
        grain = asked.granularity
        raise AnnotationError(f"activations have one scale per tensor, or per token at run time, not per {grain}")
    if asked.granularity == "token" and not (activation and spec.is_dynamic):
        raise AnnotationError("a scale per token is found at run time, of activations: mode: dynamic")
    own = _of_ours(spec, asked)
    if asked.dtype is not None and DTYPES[asked.dtype] != own.dtype:
        own = replace(own, dtype=DTYPES[asked.dtype], quant_min=None, quant_max=None)
    low, high = _bounds(own)
    own = replace(own, quant_min=low, quant_max=high)
    bits = (high - low).bit_length()
    if spec.is_dynamic:
        return _dynamic_numbers(own, asked, bits)
    made = asked.numbers(bits if bits <= 8 else 16, per_channel=own.qscheme in PER_CHANNEL_SCHEMES)
    return made.applied_to(own)


def _bounds(spec: QuantizationSpec) -> tuple[int, int]:
    """The integers of a spec: its own, or all of its dtype."""
    if spec.quant_min is None or spec.quant_max is None:
        return INTEGER_BOUNDS[spec.dtype]
    return spec.quant_min, spec.quant_max


def _dynamic_numbers(spec: Any, asked: OperandSettings, bits: int) -> Any:
    if asked.method is not None:
        raise AnnotationError(f"method {asked.method}: a range that is found at run time is that of the tensor itself")
    if asked.granularity == "token":
        return replace(
            spec,
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=PlaceholderObserver.with_args(granularity=PerToken()),
        )
    numbers = asked.numbers(bits, per_channel=False)
    made = replace(numbers, observer=None, eps=None).applied_to(replace(spec, ch_axis=None))
    kept = PlaceholderObserver.with_args() if asked.granularity == "tensor" else spec.observer_or_fake_quant_ctr
    if asked.eps is not None:
        kept = PlaceholderObserver.with_args(eps=asked.eps)
    return replace(made, observer_or_fake_quant_ctr=kept)


def _of_ours(spec: Any, asked: OperandSettings) -> QuantizationSpec:
    """The spec as one of ours; with an observer of ours where another library's would have to change its kind."""
    constructor = spec.observer_or_fake_quant_ctr
    factory = getattr(constructor, "p", constructor)
    kind = getattr(factory, "func", factory)
    home = str(getattr(kind, "__module__", ""))
    if not home.startswith("quant2e.") and not spec.is_dynamic:
        if hasattr(kind, "enable_fake_quant"):
            if asked.granularity or asked.method or asked.eps:
                name = getattr(kind, "__name__", kind)
                raise AnnotationError(f"it trains with {name} of another library, whose granularity and range it keeps")
        elif "PerChannel" in getattr(kind, "__name__", ""):
            constructor = PerChannelMinMaxObserver.with_args(**_kept(factory))
        elif "Histogram" in getattr(kind, "__name__", ""):
            constructor = HistogramObserver.with_args(**_kept(factory))
        elif "MinMax" in getattr(kind, "__name__", ""):
            constructor = MinMaxObserver.with_args(**_kept(factory))
    return QuantizationSpec(
        dtype={torch.qint8: torch.int8, torch.quint8: torch.uint8}.get(spec.dtype, spec.dtype),
        observer_or_fake_quant_ctr=constructor,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        qscheme=spec.qscheme,
        ch_axis=getattr(spec, "ch_axis", None),
        is_dynamic=bool(getattr(spec, "is_dynamic", False)),
    )


def _kept(factory: Any) -> dict[str, Any]:
    given = dict(getattr(factory, "keywords", None) or {})
    return {name: given[name] for name in ("eps", "reduce_range") if name in given}


def in_mode(spec: Any, mode: Mode | None, of_backend: Any) -> Any:
    """A plain spec of an activation, static or at run time as ``mode`` says.

    ``of_backend``: what the backend has in that mode, where it says so.
    """
    dynamic = bool(getattr(spec, "is_dynamic", False))
    if mode is None or (mode == "dynamic") == dynamic:
        return spec
    if of_backend is not None:
        return of_backend
    low, high = INTEGER_BOUNDS.get(spec.dtype, (-128, 127))
    if mode == "dynamic":
        if spec.dtype not in (torch.int8, torch.uint8):
            raise AnnotationError(f"dynamic quantization to {spec.dtype}: the ops that find scales know int8 and uint8")
        observer: Any = PlaceholderObserver.with_args()
    else:
        observer = HistogramObserver.with_args()
    return QuantizationSpec(spec.dtype, observer, low, high, torch.per_tensor_affine, None, mode == "dynamic")


def with_given(spec: Any, asked: TensorRule) -> Any:
    """A spec with the scales and zero points of a tensor rule, and of ``spec`` what it does not say."""
    base = spec if asked.numbers is None else rewritten(_static(spec), asked.numbers, activation=False)
    if not asked.scales:
        return base
    base = _of_ours(_static(base), OperandSettings())
    low, high = _bounds(base)
    if outside := [zero for zero in asked.zero_points if not low <= zero <= high]:
        raise AnnotationError(f"the zero point {outside[0]} is outside of the range [{low}, {high}]")
    by_channel = len(asked.scales) > 1
    observer = FixedQParamsObserver.with_args(
        scale=torch.tensor(asked.scales), zero_point=torch.tensor(asked.zero_points)
    )
    return replace(
        base,
        observer_or_fake_quant_ctr=observer,
        qscheme=torch.per_channel_affine if by_channel else torch.per_tensor_affine,
        ch_axis=(base.ch_axis or 0) if by_channel else None,
    )


def _static(spec: Any) -> Any:
    return in_mode(spec, "static", None)
