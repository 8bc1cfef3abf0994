"""Settings of a recipe: what a rule asks of the ops that it names, and of single tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from quant2e.accuracy.recipe.schemes import Numbers, Scheme, recipe
from quant2e.annotation.granularity import Granularity, PerAxis, PerGroup, PerTensor
from quant2e.errors import AnnotationError
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)
from quant2e.ranges.qparams import SMALLEST_SCALE

Mode = Literal["static", "dynamic", "weight-only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandSettings:
    """The numbers of one operand; what is None stays as the quantizer has it.

    ``bits``: 2 to 8, or 16. ``granularity``: what shares a scale: the tensor, a channel (``axis``, 0), a group of
    ``group_size`` neighbours in a row, or a token, found at run time. ``method``: how the range is found, with
    ``percentile``. ``eps``: the smallest scale. ``scale_dtype``: what scales of groups are rounded to and stored as.
    Raises `AnnotationError` for settings that contradict each other.
    """

    bits: int | None = None
    dtype: Literal["int8", "uint8", "int16"] | None = None
    symmetric: bool | None = None
    granularity: Literal["tensor", "channel", "group", "token"] | None = None
    group_size: int | None = None
    axis: int | None = None
    method: Literal["minmax", "moving_average", "mse", "percentile", "entropy"] | None = None
    percentile: float | None = None
    quant_min: int | None = None
    quant_max: int | None = None
    eps: float | None = None
    scale_dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        Numbers(bits=8 if self.bits is None else self.bits)
        if (self.granularity == "group") != (self.group_size is not None):
            raise AnnotationError("granularity 'group' and group_size belong together")
        if self.group_size is not None and self.group_size < 1:
            raise AnnotationError(f"group_size {self.group_size}: a group has neighbours")
        if self.axis is not None and (self.granularity != "channel" or self.axis < 0):
            raise AnnotationError("axis, counted from 0, belongs to granularity 'channel'")
        if self.percentile is not None and (self.method != "percentile" or not 50 < self.percentile <= 100):
            raise AnnotationError("percentile, above 50 and up to 100, belongs to method 'percentile'")
        if (self.quant_min is None) != (self.quant_max is None):
            raise AnnotationError("quant_min and quant_max belong together")
        if self.quant_min is not None and self.quant_max is not None and self.quant_min >= self.quant_max:
            raise AnnotationError(f"the range [{self.quant_min}, {self.quant_max}] is empty")
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise AnnotationError("eps is a positive, finite number")
        if self.scale_dtype is not None and self.granularity != "group":
            raise AnnotationError("scale_dtype belongs to granularity 'group'")
        if self.dtype is not None and self.bits is not None and (self.dtype == "int16") != (self.bits == 16):
            raise AnnotationError(f"{self.bits} bits are not of dtype {self.dtype}")

    def over(self, other: OperandSettings | None) -> OperandSettings:
        """These settings, and what they leave open as in ``other``; parts that belong together stay together."""
        if other is None:
            return self
        kept = {f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) is None}
        for head, parts in _TOGETHER.items():
            if getattr(self, head) is not None:
                kept = {name: value for name, value in kept.items() if name not in parts}
        return replace(self, **kept)

    @property
    def grain(self) -> Granularity | None:
        """The granularity of a static scale; None where nothing is said, or a token is."""
        match self.granularity:
            case "tensor":
                return PerTensor()
            case "channel":
                return PerAxis(self.axis or 0)
            case "group":
                assert self.group_size is not None
                return PerGroup(self.group_size)
        return None

    def observer(self, *, per_channel: bool) -> Any:
        """The observer that finds the range by ``method``; None where none is asked for."""
        match self.method:
            case None:
                return None
            case "minmax":
                return (PerChannelMinMaxObserver if per_channel else MinMaxObserver).with_args()
            case "moving_average":
                kind = MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver
                return kind.with_args()
        options: dict[str, Any] = {} if self.percentile is None else {"percentile": self.percentile}
        histogram = PerChannelHistogramObserver if per_channel else HistogramObserver
        return histogram.with_args(method=self.method, **options)

    def numbers(self, bits: int, *, per_channel: bool) -> Numbers:
        """For `Numbers.applied_to`; ``bits`` and ``per_channel``: what the operand has where nothing is asked."""
        grain = self.grain
        by_channel = isinstance(grain, PerAxis) or (grain is None and per_channel)
        limits = None if self.quant_min is None or self.quant_max is None else (self.quant_min, self.quant_max)
        return Numbers(
            bits=16 if self.dtype == "int16" else bits if self.bits is None else self.bits,
            symmetric=self.symmetric,
            granularity=grain,
            observer=self.observer(per_channel=by_channel),
            range=limits,
            eps=self.eps,
            scale_dtype=None if self.scale_dtype is None else _SCALE_DTYPES[self.scale_dtype],
        )


_SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TOGETHER = {
    "granularity": ("group_size", "axis", "scale_dtype"),
    "method": ("percentile",),
    "dtype": ("bits", "quant_min", "quant_max"),
    "bits": ("dtype", "quant_min", "quant_max"),
}

Operand = OperandSettings | Literal["float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSettings:
    """What is asked of ops. ``use``: a scheme by name (``w8a8-dynamic``, ``w4-g32``) that says everything anew, or
    ``float``. ``mode``: when activations get their parameters. ``weight``, ``activation``: numbers, or ``float``.
    """

    use: str | None = None
    mode: Literal["static", "dynamic", "weight-only"] | None = None
    weight: OperandSettings | Literal["float"] | None = None
    activation: OperandSettings | Literal["float"] | None = None

    def __post_init__(self) -> None:
        if self.use not in (None, "float"):
            recipe(str(self.use))
        if self.use == "float" and (self.mode or self.weight or self.activation):
            raise AnnotationError("use: float leaves the whole op float; weight, activation and mode mean nothing then")
        if self.mode == "weight-only" and self.activation not in (None, "float"):
            raise AnnotationError("mode: weight-only leaves activations float; their numbers mean nothing then")

    @property
    def says_something(self) -> bool:
        """Whether anything is asked."""
        return any(value is not None for value in (self.use, self.mode, self.weight, self.activation))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What all rules together want of one op; None: as the quantizer has it. ``by``: the rules that say so."""

    is_float: bool = False
    use: str | None = None
    mode: Mode | None = None
    weight: Operand | None = None
    activation: Operand | None = None
    by: tuple[int, ...] = ()

    def then(self, settings: OpSettings, rule: int) -> Wanted:
        """With a later rule, which wins in what it says."""
        if settings.use == "float":
            return Wanted(is_float=True, by=(rule,))
        before = _of_scheme(settings.use) if settings.use is not None else self
        weight, activation = before.weight, before.activation
        if settings.mode == "weight-only":
            activation = "float"
        elif settings.mode is not None and activation == "float":
            activation = None
        return Wanted(
            is_float=before.is_float and settings.mode is None,
            use=before.use,
            mode=settings.mode or before.mode,
            weight=_merged(settings.weight, weight),
            activation=_merged(settings.activation, activation),
            by=(*(self.by if settings.use is None else ()), rule),
        )

    @property
    def scheme(self) -> Scheme | None:
        """For a quantizer that takes schemes; None where no rule asked for one as a whole, or one that says more."""
        if self.use is None and self.mode is None:
            return None
        scheme = recipe(self.use or {"dynamic": "w8a8-dynamic", "weight-only": "w8"}.get(self.mode or "", "w8a8"))
        weight = _scheme_numbers(self.weight, scheme.weight, per_channel=True)
        activation = _scheme_numbers(self.activation, scheme.activation, per_channel=False)
        return replace(
            scheme,
            weight=weight,
            activation=activation,
            is_dynamic=activation is not None and (self.mode or ("dynamic" if scheme.is_dynamic else "")) == "dynamic",
        )


def _merged(own: Operand | None, before: Operand | None) -> Operand | None:
    if own is None or own == "float":
        return own or before
    return own.over(None if before == "float" else before)


def _scheme_numbers(asked: Operand | None, of_name: Numbers | None, *, per_channel: bool) -> Numbers | None:
    """The numbers of one operand of a scheme, with what was asked; None for float."""
    if asked == "float":
        return None
    if asked is None:
        return of_name
    made = asked.numbers(8 if of_name is None else of_name.bits, per_channel=per_channel)
    if of_name is None:
        return made
    symmetric = made.symmetric if made.symmetric is not None else of_name.symmetric
    return replace(made, symmetric=symmetric, granularity=made.granularity or of_name.granularity)


def _of_scheme(name: str) -> Wanted:
    """What a scheme says, in the words of settings."""
    scheme = recipe(name)
    mode: Mode = "weight-only" if scheme.activation is None else "dynamic" if scheme.is_dynamic else "static"
    weight: Operand = "float" if scheme.weight is None else _settings_of(scheme.weight)
    return Wanted(
        use=name,
        mode=mode,
        weight=weight,
        activation="float" if scheme.activation is None else _settings_of(scheme.activation),
    )


def _settings_of(numbers: Numbers) -> OperandSettings:
    grain = numbers.granularity
    named: dict[str, Any] = {}
    if isinstance(grain, PerGroup):
        named = {"granularity": "group", "group_size": grain.group_size}
    elif isinstance(grain, PerAxis):
        named = {"granularity": "channel", "axis": grain.axis}
    elif isinstance(grain, PerTensor):
        named = {"granularity": "tensor"}
    return OperandSettings(bits=numbers.bits, symmetric=numbers.symmetric, **named)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeRule(OpSettings):
    r"""Settings for the ops that all of its names fit; at least one is given.

    ``name``: of the node, a glob. ``module``: the path of a module around it, a glob whose wildcards match dots as
    well; ``regex``: the same as a regular expression for the whole path. ``type``: the class of a module around it,
    bare or qualified. ``op``: ``linear``, ``aten.add`` or ``aten.add.Tensor``.
    """

    name: str | None = None
    module: str | None = None
    regex: str | None = None
    type: str | None = None
    op: str | None = None

    def __post_init__(self) -> None:
        OpSettings.__post_init__(self)
        if not self.names:
            raise AnnotationError(f"a rule names ops by at least one of {', '.join(NAMES)}")
        if not self.says_something:
            raise AnnotationError("a rule says something of its ops: use, mode, weight or activation")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise AnnotationError(f"'{self.regex}' is not a regular expression: {error}") from error

    @property
    def names(self) -> dict[str, str]:
        """By what it names ops."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        return " and ".join(f"{name} '{value}'" for name, value in self.names.items())


NAMES = ("name", "module", "regex", "type", "op")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """The numbers of a tensor, ``"relu"``, or of its use by one op, ``"relu -> linear"``; a glob.

    ``scale``, ``zero_point``: known in advance; one, or as many as there are channels, with ``numbers``:
    ``{granularity: channel}``. ``use: float``: it stays float. ``numbers``: range, dtype and granularity to be found.
    """

    tensor: str
    use: Literal["float"] | None = None
    scale: tuple[float, ...] | float | None = None
    zero_point: tuple[int, ...] | int | None = None
    numbers: OperandSettings | None = None

    def __post_init__(self) -> None:
        scales, zeros = self.scales, self.zero_points
        if sum(part is not None for part in (self.use, self.scale, self.numbers)) == 0:
            raise AnnotationError("it says something of its tensor: use, scale or numbers")
        if self.use == "float" and (self.scale is not None or self.numbers is not None):
            raise AnnotationError("use: float leaves it float; other numbers mean nothing then")
        if self.zero_point is not None and len(zeros) not in (1, len(scales)):
            raise AnnotationError(f"{len(scales)} scales and {len(zeros)} zero points do not pair up")
        if not all(0 < scale < math.inf for scale in scales):
            raise AnnotationError("a scale is a positive, finite number")
        if not all(SMALLEST_SCALE <= scale <= torch.finfo(torch.float32).max for scale in scales):
            raise AnnotationError(f"the scale {self.scale} is no normal float32 number, which kernels compute with")
        grain = None if self.numbers is None else self.numbers.granularity
        if len(scales) > 1 and grain != "channel":
            raise AnnotationError(f"{len(scales)} scales need numbers: {{granularity: channel}}; encodings take groups")

    @property
    def scales(self) -> tuple[float, ...]:
        """All scales; none where they are to be found."""
        return () if self.scale is None else self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def zero_points(self) -> tuple[int, ...]:
        """As many as there are scales."""
        zeros = self.zero_point if isinstance(self.zero_point, tuple) else (self.zero_point or 0,)
        return zeros * len(self.scales) if len(zeros) == 1 else zeros


DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}
