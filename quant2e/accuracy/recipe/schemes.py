"""Recipes, configurations by short names: ``"w8a8"``, ``"w8a8-dynamic"``, ``"w8"``, ``"w4-g32"``, ``"a16w8"``.

    name   = numbers ("-" option)*        numbers = "w" bits | "w" bits "a" bits | "a" bits "w" bits
    option = "dynamic" | "static" | "qat"                    when activations get their parameters
           | "tensor" | "channel" | "g" size                 which weights share a scale
           | "sym" | "asym"                                  whether weights have zero points

A name says how many bits weights (``w``) and activations (``a``) have; without ``a``, activations stay float. What it
leaves open (observers, smallest scales, whether 8 bits are all of -128..127, whether groups have zero points) is the
backend's: a scheme is a variation of the configuration that the backend would use anyway, so ``set_global("w8a8")``
means the backend's own default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.granularity import Granularity, PerAxis, PerGroup, PerRow, PerTensor
from quant2e.annotation.specs import QuantizationSpec
from quant2e.errors import AnnotationError
from quant2e.observers.fake_quant import FakeQuantize, FakeQuantizeBase
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)
from quant2e.observers.per_group import PerGroupMinMaxObserver

_NUMBERS = re.compile(r"(?:w(?P<w>\d+)(?:a(?P<a>\d+))?|a(?P<a_first>\d+)w(?P<w_last>\d+))")
_GRAMMAR = (
    "a recipe is w<bits>, w<bits>a<bits> or a<bits>w<bits>, with the options -dynamic, -static, -qat, -tensor, "
    "-channel, -g<group size>, -sym, -asym: 'w8a8', 'w8a8-dynamic', 'w8', 'w4-g32', 'a16w8'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The numbers of one operand. What is None is as the backend's own configuration has it.

    ``bits``: 2 to 8, or 16. ``range``: smallest and largest integer, if not all that the bits allow. ``symmetric``:
    zero is the integer zero. ``granularity``: which elements share a scale. ``observer``: an observer class, or what
    its ``with_args`` returns. ``eps``: smallest scale. ``scale_dtype``: scales of groups are rounded to it,
    ``torch.bfloat16`` say, and files store them so. Raises `AnnotationError` for numbers that cannot be.
    """

    bits: int = 8
    symmetric: bool | None = None
    granularity: Granularity | None = None
    observer: Any = None
    range: tuple[int, int] | None = None
    eps: float | None = None
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.scale_dtype not in (None, torch.float32, torch.bfloat16):
            raise AnnotationError(f"scale_dtype={self.scale_dtype}: scales of groups are torch.float32 or bfloat16")
        if self.scale_dtype is torch.bfloat16 and not isinstance(self.granularity, PerGroup):
            raise AnnotationError("scale_dtype=torch.bfloat16 is for scales of groups: give a granularity PerGroup(n)")
        if not 2 <= self.bits <= 8 and self.bits != 16:
            raise AnnotationError(f"{self.bits} bits: integers here have 2 to 8 bits, or 16")
        if self.range is not None and self.range[1] - self.range[0] >= 2**self.bits:
            raise AnnotationError(f"the range {list(self.range)} does not fit {self.bits} bits")

    def applied_to(self, spec: QuantizationSpec) -> QuantizationSpec:
        """The backend's ``spec`` with these numbers."""
        if self.bits <= 8 and spec.dtype is torch.int16:
            spec = replace(spec, dtype=torch.int8, quant_min=None, quant_max=None)
        dtype = spec.dtype if self.bits <= 8 else torch.int16
        symmetric = self._is_symmetric(spec)
        low, high = self._bounds(spec, dtype, symmetric)
        if symmetric and dtype is torch.uint8 and high < 128:
            raise AnnotationError(f"symmetric uint8 has its zero point at 128, outside the range [{low}, {high}]")
        axis = self._axis(spec)
        return replace(
            spec,
            dtype=dtype,
            quant_min=low,
            quant_max=high,
            qscheme=_SCHEMES[axis is not None, symmetric],
            ch_axis=axis,
            observer_or_fake_quant_ctr=self._observer(spec, axis),
        )

    def _is_symmetric(self, spec: QuantizationSpec) -> bool:
        if self.symmetric is not None:
            return self.symmetric
        # Integer kernels with 16-bit activations take no zero point (TensorFlow Lite's 16x8 specification).
        return self.bits == 16 or spec.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    def _bounds(self, spec: QuantizationSpec, dtype: torch.dtype, symmetric: bool) -> tuple[int, int]:
        if self.range is not None:
            return self.range
        if self.bits == 8 and spec.quant_min is not None and spec.quant_max is not None:
            affine = not symmetric and spec.quant_max - spec.quant_min == 254  # a narrow range is for symmetric ones
            return (spec.quant_min - affine, spec.quant_max)
        half = 2 ** (self.bits - 1)
        return (0, 2 * half - 1) if not dtype.is_signed else (-half, half - 1)

    def _axis(self, spec: QuantizationSpec) -> int | None:
        """The channel axis; None for one scale per tensor."""
        match self.granularity:
            case None:
                return spec.ch_axis
            case PerTensor():
                return None
            case PerAxis(axis=axis):
                return axis
            case PerRow() | PerGroup():
                return 0
        raise AnnotationError(f"{self.granularity} is not a granularity that this configuration can have")

    def _observer(self, spec: QuantizationSpec, axis: int | None) -> Any:
        """The observer, the backend's where none is given: of its kind, for the granularity asked for."""
        own = spec.observer_or_fake_quant_ctr
        if isinstance(self.granularity, PerGroup):
            return self._group_observer(own, self.granularity.group_size)
        if self.observer is None and self.eps is None and (axis is None) == (spec.ch_axis is None):
            return own
        made = (
            _regrained(own, per_channel=axis is not None) if self.observer is None else _in_place_of(own, self.observer)
        )
        eps = self.eps if self.eps is not None else _arguments(own).get("eps")
        if eps is None or not hasattr(made, "with_args") or (self.eps is None and "eps" in _arguments(made)):
            return made
        return made.with_args(eps=eps)

    def _group_observer(self, own: Any, group_size: int) -> Any:
        given = own if self.observer is None else self.observer
        if self.observer is None and _trains(own):
            kept = {key: value for key, value in _arguments(own).items() if key != "observer"}
            kept |= {"observer": PerGroupMinMaxObserver, "averaging_constant": 0.01, "group_size": group_size}
            return FakeQuantize.with_args(**kept, **self._of_scales())
        made = getattr(getattr(given, "p", given), "func", given)
        if made not in (MinMaxObserver, PerChannelMinMaxObserver, PerGroupMinMaxObserver):
            name = getattr(made, "__name__", made)
            raise AnnotationError(f"groups of {group_size} are measured by a PerGroupMinMaxObserver, not by {name}")
        return PerGroupMinMaxObserver.with_args(**{**_arguments(given), **self._of_scales(), "group_size": group_size})

    def _of_scales(self) -> dict[str, Any]:
        """What is asked of the scales of groups, as arguments of their observer."""
        return {
            **({} if self.eps is None else {"eps": self.eps}),
            **({} if self.scale_dtype is None else {"scale_dtype": self.scale_dtype}),
        }


_SCHEMES = {
    (False, False): torch.per_tensor_affine,
    (False, True): torch.per_tensor_symmetric,
    (True, False): torch.per_channel_affine,
    (True, True): torch.per_channel_symmetric,
}

_PER_CHANNEL: Mapping[Any, Any] = {
    MinMaxObserver: PerChannelMinMaxObserver,
    MovingAverageMinMaxObserver: MovingAveragePerChannelMinMaxObserver,
    HistogramObserver: PerChannelHistogramObserver,
}


def _arguments(observer: Any) -> Mapping[str, Any]:
    """The keyword arguments that a factory of observers holds."""
    partial = getattr(observer, "p", None)
    return {} if partial is None else dict(partial.keywords)


def _in_place_of(own: Any, given: Any) -> Any:
    """The observer that the user gave; inside the backend's fake-quantizer, where the configuration is for training."""
    return own.with_args(observer=given) if _trains(own) and not _trains(given) else given


def _trains(observer: Any) -> bool:
    made = observer.p.func if hasattr(observer, "p") else observer
    return isinstance(made, type) and issubclass(made, FakeQuantizeBase)


def _regrained(observer: Any, per_channel: bool) -> Any:
    """The observer that estimates in the same way, per channel or per tensor; inside a fake-quantizer too."""
    arguments = _arguments(observer)
    if "observer" in arguments:
        return observer.with_args(observer=_regrained(arguments["observer"], per_channel))
    made = observer.p.func if hasattr(observer, "p") else observer
    other = (_PER_CHANNEL if per_channel else {v: k for k, v in _PER_CHANNEL.items()}).get(made)
    return observer if other is None else other.with_args(**arguments) if hasattr(observer, "p") else other


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How operands are quantized, apart from any backend; what `recipe` returns and every ``set_…`` method takes.

    ``weight``, ``activation``: their numbers; None leaves them float. ``is_dynamic``: activations get their parameters
    at run time. ``is_qat``: for training. ``name``: as the user wrote it. Equal schemes have equal numbers.
    """

    weight: Numbers | None
    activation: Numbers | None
    is_dynamic: bool = False
    is_qat: bool = False
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"'{self.name}'"

    def applied_to(self, base: QuantizationConfig) -> QuantizationConfig:
        """The variation of a backend's configuration that has these numbers.

        Raises `AnnotationError` for numbers of an operand that the backend does not quantize at all.
        """
        if base.weight is None and self.weight is not None:
            raise AnnotationError(f"recipe {self}: this backend has no numbers for weights to start from")
        if base.input_activation is None and self.activation is not None:
            raise AnnotationError(f"recipe {self}: this backend quantizes weights only; leave the activations out")
        act, out = base.input_activation, base.output_activation
        activation = None if self.activation is None else self.activation.applied_to(act)
        return replace(
            base,
            weight=None if self.weight is None else self.weight.applied_to(base.weight),
            input_activation=activation,
            output_activation=activation if out == act else None if activation is None or out is None else out,
            is_qat=self.is_qat,
        )


def recipe(
    name: str,
    *,
    weight: Mapping[str, Any] | None = None,
    activation: Mapping[str, Any] | None = None,
    **numbers: Any,
) -> Scheme:
    """The scheme of that name, with other numbers where they are given.

    ``weight``, ``activation``: fields of `Numbers`. ``numbers``: the same, for recipes that quantize only one of the
    two: ``recipe("w4-g64", symmetric=True, eps=1e-6)``.
    Raises `AnnotationError` for a name that is no recipe and for numbers that cannot be.
    """
    parsed = _parse(name)
    if numbers and parsed.weight is not None and parsed.activation is not None:
        raise AnnotationError(
            f"recipe '{name}' quantizes weights and activations: say whose numbers {', '.join(numbers)} are, with "
            "weight={…} or activation={…}"
        )
    return replace(
        parsed,
        weight=_varied(parsed.weight, "weight", name, {**numbers, **(weight or {})}),
        activation=_varied(parsed.activation, "activation", name, activation or {}),
    )


def _varied(numbers: Numbers | None, operand: str, name: str, given: Mapping[str, Any]) -> Numbers | None:
    if not given:
        return numbers
    if numbers is None:
        raise AnnotationError(f"recipe '{name}' leaves the {operand} float, so {', '.join(given)} means nothing there")
    known = [f.name for f in fields(Numbers)]
    if unknown := [key for key in given if key not in known]:
        raise AnnotationError(f"{', '.join(unknown)} is none of the numbers of an operand: {', '.join(known)}")
    return replace(numbers, **given)


def _parse(name: str) -> Scheme:
    numbers, *options = str(name).lower().split("-")
    found = _NUMBERS.fullmatch(numbers)
    if found is None:
        raise AnnotationError(f"'{name}' is not a recipe: {_GRAMMAR}")
    weight = Numbers(bits=int(found["w"] or found["w_last"]))
    act = found["a"] or found["a_first"]
    scheme = Scheme(weight=weight, activation=Numbers(bits=int(act)) if act else None, name=str(name))
    for option in options:
        scheme = _with(scheme, option)
    if scheme.activation is None and (scheme.is_dynamic or "static" in options):
        raise AnnotationError(f"'{name}' says when activations get their parameters, and leaves them float: {_GRAMMAR}")
    return scheme


def _with(scheme: Scheme, option: str) -> Scheme:
    assert scheme.weight is not None
    match option:
        case "dynamic" | "static":
            return replace(scheme, is_dynamic=option == "dynamic")
        case "qat":
            return replace(scheme, is_qat=True)
        case "tensor":
            return replace(scheme, weight=replace(scheme.weight, granularity=PerTensor()))
        case "channel":
            return replace(scheme, weight=replace(scheme.weight, granularity=PerAxis(0)))
        case "sym" | "asym":
            return replace(scheme, weight=replace(scheme.weight, symmetric=option == "sym"))
    if option.removeprefix("g").isdecimal() and option.startswith("g") and int(option[1:]) > 0:
        return replace(scheme, weight=replace(scheme.weight, granularity=PerGroup(int(option[1:]))))
    raise AnnotationError(f"'{option}' in recipe '{scheme.name}' is no option: {_GRAMMAR}")
