"""Descriptors, as in NVIDIA's pytorch-quantization: how a tensor is quantized, as a value, as text, and as a spec."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.specs import QuantizationSpec
from quant2e.documents.yaml_text import read_yaml, yaml_text
from quant2e.errors import AnnotationError
from quant2e.observers.fake_quant import FakeQuantize
from quant2e.observers.learned_fake_quant import PACTFakeQuantize
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)
from quant2e.observers.placeholder import FixedAmaxObserver
from quant2e.pytorch_quantization.calibrators import axes_of
from quant2e.pytorch_quantization.tensor_quant import integer_bounds

Amax: TypeAlias = "float | tuple[Any, ...]"
"""A magnitude, or one for each index along the axes that keep their own: nested tuples."""

CalibrationMethod = Literal["max", "histogram", "entropy", "percentile", "mse"]
"""How amax is found; "histogram" leaves the method open until later, and is "entropy" until then."""


@dataclass(frozen=True)
class QuantDescriptor:
    """How one tensor is quantized: symmetrically, by its largest magnitude ``amax``.

    - ``num_bits``: 2 to 24 (1 to 24 if unsigned); up to 16 become a spec.
    - ``name``: for people.
    - ``axis``: the axes that keep their own range, one or several; None: one range for the whole tensor.
    - ``amax``: known in advance: a number, or with ``axis`` one for each index (a sequence or tensor; of several axes
      a nested one, with or without the other axes as 1). Finite and not negative. None: it is measured.
    - ``learn_amax``: it is trained, from ``amax`` or the first data on (see `PACTFakeQuantize`); per tensor or axis.
    - ``scale_amax``: a positive factor on amax, wherever that comes from.
    - ``calib_method``: see `CalibrationMethod`. ``percentile``: in percent, for that method. ``num_bins``,
      ``skip_zeros``: of the histogram.
    - ``unsigned``: integers from 0 on; negative values are an error. ``narrow_range``: -127 is the smallest one, else
      -128; the scale is ``amax / 127`` in both cases.

    Equal descriptors have equal fields. Raises `AnnotationError` for values that cannot be, or that nothing would use.
    """

    num_bits: int = 8
    name: str | None = None
    axis: int | tuple[int, ...] | None = None
    amax: Amax | Sequence[Any] | Tensor | None = None
    learn_amax: bool = False
    scale_amax: float | None = None
    calib_method: CalibrationMethod = "max"
    percentile: float = 99.99
    num_bins: int = 2048
    skip_zeros: bool = False
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        for flag in ("learn_amax", "skip_zeros", "unsigned", "narrow_range"):
            if not isinstance(getattr(self, flag), bool):
                raise AnnotationError(f"{flag}={getattr(self, flag)!r}: True or False")
        if not isinstance(self.name, str | None):
            raise AnnotationError(f"name={self.name!r}: text, or None")
        integer_bounds(self.num_bits, self.unsigned, self.narrow_range)
        object.__setattr__(self, "axis", axes_of(self.axis))
        if self.amax is not None:
            object.__setattr__(self, "amax", _frozen(self.amax, self.axis))
        if self.calib_method not in get_args(CalibrationMethod):
            known = ", ".join(get_args(CalibrationMethod))
            raise AnnotationError(f"calib_method={self.calib_method!r}: choose one of {known}")
        if self.scale_amax is not None and not (_is_number(self.scale_amax) and self.scale_amax > 0):
            raise AnnotationError(f"scale_amax={self.scale_amax!r}: a positive, finite number")
        if self.unsigned and self.narrow_range:
            raise AnnotationError("narrow_range leaves out the smallest signed integer; unsigned ones have none")
        if self.skip_zeros and self.calib_method == "max":
            raise AnnotationError(
                "skip_zeros with calib_method='max': a maximum does not depend on zeros; choose entropy"
            )
        if not (_is_number(self.percentile) and 0 < self.percentile <= 100):
            raise AnnotationError(f"percentile={self.percentile!r}: a percentage above 0, at most 100")
        if type(self.num_bins) is not int or not 2 <= self.num_bins <= 1 << 20:
            raise AnnotationError(f"num_bins={self.num_bins!r}: a histogram has between 2 and {1 << 20} bins")

    @property
    def integers(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return integer_bounds(self.num_bits, self.unsigned, self.narrow_range)

    # ------------------------------------------------------------ as text

    def to_dict(self) -> dict[str, Any]:
        """``num_bits`` and what differs from the defaults, as plain data: `from_dict` gives an equal descriptor."""
        found: dict[str, Any] = {"num_bits": self.num_bits}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = _plain(value)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The descriptor of such a dict. Raises `AnnotationError` for a key that is none, with the nearest."""
        known = [field.name for field in fields(cls)]
        for key in data:
            if key == "fake_quant":
                raise AnnotationError("fake_quant: a prepared graph fake-quantizes, a converted one holds integers")
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean '{near[0]}'? " if near else ""
                raise AnnotationError(f"a descriptor has no '{key}'; {hint}it has {', '.join(known)}")
        values = dict(data)
        if isinstance(values.get("axis"), list):
            values["axis"] = tuple(values["axis"])
        return cls(**values)

    def to_yaml(self) -> str:
        """`to_dict` as YAML. Needs PyYAML (``pip install quant2e[yaml]``); raises ImportError without it."""
        return yaml_text(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The descriptor of such a text. Raises as `from_dict` and `read_yaml`, and for what is no mapping."""
        data = read_yaml(text, "the descriptor")
        if not isinstance(data, Mapping):
            raise AnnotationError(f"a descriptor is a mapping such as 'num_bits: 8', not {str(data)[:60]!r}")
        return cls.from_dict(data)

    # ------------------------------------------------------------ as a spec

    def to_spec(self, *, is_qat: bool = False) -> QuantizationSpec:
        """The same as a spec, for the configuration of any quantizer whose backend has such integers.

        ``is_qat``: for training; the spec makes a fake-quantizer. A fixed amax becomes a `FixedAmaxObserver`, a learned
        one a `PACTFakeQuantize`, a measured one an observer with ``from_amax=True``, per channel where there is an
        axis. Raises `AnnotationError` for what no spec can hold: several axes, an axis counted from the end, more than
        16 bits, and a learned amax without training.
        """
        axis = self._spec_axis()
        if self.num_bits > 16:
            raise AnnotationError(f"{self.num_bits} bits: graphs hold integers of 2 to 16 bits")
        if self.learn_amax and not is_qat:
            raise AnnotationError(
                "learn_amax: amax is learned in training; to_spec(is_qat=True), with prepare_qat_pt2e"
            )
        dtypes = (torch.uint8, torch.uint16) if self.unsigned else (torch.int8, torch.int16)
        low, high = self.integers
        return QuantizationSpec(
            dtype=dtypes[self.num_bits > 8],
            observer_or_fake_quant_ctr=self._observer(axis, is_qat),
            quant_min=low,
            quant_max=high,
            qscheme=_SCHEMES[axis is not None, self.unsigned],
            ch_axis=axis,
        )

    def _spec_axis(self) -> int | None:
        axes = axes_of(self.axis)
        if axes is None:
            return None
        if len(axes) > 1:
            raise AnnotationError(
                f"axis={axes}: the ops of a quantized graph take the scales of one axis (as those of ONNX do). Several "
                "axes work with tensor_quant, the calibrators and quantize_weights_in_place"
            )
        if axes[0] < 0:
            raise AnnotationError(f"axis={axes[0]}: a spec counts axes from the front, whatever the rank; start at 0")
        return axes[0]

    def _observer(self, axis: int | None, is_qat: bool) -> Any:
        factor = {} if self.scale_amax is None else {"scale_amax": self.scale_amax}
        given = {} if self.amax is None else {"amax": _flat(self.amax) if axis is not None else self.amax}
        if self.learn_amax:
            return PACTFakeQuantize.with_args(
                observer=self._measuring(axis).with_args(from_amax=True, **factor), **given
            )
        if given:
            observer = FixedAmaxObserver.with_args(**given, **factor)
        else:
            observer = self._measuring(axis).with_args(from_amax=True, **factor)
        return FakeQuantize.with_args(observer=observer) if is_qat else observer

    def _measuring(self, axis: int | None) -> Any:
        """The observer that finds a range as ``calib_method`` says."""
        if self.calib_method == "max":
            return (MinMaxObserver if axis is None else PerChannelMinMaxObserver).with_args()
        method = "entropy" if self.calib_method == "histogram" else self.calib_method
        settings: dict[str, Any] = {"bins": self.num_bins, "method": method}
        settings |= {"percentile": self.percentile} if method == "percentile" else {}
        settings |= {"skip_zeros": True} if self.skip_zeros else {}
        return (HistogramObserver if axis is None else PerChannelHistogramObserver).with_args(**settings)


_SCHEMES = {
    (False, False): torch.per_tensor_symmetric,
    (False, True): torch.per_tensor_affine,
    (True, False): torch.per_channel_symmetric,
    (True, True): torch.per_channel_affine,
}
"""By whether there is an axis, and whether integers are unsigned: 0 is then not in the middle."""


def descriptor_config(
    activation: QuantDescriptor | None, weight: QuantDescriptor | None, *, is_qat: bool = False
) -> QuantizationConfig:
    """The configuration for a quantizer's ``set_global`` and the like, from the descriptors of its operands.

    ``None`` leaves that operand float. A quantizer whose backend has no such integers refuses the configuration, and
    says which it has. Raises `AnnotationError` as `QuantDescriptor.to_spec` does.
    """
    inputs = None if activation is None else activation.to_spec(is_qat=is_qat)
    weights = None if weight is None else weight.to_spec(is_qat=is_qat)
    return QuantizationConfig(inputs, inputs, weights, None, is_qat)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _frozen(amax: Any, axis: Any) -> Amax:
    """A number or nested tuples of numbers, with one level for each axis, or one for each dimension of the tensor."""
    try:
        values = torch.as_tensor(amax, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise AnnotationError(f"amax={amax!r}: a number, or numbers for each index along an axis") from error
    if not bool((torch.isfinite(values) & (values >= 0)).all()) or values.numel() == 0:
        raise AnnotationError(f"amax={values.tolist()}: magnitudes are finite numbers, 0 or larger")
    if axis is None and values.numel() != 1:
        raise AnnotationError(f"amax holds {values.numel()} numbers for a whole tensor: say which axis they belong to")
    if axis is None:
        return float(values)
    if values.dim() < len(axis):
        raise AnnotationError(f"amax of shape {list(values.shape)} with axis={axis}: give one number for each index")
    found: Amax = _tuples(values.tolist())
    return found


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _flat(amax: Any) -> tuple[float, ...]:
    return tuple(torch.tensor(amax, dtype=torch.float32).flatten().tolist())


QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor()
"""Activations: 8 bits, one range for the tensor."""

QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(unsigned=True)
"""Activations without negative values, behind a relu say."""

QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(axis=(0,))
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(axis=(0,))
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(axis=(0,))
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(axis=(0,))
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(axis=(1,))
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(axis=(1,))
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(axis=(1,))
"""Weights: 8 bits, a range for each output channel, which is axis 1 of a transposed convolution."""

QUANT_DESC_4BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(4, axis=(0,))
"""Weights of 4 bits, a range for each row."""
