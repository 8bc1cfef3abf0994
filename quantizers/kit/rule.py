"""Rules: how to quantize every match of a pattern.

    Rule(clamp(mac) | mac, {"x": ACT, "w": WEIGHT}, ACT, name="conv")     # its own scales
    Rule(moves(x),         {"x": Follow(ACT)}, Same("x"), name="moves")   # same scale in and out

Wherever a spec is expected a rule may also say `Same` as another operand, `Derived` from others, or `Follow` the
producer.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.annotation.pattern import Match, Pattern, arguments
from quant2e.annotation.specs import (
    ANNOTATION,
    INTEGER_BOUNDS,
    PER_CHANNEL_SCHEMES,
    DerivedQuantizationSpec,
    EdgeOrNode,
    QuantizationAnnotation,
    SharedQuantizationSpec,
)
from quant2e.errors import AnnotationError

RESULT = "result"
"""The name under which `Same` and `Derived` refer to the output of the match."""


@dataclass(frozen=True, slots=True)
class Same:
    """The parameters of another operand of the match, or of its ``"result"``."""

    operand: str


@dataclass(frozen=True, slots=True)
class Follow:
    """The parameters that the operand's producer gives its output; ``spec`` where the producer does not say.

    The rule applies only where a producer that is quantized feeds one of the operands that follow: an op that moves
    values costs nothing inside a quantized region, and gains nothing outside. ``every``: all of those producers are.
    ``inputs``: what the model is called with counts as quantized; with ``read``, only where something quantized reads
    the result, perhaps behind further ops that follow.
    """

    spec: Any
    every: bool = False
    inputs: bool = False
    read: bool = False


@dataclass(frozen=True, slots=True)
class Derived:
    """Parameters computed from those of other operands, as an int32 bias from the scales of input and weight.

    ``derive`` takes the observers of ``sources``, in order, and returns ``(scale, zero_point)``. ``qscheme``: None
    stands for symmetric, per channel along axis 0 where a source has its parameters per channel.
    """

    sources: Sequence[str]
    derive: Callable[[list[Any]], tuple[Tensor, Tensor]]
    dtype: torch.dtype = torch.int32
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: torch.qscheme | None = None
    ch_axis: int | None = None

    @classmethod
    def bias(cls, activation: str, weight: str) -> Derived:
        """An int32 bias in units of the accumulator: scale ``s_x * s_w``, zero point 0.

        Jacob et al., arXiv:1712.05877, 2.4.
        """
        return cls((activation, weight), accumulator_scale, torch.int32, -INT32_SPAN, INT32_SPAN)


INT32_SPAN = 2**31 - 2**7
"""The largest int32 that float32 holds: quantize ops clamp in float32, and one more would wrap around."""


def accumulator_scale(observers: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """``s_x * s_w`` in float32, what one unit of an accumulator is worth, per tensor or channel; and zeros, int64."""
    activation, weight = (torch.as_tensor(observer.calculate_qparams()[0]).float() for observer in observers)
    scale = activation * weight
    return scale, torch.zeros_like(scale, dtype=torch.int64)


@dataclass(frozen=True)
class Rule:
    """How to quantize every match of ``pattern``.

    ``operands``: a spec per operand name; names that are left out, and ``None``, stay float. An operand that is a list
    of tensors gets one set of parameters. ``result``: the spec of the root's output; ``None`` leaves it float.
    ``when``: a condition on the match that answers True, False, or the reason why not. ``name``: for reports.
    ``opt_in``: applies only where the user named the op or its module, not to the whole model.
    Raises `AnnotationError` for names that the pattern does not have.
    """

    pattern: Pattern
    operands: Mapping[str, Any]
    result: Any = None
    when: Callable[[Match], bool | str] | None = None
    name: str = ""
    opt_in: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", MappingProxyType(dict(self.operands)))
        object.__setattr__(self, "name", self.name or str(self.pattern))
        known = {*arguments(self.pattern), RESULT}
        for name in (*self.operands, *self._references()):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise AnnotationError(
                    f"rule '{self.name}' names the operand '{name}', and its pattern {self.pattern} has "
                    f"{', '.join(sorted(known))}" + (f"; did you mean '{near[0]}'?" if near else "")
                )

    def _references(self) -> Iterator[str]:
        for spec in (*self.operands.values(), self.result):
            if isinstance(spec, Same):
                yield spec.operand
            elif isinstance(spec, Derived):
                yield from spec.sources

    @property
    def follows(self) -> bool:
        """Whether the rule only continues a quantized region."""
        return any(isinstance(spec, Follow) for spec in self.operands.values())

    @property
    def is_dynamic(self) -> bool:
        """Whether some operand gets its parameters at run time."""
        return any(getattr(spec, "is_dynamic", False) for spec in self.operands.values())

    @property
    def is_weight_only(self) -> bool:
        """Whether the rule quantizes nothing but constants."""
        args = arguments(self.pattern)
        quantized = [args[name].constant for name, spec in self.operands.items() if spec is not None]
        return all(quantized) and self.result is None

    def anchor(self, match: Match) -> Node:
        """The op of a match that decides on the configuration: the one with a weight, or the innermost."""
        weighted = (name for name, arg in arguments(self.pattern).items() if arg.constant and name in match.operands)
        return next((match.edges[name][1] for name in weighted), match.nodes[0])

    def conflict(self, match: Match) -> str | None:
        """Why the annotation cannot be written: one tensor that would need two different sets of numbers."""
        wanted: dict[tuple[Node, Node], tuple[str, Any]] = {}
        for name, spec in self.operands.items():
            for edge in match.operands.get(name, ()):
                other, numbers = wanted.setdefault(edge, (name, spec))
                if numbers != spec and not isinstance(spec, Same) and not isinstance(numbers, Same):
                    return f"operands '{other}' and '{name}' are the same tensor and need different numbers"
        return None

    def condition(self, match: Match) -> str | None:
        """Why ``when`` refuses a match; None if it does not."""
        answer: Any = True if self.when is None else self.when(match)
        if not isinstance(answer, bool | str):
            raise AnnotationError(
                f"the condition of rule '{self.name}' answers {answer!r} for '{match.root.name}'; it should answer "
                "True, False, or the reason why not"
            )
        if answer is True:
            return None
        return answer or f"does not meet the condition {getattr(self.when, '__name__', self.when)}"

    def annotations(self, match: Match) -> dict[Node, QuantizationAnnotation]:
        """What the rule hangs on the nodes of a match, and on the norms that will be folded into them."""
        made = {
            node: QuantizationAnnotation(
                _annotated=True, rule=self.name, _is_output_of_quantized_pattern=node is match.root
            )
            for node in (*match.nodes, *match.folded)
        }
        for name, spec in self.operands.items():
            edges = match.operands.get(name, ())
            for i, (producer, consumer) in enumerate(edges):
                specs = made[consumer].input_qspec_map
                itself = isinstance(spec, Same) and match.edges.get(spec.operand) == (producer, consumer)
                if producer in specs or itself:
                    continue
                is_rest = i > 0 and spec is not None
                specs[producer] = SharedQuantizationSpec(edges[0]) if is_rest else self._concrete(spec, match, producer)
        result = self._concrete(self.result, match, match.root)
        if result is None or not isinstance(match.root.meta.get("val"), list | tuple):
            made[match.root].output_qspec = result
            return made
        for part in parts(match.root):
            made[part] = replace(made[match.root], input_qspec_map={}, output_qspec=result)
        return made

    def _concrete(self, spec: Any, match: Match, producer: Node) -> Any:
        if isinstance(spec, Follow):
            note = producer.meta.get(ANNOTATION)
            given = note is not None and note.output_qspec is not None
            return SharedQuantizationSpec(producer) if given else spec.spec
        if isinstance(spec, Same):
            return SharedQuantizationSpec(_place(spec.operand, match)) if _has(spec.operand, match) else None
        if isinstance(spec, Derived):
            return self._derived(spec, match)
        return spec

    def _derived(self, spec: Derived, match: Match) -> DerivedQuantizationSpec | None:
        if not all(_has(name, match) for name in spec.sources):
            return None
        qscheme, axis = spec.qscheme, spec.ch_axis
        if qscheme is None and spec.dtype in INTEGER_BOUNDS:
            sources = (self.result if name == RESULT else self.operands.get(name) for name in spec.sources)
            per_channel = any(getattr(source, "qscheme", None) in PER_CHANNEL_SCHEMES for source in sources)
            qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
            axis = 0 if per_channel and axis is None else axis
        return DerivedQuantizationSpec(
            derived_from=[_place(name, match) for name in spec.sources],
            derive_qparams_fn=spec.derive,
            dtype=spec.dtype,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            qscheme=qscheme,
            ch_axis=axis,
        )


def parts(node: Node) -> list[Node]:
    """The tensors that are picked from an op that returns several."""
    return [user for user in node.users if user.target is operator.getitem]


def _has(name: str, match: Match) -> bool:
    return name == RESULT or name in match.operands


def _place(name: str, match: Match) -> EdgeOrNode:
    return match.root if name == RESULT else match.edges[name]


@dataclass(frozen=True, slots=True)
class ChosenConfig:
    """The configuration of one node. ``setting``: what the user wrote; empty when nothing applies.

    ``explicit``: the setting names the node's op or module, so that ``None`` means "float" and not "nothing said".
    """

    config: Any
    setting: str = ""
    explicit: bool = False
