"""Quantization specs and annotations: what a backend asks for, with the field names of PT2E.

A spec describes the numbers of one tensor; an annotation hangs specs on the inputs and the output of one node,
under ``node.meta[ANNOTATION]``. Both are an input format: they are read once, into a `Plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.annotation.granularity import Granularity, PerTensor, granularity_text
from quant2e.errors import AnnotationError
from quant2e.graph.printer import dtype_text

ANNOTATION = "quantization_annotation"
"""Key in ``node.meta`` under which a quantizer leaves its annotation (PT2E's carrier)."""

EdgeOrNode = tuple[Node, Node] | Node
"""An input edge ``(producer, consumer)``, or the output of a node."""

INTEGER_BOUNDS: Mapping[torch.dtype, tuple[int, int]] = {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32)
}
"""Storage dtypes of quantized tensors and the integers each can hold. Fewer bits are a narrower range."""

PER_CHANNEL_SCHEMES = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
"""Schemes with a scale and zero point for each channel; the last one, of embedding tables, has float zero points."""


def _check_range(dtype: torch.dtype, quant_min: int | None, quant_max: int | None) -> None:
    if (quant_min is None) != (quant_max is None):
        raise AnnotationError(
            f"quant_min={quant_min} and quant_max={quant_max}: give both bounds, or neither for the "
            f"full range of {dtype}"
        )
    if quant_min is None or quant_max is None:
        return
    if quant_min > quant_max:
        raise AnnotationError(f"quant_min={quant_min} is larger than quant_max={quant_max}")
    bounds = INTEGER_BOUNDS.get(dtype)
    if bounds is not None and not bounds[0] <= quant_min <= quant_max <= bounds[1]:
        raise AnnotationError(
            f"the range [{quant_min}, {quant_max}] does not fit {dtype}, which holds [{bounds[0]}, {bounds[1]}]"
        )


def _check_axis(qscheme: torch.qscheme | None, ch_axis: int | None) -> None:
    if ch_axis is not None and ch_axis < 0:
        raise AnnotationError(f"ch_axis={ch_axis}: count the channel axis from the front, starting at 0")
    if qscheme in PER_CHANNEL_SCHEMES and ch_axis is None:
        raise AnnotationError(f"{qscheme} needs ch_axis, the axis along which each channel has its own scale")


@dataclass(frozen=True)
class QuantizationSpecBase:
    """Common ancestor of the specs, for ``isinstance`` checks in quantizers."""


@dataclass(frozen=True)
class QuantizationSpec(QuantizationSpecBase):
    """Numbers of one tensor, with parameters found by observing it.

    ``dtype``: storage dtype. ``quant_min``/``quant_max``: integer range, both or neither.
    ``observer_or_fake_quant_ctr``: an observer class, or what its ``with_args`` returns.
    ``ch_axis``: channel axis, required by the per-channel schemes. ``is_dynamic``: parameters found at run time.
    Raises `AnnotationError` when the range does not fit the dtype or the axis does not fit the scheme.
    """

    dtype: torch.dtype
    observer_or_fake_quant_ctr: Any
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        _check_range(self.dtype, self.quant_min, self.quant_max)
        factory = getattr(self.observer_or_fake_quant_ctr, "p", self.observer_or_fake_quant_ctr)
        if self.ch_axis is not None or not hasattr(getattr(factory, "func", factory), "enable_fake_quant"):
            _check_axis(self.qscheme, self.ch_axis)  # the observer inside a fake-quantizer brings an axis of its own


def group_size_of(spec: Any) -> int | None:
    """The size of the groups, along the last dimension, that have a scale each; None where a spec asks for none.

    It is an argument of the observer: PT2E's specs have no field for it.
    """
    found = _observer_arguments(spec).get("group_size")
    return found if isinstance(found, int) else None


def dynamic_granularity_of(spec: Any) -> Granularity:
    """Which elements share a scale that is found at run time; the whole tensor where a spec does not say.

    It is an argument of the observer, as the size of groups is.
    """
    found = _observer_arguments(spec).get("granularity")
    return found if isinstance(found, Granularity) else PerTensor()


def _observer_arguments(spec: Any) -> Mapping[str, Any]:
    partial = getattr(getattr(spec, "observer_or_fake_quant_ctr", None), "p", None)
    return getattr(partial, "keywords", None) or {}


@dataclass(frozen=True)
class FixedQParamsQuantizationSpec(QuantizationSpecBase):
    """Numbers of one tensor with a scale and zero point known in advance (sigmoid's output, say). Per tensor only."""

    dtype: torch.dtype
    scale: float
    zero_point: int
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        _check_range(self.dtype, self.quant_min, self.quant_max)
        if not self.scale > 0 or self.scale == float("inf"):
            raise AnnotationError(f"scale={self.scale}: a fixed scale is a positive, finite number")
        low, high = INTEGER_BOUNDS.get(self.dtype, (self.zero_point, self.zero_point))
        if not (low if self.quant_min is None else self.quant_min) <= self.zero_point:
            raise AnnotationError(f"zero_point={self.zero_point} is below the quantized range")
        if not self.zero_point <= (high if self.quant_max is None else self.quant_max):
            raise AnnotationError(f"zero_point={self.zero_point} is above the quantized range")


@dataclass(frozen=True)
class SharedQuantizationSpec(QuantizationSpecBase):
    """The same numbers as another point of the graph: an input edge or a node's output."""

    edge_or_node: EdgeOrNode


@dataclass(frozen=True)
class DerivedQuantizationSpec(QuantizationSpecBase):
    """Numbers computed from those of other points, as an int32 bias from its input's and weight's scale.

    ``derive_qparams_fn`` takes the observers of ``derived_from``, in that order, and returns ``(scale, zero_point)``.
    """

    derived_from: Sequence[EdgeOrNode]
    derive_qparams_fn: Callable[[list[Any]], tuple[Tensor, Tensor]]
    dtype: torch.dtype
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None
    is_dynamic: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived_from", tuple(self.derived_from))
        _check_range(self.dtype, self.quant_min, self.quant_max)
        _check_axis(self.qscheme, self.ch_axis)
        if not self.derived_from:
            raise AnnotationError("derived_from is empty: name at least one edge or node to derive the parameters from")


@dataclass
class QuantizationAnnotation:
    """Specs of one node's inputs and output, put under ``node.meta[ANNOTATION]``.

    ``input_qspec_map`` is keyed by the producer of each operand; a spec of ``None`` says "this operand stays float".
    ``allow_implicit_sharing``: one producer's uses whose specs agree get one set of parameters.
    ``rule`` names what annotated the node, for the report. ``_annotated`` says that a quantizer has dealt with the
    node, and ``_is_output_of_quantized_pattern`` that it is the last one of what it matched: PT2E's names, which
    scripts read.
    """

    input_qspec_map: dict[Node, QuantizationSpecBase | None] = field(default_factory=dict)
    output_qspec: QuantizationSpecBase | None = None
    allow_implicit_sharing: bool = True
    _annotated: bool = False
    rule: str = ""
    _is_output_of_quantized_pattern: bool = False


def spec_text(spec: Any) -> str:
    """A concrete spec in one line: dtype, range, scheme, axis, dynamic, fixed numbers, observer."""
    parts = [dtype_text(spec.dtype)]
    if getattr(spec, "quant_min", None) is not None:
        parts[0] += f"[{spec.quant_min}, {spec.quant_max}]"
    qscheme = getattr(spec, "qscheme", None)
    if qscheme is not None:
        parts.append(str(qscheme).removeprefix("torch.").replace("_", " "))
    if getattr(spec, "ch_axis", None) is not None and "channel" in str(qscheme):
        parts.append(f"axis {spec.ch_axis}")
    if (group_size := group_size_of(spec)) is not None:
        parts.append(f"groups of {group_size}")
    if getattr(spec, "is_dynamic", False):
        parts.append("dynamic" + granularity_text(dynamic_granularity_of(spec)))
    if hasattr(spec, "sources"):
        parts.append("derived from " + " and ".join(f"({p})" for p in spec.sources))
    elif hasattr(spec, "scale"):
        parts.append(f"scale {spec.scale!r} zero point {spec.zero_point}")
    elif hasattr(spec, "observer_or_fake_quant_ctr"):
        constructor = spec.observer_or_fake_quant_ctr
        constructor = getattr(constructor, "p", constructor)
        parts.append(str(getattr(getattr(constructor, "func", constructor), "__name__", type(constructor).__name__)))
    return ", ".join(parts)
